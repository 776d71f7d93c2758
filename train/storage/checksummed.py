"""Files with a SHA-256 beside them: written completely or not at all, and verified before they are used.

A file that is expensive to create is created by one process, while the others wait.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from train.storage import locks
from train.storage.atomic import atomic_file, fsync_file


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


def write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Lets `fill` write to a file, and renames it to `path` when it is on disk. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # its own: storage may have no locks
    with atomic_file(path, temporary) as file:
        fill(file)
        file.flush()
        fsync_file(temporary)
        # The checksum first: after a crash here it does not match the old content, which is detected.
        _checksum_path(path).write_text(file_sha256(temporary))


def is_intact(path: Path) -> bool:
    """Whether the file exists and matches its checksum."""
    try:
        return file_sha256(path).encode() == _checksum_path(path).read_bytes()
    except OSError:
        return False


def file_sha256(*paths: Path) -> str:
    """SHA-256, in hexadecimal digits, of the content of a file, or of several files one after the other.

    Raises: OSError.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
