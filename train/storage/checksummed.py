"""Files with a SHA-256 beside them: written completely or not at all, and verified before they are used.

A file that is expensive to create is created by one process, while the others wait.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train.storage import locks


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Admits one process at a time to create `path`; check inside whether an earlier one has done it.

    The kernel releases the lock when its holder dies. On storage without locks, every process is admitted.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.acquire(path.with_name(f".{path.name}.lock")))
        yield


def write(path: Path, fill: Callable[[Any], None]) -> None:
    """Lets `fill` write to a binary file, and renames it to `path` when it is on disk. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        temporary = Path(file.name)
        try:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            # The checksum first: after a crash here it does not match the old content, which is detected.
            _checksum_path(path).write_text(_digest(temporary))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_intact(path: Path) -> bool:
    """Whether the file exists and matches its checksum."""
    try:
        return _digest(path).encode() == _checksum_path(path).read_bytes()
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
