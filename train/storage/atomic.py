"""Atomic writes: a crash of process or machine at any instant leaves either the old content or the new.

Also safe reads from untrusted folders, in which no link may lead outside.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


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
    temporary = path.with_name(f".{path.name}.new")
    try:
        write_and_fsync(temporary, content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_and_fsync(path: Path, content: bytes) -> None:
    """Writes the file; the content is on disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
