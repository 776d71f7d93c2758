"""What a run keeps on disk outlives whatever happens to it: a kill, a full disk, flipped bits, torn lines."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.commands import ROOT, run_command
from train.storage.atomic import replace_symlink, write_atomically
from train.tracking.journal import INITIAL_BRANCH, Journal, ReplayError, read_journal
from train.tracking.run_dir import Heartbeat, RunDir, latest_unfinished
from train.training.checkpoint import (
    ARRAYS,
    MANIFEST,
    QUARANTINE_PREFIX,
    UNFINISHED_PREFIX,
    CheckpointManager,
    CheckpointPolicy,
    CorruptCheckpointError,
    read_checkpoint,
)
from train.training.loop import Progress

FULL = "No space left on device"

# Every type that a network's state has, and the shapes and values at which a copy may go wrong.
STATE: dict[str, np.ndarray] = {
    "model/conv/kernel": np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32),
    "model/bits": np.frombuffer(struct.pack("<4I", 0x7FC00001, 0x80000000, 1, 0xFF800000), np.float32),
    "model/half": np.array([65504, -0.0, 6e-8], np.float16),
    "optimizer/iteration": np.array(2**62 + 1, np.int64),
    "seed/state": np.array([2**32 - 1, 0], np.uint32),
    "model/turned": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "model/every_other": np.arange(10, dtype=np.int64)[::2],
    "model/flags": np.array([True, False]),
    "empty": np.empty((0, 7), np.float32),
    "scalar": np.array(1.5, np.float32),
}
CONTENT = {
    "run_id": "f00d",
    "progress": {
        "epoch": 1,
        "steps": 40,
        "best_accuracy": 0.1 + 0.2,
        "best_loss": 0.5,
        "best_metric": None,
        "stopped_early": False,
    },
    "journal_lines": 7,
    "provenance": {"model.blocks": ["conv_bn", "inception_v1"], "tracking.experiment": "grün ☃"},
}


def name_of(epoch: int, batch: int = 0) -> str:
    return Progress(epoch=epoch, batch=batch).checkpoint_name


def save(folder: Path, epoch: int, keep: int = 9, **arrays: np.ndarray) -> Path:
    """One checkpoint, written by a life of its own."""
    kept = CheckpointManager(folder, keep)
    kept.save(name_of(epoch), arrays or STATE, CONTENT | {"epoch": epoch})
    kept.close()
    return folder / name_of(epoch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -------------------------------------------------------------------------------------------------------- what is saved


def test_what_was_saved_is_what_is_read(tmp_path: Path):
    kept = CheckpointManager(tmp_path / "checkpoints", keep=2)
    kept.save(name_of(1), STATE, CONTENT)
    kept.close()
    assert kept.latest_complete == name_of(1)
    found = CheckpointManager(tmp_path / "checkpoints", keep=2).load_latest()
    assert found is not None
    assert (found.name, found.metadata) == ("epoch-00001-batch-0000000", CONTENT)
    assert found.arrays.keys() == STATE.keys()
    for name, array in STATE.items():
        got = found.arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_the_files_are_those_that_the_format_names(tmp_path: Path):
    path = save(tmp_path, 1)
    assert names(tmp_path) == [path.name]
    assert names(path) == ["arrays.npz", "manifest.json"]
    with np.load(path / "arrays.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["content"] == CONTENT | {"epoch": 1}
    assert manifest["arrays_sha256"] == hashlib.sha256((path / "arrays.npz").read_bytes()).hexdigest()


def test_names_sort_as_places_do():
    places = list(product((0, 1, 2, 9, 10, 99, 100, 99_999), (0, 1, 9, 10, 4999, 5000, 9_999_999)))
    assert [name_of(*place) for place in places] == sorted(name_of(*place) for place in places)
    assert name_of(3, 120) == "epoch-00003-batch-0000120"


def test_the_newest_is_that_of_the_last_place_not_of_the_last_minute(tmp_path: Path):
    for epoch in (10, 9, 2):
        save(tmp_path, epoch)
    found = CheckpointManager(tmp_path, 9).load_latest()
    assert found is not None
    assert (found.name, found.metadata["epoch"]) == (name_of(10), 10)


def test_where_nothing_was_saved_nothing_is_found(tmp_path: Path):
    assert CheckpointManager(tmp_path / "not there", 2).load_latest() is None
    (tmp_path / name_of(1)).touch()  # a file is no checkpoint
    assert CheckpointManager(tmp_path, 2).load_latest() is None


def test_only_so_many_are_kept(tmp_path: Path):
    kept = CheckpointManager(tmp_path, keep=2)
    left = []
    for epoch in range(1, 5):
        kept.save(name_of(epoch), STATE, CONTENT)
        kept.wait()
        left.append(names(tmp_path))
    kept.close()
    one, two, three, four = map(name_of, range(1, 5))
    assert left == [[one], [one, two], [two, three], [three, four]]


def test_a_half_pruned_one_harms_nothing_and_goes_next_time(tmp_path: Path):
    """The process may die while it removes the files of an old one."""
    (save(tmp_path, 1) / MANIFEST).unlink()
    save(tmp_path, 2)
    found = CheckpointManager(tmp_path, 1).load_latest()
    assert found is not None
    assert found.name == name_of(2)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [name_of(3)]


def test_saving_to_a_name_that_is_there_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = save(tmp_path, 1)
    before, times = files(tmp_path), [(path / name).stat().st_mtime_ns for name in (ARRAYS, MANIFEST)]
    kept = CheckpointManager(tmp_path, keep=1)
    kept.save(path.name, {"other": np.zeros(3)}, {})
    kept.close()
    assert (kept.latest_complete, warnings(caplog)) == (path.name, [])
    assert files(tmp_path) == before
    assert [(path / name).stat().st_mtime_ns for name in (ARRAYS, MANIFEST)] == times


def test_a_fault_that_is_not_the_disks_is_not_hidden(tmp_path: Path):
    kept = CheckpointManager(tmp_path, 1)
    kept.save(name_of(1), STATE, {"what JSON does not know": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        kept.wait()
    kept.save(name_of(2), STATE, CONTENT)
    kept.close()
    assert names(tmp_path) == [name_of(2)]


# --------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def truncate_arrays(path: Path, _: Path) -> None:
    os.truncate(path / ARRAYS, (path / ARRAYS).stat().st_size // 2)


def flip_arrays(path: Path, _: Path) -> None:
    flip(path / ARRAYS, (path / ARRAYS).stat().st_size // 2)


def flip_counter(path: Path, _: Path) -> None:
    """40 steps become 50: still JSON, still plausible."""
    place = (path / MANIFEST).read_bytes().index(b'"steps": 40') + len('"steps": ')
    flip(path / MANIFEST, place)
    assert json.loads((path / MANIFEST).read_bytes())["content"]["progress"]["steps"] == 50


def truncate_manifest(path: Path, _: Path) -> None:
    os.truncate(path / MANIFEST, 100)


def empty_manifest(path: Path, _: Path) -> None:
    os.truncate(path / MANIFEST, 0)


def foreign_json(path: Path, _: Path) -> None:
    (path / MANIFEST).write_text("[]")


def no_manifest(path: Path, _: Path) -> None:
    (path / MANIFEST).unlink()


def no_arrays(path: Path, _: Path) -> None:
    (path / ARRAYS).unlink()


def nothing(path: Path, _: Path) -> None:
    no_manifest(path, _)
    no_arrays(path, _)


def arrays_of_another(path: Path, other: Path) -> None:
    shutil.copy(other / ARRAYS, path / ARRAYS)


def manifest_of_another(path: Path, other: Path) -> None:
    shutil.copy(other / MANIFEST, path / MANIFEST)


OTHER_ARRAYS = "arrays.npz has another SHA-256 than manifest.json names"
NO_FILE = "FileNotFoundError: [Errno 2] No such file or directory: '{path}/"
DAMAGES: dict[Callable[[Path, Path], None], str] = {
    truncate_arrays: OTHER_ARRAYS,
    flip_arrays: OTHER_ARRAYS,
    flip_counter: "manifest.json has another SHA-256 than it names",
    truncate_manifest: "JSONDecodeError: ",
    empty_manifest: "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    foreign_json: "TypeError: ",
    no_manifest: NO_FILE + "manifest.json'",
    no_arrays: NO_FILE + "arrays.npz'",
    nothing: NO_FILE + "manifest.json'",
    arrays_of_another: OTHER_ARRAYS,
    manifest_of_another: OTHER_ARRAYS,
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_of_a_damaged_one_the_one_before_is_taken(
    damage: Callable[[Path, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good, bad = save(tmp_path, 1), save(tmp_path, 2, weights=np.arange(500, dtype=np.float32))
    damage(bad, good)
    whole, rest = files(good), files(bad)
    kept = CheckpointManager(tmp_path, 2)
    found = kept.load_latest()
    assert found is not None
    assert (found.name, kept.latest_complete, found.metadata["epoch"]) == (good.name, good.name, 1)
    assert found.arrays["scalar"] == STATE["scalar"]
    [told] = warnings(caplog)
    what = DAMAGES[damage].format(path=bad)
    assert told.startswith(f"checkpoint {bad.name} is damaged: {what}")
    assert told.endswith("; taking the one before")
    assert names(tmp_path) == [f"{QUARANTINE_PREFIX}{bad.name}", good.name]
    assert files(good) == whole
    assert files(tmp_path / f"{QUARANTINE_PREFIX}{bad.name}") == rest
    caplog.clear()
    again = kept.load_latest()
    assert again is not None
    assert (again.name, warnings(caplog)) == (good.name, [])


def test_where_all_are_damaged_none_is_taken_and_the_place_is_free_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for epoch, damage in ((1, flip_arrays), (2, no_manifest)):
        damage(save(tmp_path, epoch), tmp_path)
    kept = CheckpointManager(tmp_path, 2)
    assert kept.load_latest() is None
    assert [told.split()[1] for told in warnings(caplog)] == [name_of(2), name_of(1)]
    assert names(tmp_path) == [f"{QUARANTINE_PREFIX}{name_of(1)}", f"{QUARANTINE_PREFIX}{name_of(2)}"]
    save(tmp_path, 1)
    found = kept.load_latest()
    assert found is not None
    assert found.name == name_of(1)


def test_a_place_may_be_damaged_twice(tmp_path: Path):
    for damage in (no_manifest, no_arrays):
        damage(save(tmp_path, 1), tmp_path)
        assert CheckpointManager(tmp_path, 2).load_latest() is None
    assert names(tmp_path) == [f"{QUARANTINE_PREFIX}{name_of(1)}"]
    assert names(tmp_path / f"{QUARANTINE_PREFIX}{name_of(1)}") == [MANIFEST]


def test_no_flipped_bit_is_accepted(tmp_path: Path):
    path = save(tmp_path, 1)
    chance = random.Random(0)
    for number in range(200):
        file = path / (ARRAYS, MANIFEST)[number % 2]
        place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, place, bit)
        with pytest.raises(CorruptCheckpointError):
            read_checkpoint(path)
        flip(file, place, bit)
    assert read_checkpoint(path).metadata == CONTENT | {"epoch": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("one"), 1)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_what_is_read_is_what_was_saved_or_nothing(one: Path, data: st.DataObject):
    """Any piece may be cut out or overwritten. A manifest may read as before: a line end that became a space."""
    file = one / data.draw(st.sampled_from((ARRAYS, MANIFEST)))
    whole = file.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    try:
        file.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:])
        same = file.read_bytes() == whole
        try:
            found = read_checkpoint(one)
        except CorruptCheckpointError:
            assert not same
        else:
            assert found.metadata == CONTENT | {"epoch": 1}
            assert {name: found.arrays[name].tobytes() for name in STATE} == {
                name: array.tobytes() for name, array in STATE.items()
            }
    finally:
        file.write_bytes(whole)


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from train.training.checkpoint import CheckpointManager
os.chdir(sys.argv[1])
if os.geteuid() == 0:  # who may read everything
    os.seteuid(65534)
try:
    CheckpointManager(Path("."), 1).load_latest()
except PermissionError as fault:
    print(fault.filename)
"""


def test_one_that_may_not_be_read_is_not_taken_for_damaged(tmp_path: Path):
    path = save(tmp_path, 1)
    tmp_path.chmod(0o777)
    (path / MANIFEST).chmod(0)
    done = run_command(sys.executable, "-c", READ_AS_NOBODY, str(tmp_path))
    assert (done.code, done.out) == (0, f"{path.name}/{MANIFEST}\n"), done.err
    assert names(tmp_path) == [path.name]


# ---------------------------------------------------------------------------------------------------- killed on the way

SAVE = """
import sys
from pathlib import Path
import numpy as np
from train.training.checkpoint import CheckpointManager
kept = CheckpointManager(Path(sys.argv[1]), keep=1)
kept.save(sys.argv[2], {"weights": np.arange(5000, dtype=np.float32)}, {"epoch": 2})
kept.close()
assert not {"tensorflow", "keras", "mlflow"} & set(sys.modules)
"""
OLD, NEW = name_of(1), name_of(2)
# Where it dies -> what then lies there. The old one goes only when the new one is whole.
STAGES = {
    "save/begun": [f"{UNFINISHED_PREFIX}{NEW}", OLD],
    "save/written": [f"{UNFINISHED_PREFIX}{NEW}", OLD],
    "save/arrays": [f"{UNFINISHED_PREFIX}{NEW}", OLD],
    "save/manifest": [f"{UNFINISHED_PREFIX}{NEW}", OLD],
    "save/renamed": [OLD, NEW],
    "save/pruned": [NEW],
    "save/done": [NEW],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_leaves_the_old_one_or_the_new_one(
    stage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 1)
    done = run_command(sys.executable, "-c", SAVE, str(tmp_path), NEW, env={"INCEPTION_FAULT": f"{stage}:1"})
    assert (done.code, done.err) == (-signal.SIGKILL, "")
    assert names(tmp_path) == STAGES[stage]
    kept = CheckpointManager(tmp_path, keep=1)
    found = kept.load_latest()
    assert found is not None
    if NEW in STAGES[stage]:
        assert (found.name, found.metadata) == (NEW, {"epoch": 2})
        assert found.arrays["weights"].tobytes() == np.arange(5000, dtype=np.float32).tobytes()
    else:
        assert (found.name, found.metadata) == (OLD, CONTENT | {"epoch": 1})
        assert {name: array.tobytes() for name, array in found.arrays.items()} == {
            name: array.tobytes() for name, array in STATE.items()
        }
    assert warnings(caplog) == []
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [name_of(3)]
    found = kept.load_latest()
    assert found is not None
    assert found.metadata["epoch"] == 3


def test_nothing_dies_that_was_not_asked_to(tmp_path: Path):
    save(tmp_path, 1)
    done = run_command(sys.executable, "-c", SAVE, str(tmp_path), NEW, env={"INCEPTION_FAULT": "save/done:2"})
    assert (done.code, done.err) == (0, "")
    assert names(tmp_path) == [NEW]


# ----------------------------------------------------------------------------------------------------- the disk is full


@pytest.fixture
def small_disk(tiny_disk: Callable[[str], Path]) -> Path:
    """A file system of 64 pages."""
    return tiny_disk("256k")


def fill(disk: Path, pages: int = 0) -> Path:
    """A file that leaves so much room; removing it makes room again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as fault:
            assert fault.errno == errno.ENOSPC
    os.truncate(filler, filler.stat().st_size - 4096 * pages)
    assert room(disk) == pages
    return filler


def room(disk: Path) -> int:
    """Free pages."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize // 4096


def test_a_full_disk_costs_the_checkpoint_not_the_run(small_disk: Path, caplog: pytest.LogCaptureFixture):
    place, large = small_disk / "checkpoints", {"weights": np.arange(10_000, dtype=np.float32)}
    kept = CheckpointManager(place, keep=1)
    kept.save(name_of(1), STATE, CONTENT)
    kept.wait()
    filler = fill(small_disk, pages=5)  # ten are needed
    kept.save(name_of(2), large, CONTENT)
    kept.wait()
    told = f"a checkpoint could not be written to {place} ({FULL}); the one before stays: {name_of(1)}"
    assert warnings(caplog) == [told]
    assert (names(place), room(small_disk), kept.latest_complete) == ([name_of(1)], 5, name_of(1))
    kept.save(name_of(3), large, CONTENT)  # a fault is told by the next save, too
    kept.save(name_of(4), large, CONTENT)
    kept.wait()
    assert warnings(caplog) == [told] * 3
    found = kept.load_latest()
    assert found is not None
    assert (found.name, found.metadata) == (name_of(1), CONTENT)
    filler.unlink()
    kept.save(name_of(5), large, CONTENT)
    kept.close()
    assert warnings(caplog) == [told] * 3
    assert names(place) == [name_of(5)]
    found = kept.load_latest()
    assert found is not None
    assert found.arrays["weights"].tobytes() == large["weights"].tobytes()


def test_where_there_never_was_room_there_is_no_checkpoint(small_disk: Path, caplog: pytest.LogCaptureFixture):
    fill(small_disk)
    save(small_disk / "checkpoints", 1)
    assert warnings(caplog) == [
        f"a checkpoint could not be written to {small_disk / 'checkpoints'} ({FULL}); the one before stays: none"
    ]
    assert CheckpointManager(small_disk / "checkpoints", 1).load_latest() is None


def test_wherever_in_a_checkpoint_the_disk_gets_full_it_is_whole_or_gone(small_disk: Path):
    place, large = small_disk / "checkpoints", {"weights": np.arange(3000, dtype=np.float32)}
    save(place, 1)
    came = []
    for pages in range(8):
        filler = fill(small_disk, pages)
        kept = CheckpointManager(place, keep=9)
        kept.save(name_of(2), large, CONTENT)
        kept.close()
        found = kept.load_latest()
        assert found is not None
        came.append(found.name == name_of(2))
        assert names(place) == [name_of(1), name_of(2)][: 1 + came[-1]]
        assert came[-1] or room(small_disk) == pages
        filler.unlink()
        shutil.rmtree(place / name_of(2), ignore_errors=True)
    # Three pages for the arrays and one for the manifest.
    assert came == [False] * 4 + [True] * 4


def test_a_disk_that_may_not_be_written_costs_the_checkpoint_not_the_run(
    small_disk: Path, caplog: pytest.LogCaptureFixture
):
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    kept = CheckpointManager(small_disk, keep=1)
    found = kept.load_latest()
    assert found is not None
    assert found.metadata == CONTENT | {"epoch": 1}
    kept.save(name_of(2), STATE, CONTENT)
    kept.wait()
    assert warnings(caplog) == [
        f"a checkpoint could not be written to {small_disk} (Read-only file system); the one before stays: {name_of(1)}"
    ]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert names(small_disk) == [name_of(1)]
    kept.save(name_of(2), STATE, CONTENT)
    kept.close()
    assert names(small_disk) == [name_of(2)]


@pytest.mark.parametrize("before", [0, 1, 40])
def test_a_full_disk_leaves_no_part_of_a_journals_line(before: int, small_disk: Path):
    """With lines before there is a page with room, into which a part of the line goes."""
    path = small_disk / "metrics.jsonl"
    journal = Journal(path)
    for step in range(before):
        journal.append(0, step, {"train/loss": 1 / (step + 1)})
    filler, whole = fill(small_disk), path.read_bytes() if before else b""
    values = {f"train/metric {number}": 0.1 * number for number in range(200)}  # more than a page
    for _ in range(2):
        with pytest.raises(OSError, match=FULL):
            journal.append(0, before, values)
        assert path.read_bytes() == whole
        assert journal.position == before
    filler.unlink()
    journal.append(0, before, values)
    assert journal.position == before + 1
    assert path.read_bytes().startswith(whole)
    found = [line for line, _ in read_journal(path)]
    assert [line["step"] for line in found] == list(range(before + 1))
    assert found[-1]["values"] == values


def test_a_full_disk_keeps_the_old_content_of_a_file(small_disk: Path):
    path = small_disk / "summary.json"
    write_atomically(path, "old\n")
    filler = fill(small_disk, pages=1)
    with pytest.raises(OSError, match=FULL):
        write_atomically(path, b"new" * 4096)
    assert path.read_text() == "old\n"
    assert (names(small_disk), room(small_disk)) == (["filler", "summary.json"], 1)
    filler.unlink()
    write_atomically(path, b"new" * 4096)
    assert (names(small_disk), path.read_bytes()) == (["summary.json"], b"new" * 4096)


def test_the_pulse_needs_no_room(small_disk: Path):
    pulse = Heartbeat(small_disk / "heartbeat")
    fill(small_disk)
    for _ in range(1000):
        pulse.tick()
    pulse.close()
    assert (small_disk / "heartbeat").read_text().split() == ["1000", "1"]


# --------------------------------------------------------------------------------------------------------- when to save


def test_by_default_every_epoch_is_saved():
    interval = CheckpointPolicy()
    assert [interval.should_save(epoch, 10 * epoch, epoch_end=True) for epoch in (1, 2, 3)] == [True] * 3
    assert not any(interval.should_save(1, step, epoch_end=False) for step in range(11, 20))


def test_so_many_epochs():
    interval = CheckpointPolicy(every_epochs=3)
    assert [epoch for epoch in range(1, 10) if interval.should_save(epoch, 10 * epoch, epoch_end=True)] == [3, 6, 9]
    assert not interval.should_save(3, 35, epoch_end=False)


def test_so_many_steps_wherever_they_fall():
    interval = CheckpointPolicy(every_steps=4)
    due = [step for step in range(1, 13) if interval.should_save(step // 6, step, epoch_end=step % 6 == 0)]
    assert due == [4, 8, 12]


def test_so_many_minutes_since_the_last():
    interval = CheckpointPolicy(every_minutes=0.4 / 60)
    time.sleep(0.05)
    assert not interval.should_save(0, 1, epoch_end=False)
    assert not interval.should_save(1, 2, epoch_end=True)
    time.sleep(0.4)
    assert [interval.should_save(1, step, epoch_end=False) for step in (3, 4)] == [True, False]


def test_checkpoints_of_a_stop_are_no_targets_of_a_rollback_and_push_no_planned_one_out(tmp_path: Path):
    saved = CheckpointManager(tmp_path, keep=1)
    for name in ("epoch-00000-batch-0000004", "epoch-00000-batch-0000005-stop", "epoch-00000-batch-0000006-stop"):
        saved.save(name, {"a": np.zeros(1)}, {"name": name})
    saved.wait()
    newest, planned = saved.load_latest(), saved.load_latest(periodic_only=True)
    assert newest is not None and planned is not None
    assert (newest.name[-9:], planned.name[-9:]) == ("0006-stop", "h-0000004")
    saved.save("epoch-00001-batch-0000000", {"a": np.zeros(1)}, {})
    saved.close()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001-batch-0000000"]


# ---------------------------------------------------------------------------------------------------------- the journal

LINES: list[tuple[int, int, dict[str, float]]] = [
    (0, 0, {"cost/parameters": 1000}),
    (0, 5, {"train/loss": 2.3, "learning_rate": 0.1, "images_per_second": 50.0}),
    (0, 10, {"train/loss": 0.1 + 0.2, "validation/loss": math.nan, "data_wait_fraction": 0.5}),
    (1, 15, {"train/loss": 1e-300, "validation/loss": math.inf}),
]


def write(path: Path, lines: list[tuple[int, int, dict[str, float]]] = LINES) -> Journal:
    journal = Journal(path)
    for epoch, step, values in lines:
        journal.append(epoch, step, values)
    return journal


def steps(path: Path) -> list[int]:
    return [line["step"] for line, _ in read_journal(path)]


def test_a_line_is_on_disk_when_it_is_appended(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal, start = Journal(path), time.time()
    for number, (epoch, step, values) in enumerate(LINES, 1):
        journal.append(epoch, step, values)
        assert journal.position == len(path.read_text().splitlines()) == number
    found = [line for line, _ in read_journal(path)]
    assert [(line["epoch"], line["step"], json.dumps(line["values"])) for line in found] == [
        (epoch, step, json.dumps(values)) for epoch, step, values in LINES
    ]
    assert all(line.keys() == {"epoch", "step", "time", "values"} for line in found)
    assert start <= found[0]["time"] <= found[-1]["time"] <= time.time()


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "whole")
    content, path = (tmp_path / "whole").read_bytes(), tmp_path / "metrics.jsonl"
    last = content.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(content)):
        caplog.clear()
        path.write_bytes(content[:cut])
        assert steps(path) == [0, 5, 10]  # what another process reads meanwhile
        journal = Journal(path)
        assert path.read_bytes() == content[:last]
        torn = f"the last line of {path} was being written when the run died, and is cut off"
        assert warnings(caplog) == ([torn] if cut > last else [])
    journal.seek(3, INITIAL_BRANCH, compare=True)
    journal.append(*LINES[3])
    assert steps(path) == [0, 5, 10, 15]


def test_a_journal_that_is_only_a_torn_line_begins_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0, "st')
    write(path, LINES[:1])
    assert steps(path) == [0]


def test_what_was_appended_outlives_a_kill(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom train.tracking.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\nfor step in range(9): journal.append(0, step, {'loss': 1.5})"
    )
    path = tmp_path / "metrics.jsonl"
    done = run_command(sys.executable, "-c", code, str(path), env={"INCEPTION_FAULT": "journal:3"})
    assert done.code == -signal.SIGKILL, done.err
    assert steps(path) == [0, 1, 2]


def test_lines_that_are_there_are_compared_and_not_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path)
    before = path.read_bytes()
    journal = write(path)  # the same run, from the start
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {"train/loss": 1.0})
    assert path.read_bytes().startswith(before)
    assert (steps(path), journal.position) == ([0, 5, 10, 15, 20], 5)


@pytest.mark.parametrize("lines", range(5))
def test_a_life_goes_on_behind_the_lines_that_its_checkpoint_knows(lines: int, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path)
    before = path.read_bytes()
    journal = Journal(path)
    journal.seek(lines, INITIAL_BRANCH, compare=True)
    at = [journal.position]
    for line in LINES[lines:]:
        journal.append(*line)
        at.append(journal.position)
    assert at == list(range(lines, 5))
    assert path.read_bytes() == before
    journal.append(1, 20, {})
    assert steps(path) == [0, 5, 10, 15, 20]


DIFFERENT = {
    "a value": (
        (0, 5, {"train/loss": 2.4, "learning_rate": 0.1}),
        "in epoch 1 at step 5 train/loss was 2.3, is 2.4;",
    ),
    "one ulp": (
        (0, 5, {"train/loss": math.nextafter(2.3, 3), "learning_rate": 0.1}),
        "in epoch 1 at step 5 train/loss was 2.3, is 2.3000000000000003;",
    ),
    "not a number": (
        (0, 5, {"train/loss": math.nan, "learning_rate": 0.1}),
        "in epoch 1 at step 5 train/loss was 2.3, is NaN;",
    ),
    "a value missing": (
        (0, 5, {"train/loss": 2.3}),
        "in epoch 1 at step 5 learning_rate was 0.1, is None;",
    ),
    "a value more": (
        (0, 5, {"train/loss": 2.3, "learning_rate": 0.1, "train/top5": 0.5}),
        "in epoch 1 at step 5 train/top5 was None, is 0.5;",
    ),
    "the step": (
        (0, 6, {"train/loss": 2.3, "learning_rate": 0.1}),
        "in epoch 1 at step 6 the journal goes on at epoch 1, step 5;",
    ),
    "the epoch": (
        (1, 5, {"train/loss": 2.3, "learning_rate": 0.1}),
        "in epoch 2 at step 5 the journal goes on at epoch 1, step 5;",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_replay_that_differs_is_refused(what: str, tmp_path: Path):
    path, (line, message) = tmp_path / "metrics.jsonl", DIFFERENT[what]
    write(path)
    before = path.read_bytes()
    journal = write(path, LINES[:1])
    with pytest.raises(ReplayError) as refused:
        journal.append(*line)
    assert str(refused.value) == (
        f"a step that is done again must give the same bits, but {message} "
        "another machine, driver or library? see train.log"
    )
    assert path.read_bytes() == before


def test_times_and_rates_may_differ(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    timed_names = ("images_per_second", "data_wait_fraction", "cost/peak_memory_bytes")
    write(path, [(0, 5, {"train/loss": 2.3, **dict.fromkeys(timed_names, 1.0)})])
    before = path.read_bytes()
    for timed in (dict.fromkeys(timed_names, 2.0), dict.fromkeys(timed_names, math.nan), {}):
        write(path, [(0, 5, {"train/loss": 2.3, **timed})])
        assert path.read_bytes() == before


def test_without_comparing_the_old_line_stays(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path)
    before = path.read_bytes()
    journal = Journal(path)
    journal.seek(1, INITIAL_BRANCH, compare=False)
    for epoch, step, values in LINES[1:]:
        journal.append(epoch, step, dict.fromkeys(values, 0.0))
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {"train/loss": 0.0})
    assert steps(path) == [0, 5, 10, 15, 20]


def test_without_comparing_another_way_is_written_down(tmp_path: Path):
    """Such as a run that stops earlier than its earlier life did: its last line must not get lost."""
    path = tmp_path / "metrics.jsonl"
    write(path)
    journal = Journal(path)
    journal.seek(1, INITIAL_BRANCH, compare=False)
    journal.append(0, LINES[1][1], {"test/loss": 0.5})
    assert [line["values"] for line, _ in read_journal(path)][-1] == {"test/loss": 0.5}
    assert len(steps(path)) == len(LINES) + 1


def test_a_branch_has_its_own_lines_behind_those_of_the_one_before(tmp_path: Path):
    path, once, twice = tmp_path / "metrics.jsonl", (0, 1), (0, 2)
    journal = write(path)
    journal.seek(2, once, compare=True)
    assert journal.position == 2
    journal.append(0, 10, {"train/loss": 7.0})
    assert journal.position == 5
    journal.seek(2, twice, compare=True)
    journal.append(0, 10, {"train/loss": 8.0})
    before = path.read_bytes()
    lines = [line for line, _ in read_journal(path)]
    assert [line.get("branch") for line in lines] == [None] * 4 + [[0, 1], [0, 2]]

    # Each life expects what an earlier one has written on the same branch, and nothing else.
    for branch, loss, behind in ((once, 7.0, 5), (twice, 8.0, 6)):
        journal = Journal(path)
        journal.seek(2, branch, compare=True)
        journal.append(0, 10, {"train/loss": loss})
        assert (path.read_bytes(), journal.position) == (before, behind)
        journal.seek(2, branch, compare=True)
        with pytest.raises(ReplayError, match=rf"train/loss was {loss}, is 9\.0;"):
            journal.append(0, 10, {"train/loss": 9.0})
    journal.seek(2, INITIAL_BRANCH, compare=True)
    for line in LINES[2:]:
        journal.append(*line)
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {})
    assert (path.read_bytes()[: len(before)], journal.position) == (before, 7)


def test_a_journal_with_fewer_lines_than_the_checkpoint_knows_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = write(path)
    with pytest.raises(ValueError) as refused:
        journal.seek(5, INITIAL_BRANCH, compare=True)
    assert str(refused.value) == f"{path} must have the 5 lines that the checkpoint knows, got 4; put it back"
    path.unlink()
    with pytest.raises(ValueError, match="must have the 1 lines that the checkpoint knows, got 0; put it back"):
        Journal(path).seek(1, INITIAL_BRANCH, compare=True)


def test_a_broken_line_in_the_middle_is_named_with_its_byte(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    path.write_bytes(content[:start] + b"#" + content[start + 1 :])
    with pytest.raises(ValueError) as refused:
        Journal(path)
    shown = b"#" + content[start + 1 : start + 80]
    assert str(refused.value) == f"{path} must hold JSON lines, got {shown!r} at byte {start}"
    assert path.read_bytes()[start : start + 1] == b"#"


def test_a_reader_goes_on_where_it_was(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = write(path, LINES[:2])
    behind = [offset for _, offset in read_journal(path)]
    assert behind[-1] == path.stat().st_size
    journal.append(*LINES[2])
    assert [line["step"] for line, _ in read_journal(path, behind[-1])] == [10]
    assert [line["step"] for line, _ in read_journal(path, behind[0])] == [5, 10]


# ------------------------------------------------------------------------------------------------------------ the pulse


def test_steps_and_lives_are_counted_over_all_lives(tmp_path: Path):
    path, counted = tmp_path / "heartbeat", []
    for beats in (3, 0, 4):
        pulse = Heartbeat(path)
        for _ in range(beats):
            pulse.tick()
        counted.append((pulse.steps, pulse.attempts, path.read_text().split()))
        pulse.close()
    assert counted == [(3, 1, ["3", "1"]), (3, 2, ["3", "2"]), (7, 3, ["7", "3"])]


def test_a_checkpoint_may_know_of_more_steps_than_the_pulse(tmp_path: Path):
    pulse = Heartbeat(tmp_path / "heartbeat")
    known = []
    for steps in (5, 2, 6):
        pulse.ensure(steps)
        known.append((pulse.steps, (tmp_path / "heartbeat").read_text().split()[0]))
    pulse.close()
    assert known == [(5, "5"), (5, "5"), (6, "6")]


@pytest.mark.parametrize("content", [b"", b"\0" * 27])
def test_a_pulse_that_never_came_to_the_disk_begins_anew(content: bytes, tmp_path: Path):
    """After the machine went down a file may be empty, or zeros."""
    (tmp_path / "heartbeat").write_bytes(content)
    pulse = Heartbeat(tmp_path / "heartbeat")
    pulse.ensure(40)
    pulse.close()
    assert (tmp_path / "heartbeat").read_text().split() == ["40", "1"]


def test_the_pulse_is_as_old_as_the_last_step(tmp_path: Path):
    pulse = Heartbeat(tmp_path / "heartbeat")
    os.utime(tmp_path / "heartbeat", (1e9, 1e9))
    pulse.tick()
    pulse.close()
    assert abs((tmp_path / "heartbeat").stat().st_mtime - time.time()) < 5


def test_the_pulse_outlives_a_kill(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom train.storage import fault_injection\n"
        "from train.tracking.run_dir import Heartbeat\n"
        "pulse = Heartbeat(Path(sys.argv[1]))\nfor _ in range(99):\n    pulse.tick()\n"
        "    fault_injection.fail_point('step', pulse.steps)"
    )
    path = tmp_path / "heartbeat"
    for life, step in enumerate((12, 30), 1):
        done = run_command(sys.executable, "-c", code, str(path), env={"INCEPTION_FAULT": f"step:{step}"})
        assert done.code == -signal.SIGKILL, done.err
        assert path.read_text().split() == [str(step), str(life)]


# ----------------------------------------------------------------------------------------------------------- the folder


def a_run(path: Path, began: float = 0.0, status: str | None = None) -> RunDir:
    path.mkdir(parents=True)
    folder = RunDir(path, f"id of {path.name}")
    folder.write_json("run.json", {"run_id": folder.run_id, "time": began})
    if status:
        folder.write_json("summary.json", {"status": status})
    return folder


HOLD = """
import sys, time
from pathlib import Path
from train.tracking.run_dir import open_run_dir
with open_run_dir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_held_by_one_process_as_long_as_that_lives(tmp_path: Path):
    folder = a_run(tmp_path / "run")
    assert not folder.is_running()
    words = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert folder.is_running()
            with pytest.raises(ValueError) as refused, folder.locked():
                pass
            assert str(refused.value) == f"run_dir must not be in use, got {folder.path}, where a run is alive"
        finally:
            holder.kill()  # says no farewell
    assert not folder.is_running()
    with folder.locked():
        assert folder.is_running()
        with pytest.raises(ValueError, match="where a run is alive"), folder.locked():
            pass
    assert not folder.is_running()


def test_two_that_ask_whether_it_lives_are_not_taken_for_the_run(tmp_path: Path):
    folder = a_run(tmp_path / "run")
    with folder.locked():
        pass
    with (folder.path / ".lock").open("r+") as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert not folder.is_running()


def test_a_folder_that_has_got_another_run_is_refused(tmp_path: Path):
    folder = a_run(tmp_path / "run")
    with folder.locked():
        pass
    folder.write_json("run.json", {"run_id": "another", "time": 1.0})
    with pytest.raises(ValueError) as refused, folder.locked():
        pass
    assert str(refused.value) == f"run_dir must be a folder without a run, got {folder.path}, which holds one"
    assert not folder.is_running()  # the lock was let go


@pytest.mark.parametrize("status", [None, "finished", "failed", "interrupted"])
def test_a_status_is_that_of_the_last_life(status: str | None, tmp_path: Path):
    assert a_run(tmp_path / "run", status=status).status() == status


def test_the_newest_unfinished_is_the_one_that_began_last(tmp_path: Path):
    a_run(tmp_path / "inception" / "z", began=1.0)
    a_run(tmp_path / "other" / "a", began=3.0, status="interrupted")
    a_run(tmp_path / "inception" / "b", began=2.0, status="failed")
    a_run(tmp_path / "inception" / "c", began=4.0, status="finished")
    alive = a_run(tmp_path / "inception" / "d", began=5.0)
    replace_symlink(tmp_path / "latest", alive.path)
    with alive.locked():
        found = latest_unfinished(tmp_path)
        assert (found.path, found.run_id) == (tmp_path / "other" / "a", "id of a")
    assert latest_unfinished(tmp_path).path == alive.path


def test_where_no_run_is_unfinished_it_is_said(tmp_path: Path):
    told = f"there must be an unfinished run, got none below {tmp_path}; use run=FOLDER"
    with pytest.raises(ValueError) as refused:
        latest_unfinished(tmp_path)
    assert str(refused.value) == told
    a_run(tmp_path / "inception" / "a", status="finished")
    with a_run(tmp_path / "inception" / "b").locked(), pytest.raises(ValueError) as refused:
        latest_unfinished(tmp_path)
    assert str(refused.value) == told


def test_a_run_is_recorded_by_one_process_at_a_time(tmp_path: Path):
    folder, order = a_run(tmp_path / "run"), []

    def wait() -> None:
        with folder.upload_lock(wait=True):
            order.append("the one that waited")

    with folder.upload_lock(wait=False):
        with pytest.raises(ValueError) as refused, folder.upload_lock(wait=False):
            pass
        assert str(refused.value) == f"run must not be recorded by two, got {folder.path}; wait a moment"
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not folder.is_running()  # recording is no living
        order.append("the one that held")
    waiting.join(10)
    assert order == ["the one that held", "the one that waited"]
    with folder.upload_lock(wait=False):
        pass


# ------------------------------------------------------------------------------------------------------------- the disk


def test_a_link_is_replaced(tmp_path: Path):
    link = tmp_path / "runs" / "latest"
    for target in ("runs/a", "runs/deep/b", "elsewhere/c"):
        (tmp_path / target).mkdir(parents=True)
        replace_symlink(link, tmp_path / target)
        assert link.resolve() == tmp_path / target
    assert link.readlink() == Path("../elsewhere/c")
    assert names(link.parent) == ["a", "deep", "latest"]
    assert names(tmp_path / "elsewhere" / "c") == []


def test_a_link_to_what_is_gone_is_replaced_and_a_rest_of_a_killed_process_does_not_hinder(tmp_path: Path):
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / f".latest.{os.getpid()}").symlink_to("of a process that had our number")
    (tmp_path / "run").mkdir()
    replace_symlink(tmp_path / "latest", tmp_path / "run")
    assert (tmp_path / "latest").readlink() == Path("run")
    assert names(tmp_path) == ["latest", "run"]


def test_who_reads_a_file_while_it_is_written_has_the_old_content(tmp_path: Path):
    write_atomically(tmp_path / "file", "old\n")
    with (tmp_path / "file").open() as reader:
        write_atomically(tmp_path / "file", "new\n")
        assert reader.read() == "old\n"
    assert (tmp_path / "file").read_text() == "new\n"


def test_a_file_is_written_whole(tmp_path: Path):
    for content in ("grün\n", b"\0\xff", ""):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["file"]
