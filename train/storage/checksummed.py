"""Files with their SHA-256 beside them: written whole or not at all, and what is not what was written is not read.

What takes long to make is made by one process, while the others wait for it.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time, of all that would make `path`; whoever comes next looks whether it is there.

    The kernel lets go of the lock when its holder dies. Where there can be none, each makes its own.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.with_name(f".{path.name}.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, fill: Callable[[Any], None]) -> None:
    """Lets `fill` write into a binary file, and gives it its name when it is on disk. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        temporary = Path(file.name)
        try:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            # First: beside the old content the new seal does not fit, which is noticed.
            _checksum_path(path).write_text(_digest(temporary))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_intact(path: Path) -> bool:
    """Whether the file is there and as it was written."""
    try:
        return _digest(path).encode() == _checksum_path(path).read_bytes()
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
