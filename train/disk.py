"""Writing so that a death at any instant, of the process or of the machine, leaves the old content or the new."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """A reader sees the old content or the new, never a part. One process at a time writes a file.

    Raises: OSError, with the old content still there.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        write_through(fresh, content.encode() if isinstance(content, str) else content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_through(path: Path, content: bytes) -> None:
    """Has the content on disk before returning."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def point_link(link: Path, target: Path) -> None:
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
    sync_folder(link.parent)


def sync_folder(path: Path) -> None:
    """Has the names in a folder on disk: a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
