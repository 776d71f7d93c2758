"""Atomic writes: a crash of process or machine at any instant leaves either the old content or the new.

Also safe reads from untrusted folders, in which no link may lead outside.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from train.storage.fault_injection import fail_point

FOLDER_FAIL_POINTS = ("folder/complete", "folder/renamed")


class UnsafePathError(ValueError):
    """A path in a folder leads outside it, or is not a regular file."""


def resolve_inside(folder: Path, name: str) -> Path:
    """The real path of `folder / name`, which need not exist.

    Raises: UnsafePathError if it is not below the folder.
    """
    real = (folder / name).resolve()
    if not real.is_relative_to(folder.resolve()):
        raise UnsafePathError(
            f"{folder / name} is a link to {real}, outside the folder; replace it with a regular file or folder"
        )
    return real


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens the regular file `folder / name` for reading; links that stay below the folder are followed.

    The path is checked before opening, and again on the open descriptor, since a link may have replaced it meanwhile.

    Raises: UnsafePathError for a link out of the folder, or a pipe, a socket, a device; OSError.
    """
    real = resolve_inside(folder, name)
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    try:
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if opened != real or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafePathError(f"{folder / name} is not a regular file; replace it with one")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_inside(folder: Path, name: str) -> bytes:
    """The content of the regular file `folder / name`. Raises: as `open_inside`."""
    with open_inside(folder, name) as file:
        return file.read()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file, so that a reader sees the old content or the new. One process at a time may write a file.

    Raises: OSError, with the old content intact.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file to write, which replaces `path` at the end of the block; after an error it is removed.

    temporary: its path, in the same folder. By default it is the same for each process, so that it also replaces what
    a killed one left behind, and one process at a time may write `path`.

    Raises: OSError, with the old content intact.
    """
    temporary = temporary or path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # a new file: never through a link that lies there
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path, temporary: Path, fail_points: tuple[str, str] = FOLDER_FAIL_POINTS) -> Iterator[None]:
    """Creates the folder `temporary` to be filled, which is renamed to `path` at the end of the block.

    Its files need no fsync of their own. After an error it is removed. temporary: in the same folder; its name tells
    the caller what a killed process left behind. fail_points: the names of those before and after the renaming.

    Raises: OSError, also if `path` exists and is not empty, with what is there intact.
    """
    temporary.mkdir(parents=True)
    complete, renamed = fail_points
    try:
        yield
        _fsync_files(temporary)
        fail_point(complete)
        temporary.rename(path)
        fail_point(renamed)
        fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def append_and_fsync(path: Path, content: bytes) -> None:
    """Appends all of the content, or nothing of it if the disk is full; not to a file that a symbolic link leads to.

    Raises: OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
            if not size:
                fsync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def fsync_file(path: Path) -> None:
    """Flushes the content of a file to disk, whoever wrote it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_files(folder: Path) -> None:
    """Flushes all that is in the folder, and below it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))


def replace_symlink(link: Path, target: Path) -> None:
    """Makes `link` a relative link to `target`, atomically.

    Raises: OSError, with the old link intact.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(link.parent)


def fsync_folder(path: Path) -> None:
    """Flushes the folder's entries to disk; the fsync of a file does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
