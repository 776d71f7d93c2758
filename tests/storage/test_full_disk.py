"""A full disk: checkpoints, the journal and other files are whole or absent, and the run continues."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.checkpoints import CONTENT, STATE, checkpoint_name, file_names, logged_warnings, save_checkpoint
from train.storage.atomic import write_atomically
from train.tracking.journal import Journal, read_journal
from train.tracking.run_dir import Heartbeat
from train.training.checkpoint import CheckpointManager

NO_SPACE = "No space left on device"


@pytest.fixture
def small_disk(tiny_disk: Callable[[str], Path]) -> Path:
    """A file system of 64 pages."""
    return tiny_disk("256k")


def fill(disk: Path, pages: int = 0) -> Path:
    """Writes a file that leaves this many pages free; removing it frees the rest."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(filler, filler.stat().st_size - 4096 * pages)
    assert room(disk) == pages
    return filler


def room(disk: Path) -> int:
    """The number of free pages."""
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize // 4096


def test_full_disk_loses_the_checkpoint_and_not_the_run(small_disk: Path, caplog: pytest.LogCaptureFixture):
    checkpoints, large = small_disk / "checkpoints", {"weights": np.arange(10_000, dtype=np.float32)}
    manager = CheckpointManager(checkpoints, keep=1)
    manager.save(checkpoint_name(1), STATE, CONTENT)
    manager.wait()
    filler = fill(small_disk, pages=5)  # ten are needed
    manager.save(checkpoint_name(2), large, CONTENT)
    manager.wait()
    latest = checkpoint_name(1)
    warning = f"cannot write a checkpoint to {checkpoints} ({NO_SPACE}); the latest complete one is {latest}"
    assert logged_warnings(caplog) == [warning]
    assert (file_names(checkpoints), room(small_disk), manager.latest_complete) == (
        [checkpoint_name(1)],
        5,
        checkpoint_name(1),
    )
    manager.save(checkpoint_name(3), large, CONTENT)  # the next save reports an error, too
    manager.save(checkpoint_name(4), large, CONTENT)
    manager.wait()
    assert logged_warnings(caplog) == [warning] * 3
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.metadata) == (checkpoint_name(1), CONTENT)
    filler.unlink()
    manager.save(checkpoint_name(5), large, CONTENT)
    manager.close()
    assert logged_warnings(caplog) == [warning] * 3
    assert file_names(checkpoints) == [checkpoint_name(5)]
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert checkpoint.arrays["weights"].tobytes() == large["weights"].tobytes()


def test_disk_that_was_always_full_has_no_checkpoint(small_disk: Path, caplog: pytest.LogCaptureFixture):
    fill(small_disk)
    save_checkpoint(small_disk / "checkpoints", 1)
    assert logged_warnings(caplog) == [
        f"cannot write a checkpoint to {small_disk / 'checkpoints'} ({NO_SPACE}); the latest complete one is none"
    ]
    assert CheckpointManager(small_disk / "checkpoints", 1).load_latest() is None


def test_checkpoint_is_complete_or_absent_wherever_the_disk_fills_up(small_disk: Path):
    checkpoints, large = small_disk / "checkpoints", {"weights": np.arange(3000, dtype=np.float32)}
    save_checkpoint(checkpoints, 1)
    saved = []
    for pages in range(8):
        filler = fill(small_disk, pages)
        manager = CheckpointManager(checkpoints, keep=9)
        manager.save(checkpoint_name(2), large, CONTENT)
        manager.close()
        checkpoint = manager.load_latest()
        assert checkpoint is not None
        saved.append(checkpoint.name == checkpoint_name(2))
        assert file_names(checkpoints) == [checkpoint_name(1), checkpoint_name(2)][: 1 + saved[-1]]
        assert saved[-1] or room(small_disk) == pages
        filler.unlink()
        shutil.rmtree(checkpoints / checkpoint_name(2), ignore_errors=True)
    # Three pages for the arrays and one for the manifest.
    assert saved == [False] * 4 + [True] * 4


def test_read_only_disk_loses_the_checkpoint_and_not_the_run(small_disk: Path, caplog: pytest.LogCaptureFixture):
    save_checkpoint(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    manager = CheckpointManager(small_disk, keep=1)
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert checkpoint.metadata == CONTENT | {"epoch": 1}
    manager.save(checkpoint_name(2), STATE, CONTENT)
    manager.wait()
    assert logged_warnings(caplog) == [
        f"cannot write a checkpoint to {small_disk} (Read-only file system); "
        f"the latest complete one is {checkpoint_name(1)}"
    ]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert file_names(small_disk) == [checkpoint_name(1)]
    manager.save(checkpoint_name(2), STATE, CONTENT)
    manager.close()
    assert file_names(small_disk) == [checkpoint_name(2)]


@pytest.mark.parametrize("before", [0, 1, 40])
def test_full_disk_leaves_no_partial_journal_line(before: int, small_disk: Path):
    """Earlier lines leave a partly filled page, which takes a part of the new line."""
    path = small_disk / "metrics.jsonl"
    journal = Journal(path)
    for step in range(before):
        journal.append(0, step, {"train/loss": 1 / (step + 1)})
    filler, whole = fill(small_disk), path.read_bytes() if before else b""
    values = {f"train/metric {number}": 0.1 * number for number in range(200)}  # more than a page
    for _ in range(2):
        with pytest.raises(OSError, match=NO_SPACE):
            journal.append(0, before, values)
        assert path.read_bytes() == whole
        assert journal.position == before
    filler.unlink()
    journal.append(0, before, values)
    assert journal.position == before + 1
    assert path.read_bytes().startswith(whole)
    checkpoint = [line for line, _ in read_journal(path)]
    assert [line["step"] for line in checkpoint] == list(range(before + 1))
    assert checkpoint[-1]["values"] == values


def test_full_disk_keeps_the_old_content_of_a_file(small_disk: Path):
    path = small_disk / "summary.json"
    write_atomically(path, "old\n")
    filler = fill(small_disk, pages=1)
    with pytest.raises(OSError, match=NO_SPACE):
        write_atomically(path, b"new" * 4096)
    assert path.read_text() == "old\n"
    assert (file_names(small_disk), room(small_disk)) == (["filler", "summary.json"], 1)
    filler.unlink()
    write_atomically(path, b"new" * 4096)
    assert (file_names(small_disk), path.read_bytes()) == (["summary.json"], b"new" * 4096)


def test_heartbeat_needs_no_free_space(small_disk: Path):
    heartbeat = Heartbeat(small_disk / "heartbeat")
    fill(small_disk)
    for _ in range(1000):
        heartbeat.tick()
    heartbeat.close()
    assert (small_disk / "heartbeat").read_text().split() == ["1000", "1"]
