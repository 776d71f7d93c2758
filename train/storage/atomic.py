"""Writing so that a death at any instant, of the process or of the machine, leaves the old content or the new.

And reading out of folders that somebody else may have made: a link must not lead out of them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class UnsafePathError(ValueError):
    """A name in a folder leads to something that is not a file or folder of its own."""


def resolve_inside(folder: Path, name: str) -> Path:
    """The real path of `folder / name`, which need not exist.

    Raises: OutsideError if it is not below the folder.
    """
    real = (folder / name).resolve()
    if not real.is_relative_to(folder.resolve()):
        raise UnsafePathError(
            f"{folder / name} is a link to {real}, outside the folder; replace it by a file of its own"
        )
    return real


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens the regular file `folder / name` for reading; links that stay below the folder are followed.

    The path is checked before it is opened, and again by what the kernel says was opened: a link may have been put in
    its place meanwhile.

    Raises: OutsideError for a link that leads out of the folder, or a pipe, a socket, a device; OSError.
    """
    real = resolve_inside(folder, name)
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    try:
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if opened != real or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafePathError(f"{folder / name} is not a regular file; replace it by one")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_inside(folder: Path, name: str) -> bytes:
    """What stands in the regular file `folder / name`. Raises: as `open_inside`."""
    with open_inside(folder, name) as file:
        return file.read()


def write_atomically(path: Path, content: str | bytes) -> None:
    """A reader sees the old content or the new, never a part. One process at a time writes a file.

    Raises: OSError, with the old content still there.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        write_and_fsync(fresh, content.encode() if isinstance(content, str) else content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_and_fsync(path: Path, content: bytes) -> None:
    """Has the content on disk before returning."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_symlink(link: Path, target: Path) -> None:
    """Makes `link` a relative link to `target`, in the place of what it pointed at before.

    Raises: OSError, with the old link still there.
    """
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(os.path.relpath(target, link.parent))
        fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    fsync_folder(link.parent)


def fsync_folder(path: Path) -> None:
    """Has the names in a folder on disk: a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
