"""Locks between processes: one holder at a time, released by the kernel, and never through a link."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.commands import ROOT
from train.storage import checksummed, locks

HOLD = """
import sys, time
from pathlib import Path
from train.storage import locks
with locks.acquire(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

# Notes when it enters and leaves; without the lock, two enter one after the other.
ENTER = """
import contextlib, os, sys, time
from pathlib import Path
from train.storage import locks
path = Path(sys.argv[1])
notes = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    with locks.acquire(path.with_suffix(".lock")) if sys.argv[2] else contextlib.nullcontext():
        os.write(notes, b"+")
        time.sleep(0.01)
        os.write(notes, b"-")
"""


@pytest.mark.parametrize("locked", ["locked", ""])
def test_two_processes_never_hold_the_lock_together(locked: str, tmp_path: Path):
    """Negative control: without the lock, they meet."""
    command = [sys.executable, "-c", ENTER, str(tmp_path / "notes"), locked]
    both = [subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both if process.stdout] == ["ready\n"] * 2
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=120)
    assert [process.returncode for process in both] == [0, 0]
    notes = (tmp_path / "notes").read_text()
    assert notes.count("+") == 40
    assert ("++" not in notes) == bool(locked)


def test_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        try:
            assert locks.is_locked(path)
            with pytest.raises(locks.LockTakenError, match=f"^{path} is locked by another process$"):
                locks.acquire(path, wait_seconds=0)
            with pytest.raises(locks.LockTakenError):
                locks.acquire(path, wait_seconds=0.1)
            waiting = threading.Thread(target=lambda: locks.acquire(path).__exit__())
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
        finally:
            holder.send_signal(signal.SIGKILL)
    waiting.join(60)
    assert not waiting.is_alive()
    assert not locks.is_locked(path)


def test_lock_is_released_at_the_end_of_the_block_and_after_an_error(tmp_path: Path):
    path = tmp_path / "lock"
    with pytest.raises(BlockingIOError), locks.acquire(path):
        assert locks.is_locked(path)
        raise BlockingIOError  # of the block: not taken for a lock that is taken
    assert not locks.is_locked(path)
    with locks.acquire(path, wait_seconds=0):
        pass


def test_who_tests_the_lock_is_not_mistaken_for_its_holder(tmp_path: Path):
    path = tmp_path / "lock"
    assert not locks.is_locked(path)
    assert not path.exists()
    path.touch()
    with path.open() as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert not locks.is_locked(path)
        with pytest.raises(locks.LockTakenError):  # negative control: the shared lock is one
            locks.acquire(path, wait_seconds=0)


def test_lock_is_not_acquired_through_a_link(tmp_path: Path):
    target = tmp_path / "target"
    (tmp_path / "lock").symlink_to(target)
    for lock in (locks.acquire, locks.is_locked):
        with pytest.raises(OSError, match="symbolic links"):
            lock(tmp_path / "lock")
    assert not target.exists()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_storage_without_locks_is_told_from_a_lock_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = open_descriptors()
    with pytest.raises(locks.LocksUnsupportedError, match="No locks available"):
        locks.acquire(tmp_path / "lock")
    assert open_descriptors() == before
    with checksummed.exclusive(tmp_path / "cache"), checksummed.exclusive(tmp_path / "cache"):
        pass  # every process is admitted
