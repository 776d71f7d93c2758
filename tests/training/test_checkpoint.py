"""Checkpoints survive a kill, damaged files and flipped bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import (
    CONTENT,
    STATE,
    checkpoint_name,
    file_contents,
    file_names,
    logged_warnings,
    save_checkpoint,
)
from support.commands import run_command
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

# --------------------------------------------------------------------------------------------------- saving and loading


def test_loaded_checkpoint_equals_the_saved_one(tmp_path: Path):
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2)
    manager.save(checkpoint_name(1), STATE, CONTENT)
    manager.close()
    assert manager.latest_complete == checkpoint_name(1)
    checkpoint = CheckpointManager(tmp_path / "checkpoints", keep=2).load_latest()
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.metadata) == ("epoch-00001-batch-0000000", CONTENT)
    assert checkpoint.arrays.keys() == STATE.keys()
    for name, array in STATE.items():
        got = checkpoint.arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_checkpoint_has_the_files_of_the_format(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1)
    assert file_names(tmp_path) == [path.name]
    assert file_names(path) == ["arrays.npz", "manifest.json"]
    with np.load(path / "arrays.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["content"] == CONTENT | {"epoch": 1}
    assert manifest["arrays_sha256"] == hashlib.sha256((path / "arrays.npz").read_bytes()).hexdigest()


def test_checkpoint_names_sort_by_position():
    positions = list(product((0, 1, 2, 9, 10, 99, 100, 99_999), (0, 1, 9, 10, 4999, 5000, 9_999_999)))
    names = [checkpoint_name(*position) for position in positions]
    assert names == sorted(names)
    assert checkpoint_name(3, 120) == "epoch-00003-batch-0000120"


def test_latest_checkpoint_is_the_one_of_the_last_position(tmp_path: Path):
    for epoch in (10, 9, 2):
        save_checkpoint(tmp_path, epoch)
    checkpoint = CheckpointManager(tmp_path, 9).load_latest()
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.metadata["epoch"]) == (checkpoint_name(10), 10)


def test_no_checkpoint_is_found_in_an_empty_folder(tmp_path: Path):
    assert CheckpointManager(tmp_path / "not there", 2).load_latest() is None
    (tmp_path / checkpoint_name(1)).touch()  # a file is no checkpoint
    assert CheckpointManager(tmp_path, 2).load_latest() is None


def test_only_keep_checkpoints_remain(tmp_path: Path):
    manager = CheckpointManager(tmp_path, keep=2)
    left = []
    for epoch in range(1, 5):
        manager.save(checkpoint_name(epoch), STATE, CONTENT)
        manager.wait()
        left.append(file_names(tmp_path))
    manager.close()
    one, two, three, four = map(checkpoint_name, range(1, 5))
    assert left == [[one], [one, two], [two, three], [three, four]]


def test_half_pruned_checkpoint_is_ignored_and_removed_next_time(tmp_path: Path):
    """The process may die while it removes the files of an old checkpoint."""
    (save_checkpoint(tmp_path, 1) / MANIFEST).unlink()
    save_checkpoint(tmp_path, 2)
    checkpoint = CheckpointManager(tmp_path, 1).load_latest()
    assert checkpoint is not None
    assert checkpoint.name == checkpoint_name(2)
    save_checkpoint(tmp_path, 3, keep=1)
    assert file_names(tmp_path) == [checkpoint_name(3)]


def test_saving_to_an_existing_name_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = save_checkpoint(tmp_path, 1)
    before, times = file_contents(tmp_path), [(path / name).stat().st_mtime_ns for name in (ARRAYS, MANIFEST)]
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(path.name, {"other": np.zeros(3)}, {})
    manager.close()
    assert (manager.latest_complete, logged_warnings(caplog)) == (path.name, [])
    assert file_contents(tmp_path) == before
    assert [(path / name).stat().st_mtime_ns for name in (ARRAYS, MANIFEST)] == times


def test_error_that_is_not_of_the_disk_is_raised(tmp_path: Path):
    manager = CheckpointManager(tmp_path, 1)
    manager.save(checkpoint_name(1), STATE, {"what JSON does not know": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        manager.wait()
    manager.save(checkpoint_name(2), STATE, CONTENT)
    manager.close()
    assert file_names(tmp_path) == [checkpoint_name(2)]


# --------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def truncate_arrays(path: Path, _: Path) -> None:
    os.truncate(path / ARRAYS, (path / ARRAYS).stat().st_size // 2)


def flip_arrays(path: Path, _: Path) -> None:
    flip(path / ARRAYS, (path / ARRAYS).stat().st_size // 2)


def flip_counter(path: Path, _: Path) -> None:
    """40 steps become 50: still JSON, still plausible."""
    offset = (path / MANIFEST).read_bytes().index(b'"steps": 40') + len('"steps": ')
    flip(path / MANIFEST, offset)
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


OTHER_ARRAYS = "arrays.npz does not match the SHA-256 in manifest.json"
NO_FILE = "FileNotFoundError: [Errno 2] No such file or directory: '{path}/"
DAMAGES: dict[Callable[[Path, Path], None], str] = {
    truncate_arrays: OTHER_ARRAYS,
    flip_arrays: OTHER_ARRAYS,
    flip_counter: "manifest.json does not match its own SHA-256",
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
def test_damaged_checkpoint_is_replaced_by_the_previous_one(
    damage: Callable[[Path, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good, bad = save_checkpoint(tmp_path, 1), save_checkpoint(tmp_path, 2, weights=np.arange(500, dtype=np.float32))
    damage(bad, good)
    whole, rest = file_contents(good), file_contents(bad)
    manager = CheckpointManager(tmp_path, 2)
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert (checkpoint.name, manager.latest_complete, checkpoint.metadata["epoch"]) == (good.name, good.name, 1)
    assert checkpoint.arrays["scalar"] == STATE["scalar"]
    [warning] = logged_warnings(caplog)
    what = DAMAGES[damage].format(path=bad)
    assert warning.startswith(f"checkpoint {bad.name} is damaged: {what}")
    assert warning.endswith("; using the previous one")
    assert file_names(tmp_path) == [f"{QUARANTINE_PREFIX}{bad.name}", good.name]
    assert file_contents(good) == whole
    assert file_contents(tmp_path / f"{QUARANTINE_PREFIX}{bad.name}") == rest
    caplog.clear()
    again = manager.load_latest()
    assert again is not None
    assert (again.name, logged_warnings(caplog)) == (good.name, [])


def test_damaged_checkpoints_are_all_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for epoch, damage in ((1, flip_arrays), (2, no_manifest)):
        damage(save_checkpoint(tmp_path, epoch), tmp_path)
    manager = CheckpointManager(tmp_path, 2)
    assert manager.load_latest() is None
    assert [warning.split()[1] for warning in logged_warnings(caplog)] == [checkpoint_name(2), checkpoint_name(1)]
    assert file_names(tmp_path) == [
        f"{QUARANTINE_PREFIX}{checkpoint_name(1)}",
        f"{QUARANTINE_PREFIX}{checkpoint_name(2)}",
    ]
    save_checkpoint(tmp_path, 1)
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert checkpoint.name == checkpoint_name(1)


def test_checkpoint_of_the_same_name_can_be_quarantined_twice(tmp_path: Path):
    for damage in (no_manifest, no_arrays):
        damage(save_checkpoint(tmp_path, 1), tmp_path)
        assert CheckpointManager(tmp_path, 2).load_latest() is None
    assert file_names(tmp_path) == [f"{QUARANTINE_PREFIX}{checkpoint_name(1)}"]
    assert file_names(tmp_path / f"{QUARANTINE_PREFIX}{checkpoint_name(1)}") == [MANIFEST]


def test_every_flipped_bit_is_detected(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1)
    chance = random.Random(0)
    for number in range(200):
        file = path / (ARRAYS, MANIFEST)[number % 2]
        offset, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, offset, bit)
        with pytest.raises(CorruptCheckpointError):
            read_checkpoint(path)
        flip(file, offset, bit)
    assert read_checkpoint(path).metadata == CONTENT | {"epoch": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("one"), 1)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_bytes_are_rejected_or_harmless(one: Path, data: st.DataObject):
    """Any slice may be removed or overwritten. Some damage is harmless: a newline of the manifest becomes a space."""
    file = one / data.draw(st.sampled_from((ARRAYS, MANIFEST)))
    whole = file.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    try:
        file.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:])
        same = file.read_bytes() == whole
        try:
            checkpoint = read_checkpoint(one)
        except CorruptCheckpointError:
            assert not same
        else:
            assert checkpoint.metadata == CONTENT | {"epoch": 1}
            assert {name: checkpoint.arrays[name].tobytes() for name in STATE} == {
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
except PermissionError as error:
    print(error.filename)
"""


def test_checkpoint_without_read_permission_is_not_quarantined(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1)
    tmp_path.chmod(0o777)
    (path / MANIFEST).chmod(0)
    done = run_command(sys.executable, "-c", READ_AS_NOBODY, str(tmp_path))
    assert (done.code, done.out) == (0, f"{path.name}/{MANIFEST}\n"), done.err
    assert file_names(tmp_path) == [path.name]


# -------------------------------------------------------------------------------------------------- killed while saving


SAVE = """
import sys
from pathlib import Path
import numpy as np
from train.training.checkpoint import CheckpointManager
manager = CheckpointManager(Path(sys.argv[1]), keep=1)
manager.save(sys.argv[2], {"weights": np.arange(5000, dtype=np.float32)}, {"epoch": 2})
manager.close()
assert not {"tensorflow", "keras", "mlflow"} & set(sys.modules)
"""
OLD, NEW = checkpoint_name(1), checkpoint_name(2)
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
def test_kill_at_any_stage_leaves_the_old_or_the_new_checkpoint(
    stage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save_checkpoint(tmp_path, 1)
    done = run_command(sys.executable, "-c", SAVE, str(tmp_path), NEW, env={"INCEPTION_FAULT": f"{stage}:1"})
    assert (done.code, done.err) == (-signal.SIGKILL, "")
    assert file_names(tmp_path) == STAGES[stage]
    manager = CheckpointManager(tmp_path, keep=1)
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    if NEW in STAGES[stage]:
        assert (checkpoint.name, checkpoint.metadata) == (NEW, {"epoch": 2})
        assert checkpoint.arrays["weights"].tobytes() == np.arange(5000, dtype=np.float32).tobytes()
    else:
        assert (checkpoint.name, checkpoint.metadata) == (OLD, CONTENT | {"epoch": 1})
        assert {name: array.tobytes() for name, array in checkpoint.arrays.items()} == {
            name: array.tobytes() for name, array in STATE.items()
        }
    assert logged_warnings(caplog) == []
    save_checkpoint(tmp_path, 3, keep=1)
    assert file_names(tmp_path) == [checkpoint_name(3)]
    checkpoint = manager.load_latest()
    assert checkpoint is not None
    assert checkpoint.metadata["epoch"] == 3


def test_save_completes_without_a_fault_injection(tmp_path: Path):
    save_checkpoint(tmp_path, 1)
    done = run_command(sys.executable, "-c", SAVE, str(tmp_path), NEW, env={"INCEPTION_FAULT": "save/done:2"})
    assert (done.code, done.err) == (0, "")
    assert file_names(tmp_path) == [NEW]


# ---------------------------------------------------------------------------------------------------- checkpoint policy


def test_policy_saves_every_epoch_by_default():
    interval = CheckpointPolicy()
    assert [interval.should_save(epoch, 10 * epoch, epoch_end=True) for epoch in (1, 2, 3)] == [True] * 3
    assert not any(interval.should_save(1, step, epoch_end=False) for step in range(11, 20))


def test_policy_saves_every_n_epochs():
    interval = CheckpointPolicy(every_epochs=3)
    assert [epoch for epoch in range(1, 10) if interval.should_save(epoch, 10 * epoch, epoch_end=True)] == [3, 6, 9]
    assert not interval.should_save(3, 35, epoch_end=False)


def test_policy_saves_every_n_steps():
    interval = CheckpointPolicy(every_steps=4)
    due = [step for step in range(1, 13) if interval.should_save(step // 6, step, epoch_end=step % 6 == 0)]
    assert due == [4, 8, 12]


def test_policy_saves_every_n_minutes():
    interval = CheckpointPolicy(every_minutes=0.4 / 60)
    time.sleep(0.05)
    assert not interval.should_save(0, 1, epoch_end=False)
    assert not interval.should_save(1, 2, epoch_end=True)
    time.sleep(0.4)
    assert [interval.should_save(1, step, epoch_end=False) for step in (3, 4)] == [True, False]


def test_preemption_checkpoints_are_no_rollback_targets_and_evict_no_periodic_one(tmp_path: Path):
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
