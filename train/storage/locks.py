"""Locks between processes, on files: the kernel releases a lock when its holder ends, however it ends.

The package `filelock` is not used: its `flock` locks are exclusive, while `is_locked` needs a shared one, and the
project is installed without it.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path

RETRY_SECONDS = 0.02


class LockTakenError(ValueError):
    """Another process, or another holder in this one, has the lock."""


class LocksUnsupportedError(OSError):
    """The storage has no locks."""


class FileLock:
    """A lock that is held until the end of the `with` block, or of the process."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def acquire(path: Path, *, wait_seconds: float = math.inf) -> FileLock:
    """Locks the file `path`, which is created if it does not exist, and which no symbolic link may stand for.

    Raises: LockTakenError if another holder has not released it after `wait_seconds`; LocksUnsupportedError; OSError if
    the file cannot be opened for writing.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with ExitStack() as on_error:
        lock = on_error.enter_context(FileLock(descriptor))
        try:
            _lock(descriptor, wait_seconds)
        except BlockingIOError:
            raise LockTakenError(f"{path} is locked by another process") from None
        except OSError as error:
            raise LocksUnsupportedError(error.errno, error.strerror, str(path)) from None
        on_error.pop_all()
    return lock


def _lock(descriptor: int, wait_seconds: float) -> None:
    """Raises: BlockingIOError if another holder has not released the lock after `wait_seconds`; OSError."""
    deadline = time.monotonic() + wait_seconds
    operation = fcntl.LOCK_EX if wait_seconds == math.inf else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            break


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; it is held for a moment to find out, so that `acquire` may have to wait for it.

    Raises: OSError if the file exists but cannot be opened or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two processes that test the lock do not mistake each other for its holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
