"""The folder of a sweep: its identity, its trials, and its lock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from support.commands import message, run_train
from support.sweeps import make_sweep, trial_record
from train.config.serialization import quote_value
from train.sweep import trials


def test_override_order_and_execution_settings_do_not_change_the_sweep(tmp_path: Path):
    first = trials.create_sweep(tmp_path, ["seed=0,1", "epochs=2", "sweep.parallel=2"], None, {}, [trial_record(0)])
    same = trials.find_sweep(tmp_path, ["epochs=2", "seed=0,1", "tracking.uri=x", "sweep.minutes=1"], None, fresh=False)
    assert same is not None
    assert same.path == first.path
    assert trials.find_sweep(tmp_path, ["epochs=2", "seed=0,1"], None, fresh=True) is None
    assert trials.find_sweep(tmp_path, ["epochs=2", "seed=0,2"], None, fresh=False) is None


def test_trials_are_sorted_by_number(tmp_path: Path):
    folder = make_sweep(tmp_path, 2)
    folder.add(1000, **trial_record(1000))
    folder.add(999, **trial_record(999))
    assert [trial.number for trial in folder.trials] == [0, 1, 999, 1000]


def test_run_dir_of_another_sweep_is_rejected(tmp_path: Path):
    make_sweep(tmp_path, 1)
    path = str(tmp_path / "sweep")
    assert message(trials.find_sweep, tmp_path, ["seed=5,6"], path, fresh=False) == (
        f"run_dir {path} already holds another sweep (seed=0,1); use another run_dir"
    )
    assert message(trials.find_sweep, tmp_path, ["seed=0,1"], path, fresh=True) == (
        f"run_dir {path} already holds a sweep; use another run_dir for a fresh one"
    )


def test_sweep_of_an_older_version_is_not_continued(tmp_path: Path):
    folder = make_sweep(tmp_path, 1)
    manifest = {name: value for name, value in folder.manifest.items() if name != "format_version"}
    (folder.path / "sweep.json").write_text(json.dumps(manifest))
    assert message(trials.find_sweep, tmp_path, ["seed=0,1"], str(folder.path), fresh=False) == (
        f"cannot continue sweep {folder.path}: it was written by an older version "
        "(run format 1, this version continues format 2); start a new one with sweep.fresh=true, without its run_dir"
    )


def test_sweep_killed_during_creation_is_created_again(tmp_path: Path):
    (tmp_path / "sweep/trials").mkdir(parents=True)
    (tmp_path / "sweep/trials/001.json").write_text("{}")
    assert [trial.number for trial in make_sweep(tmp_path, 1).trials] == [0]


@pytest.mark.parametrize("text", ["/a b/c,d={x}$y", "it's", "back\\slash", "tail\\'q", "end\\", "end\\\\", "[a"])
def test_trial_path_survives_quoting(text: str):
    assert OverridesParser.create().parse_override(f"sweep.trial={quote_value(text)}").value() == text


def test_invalid_trial_file_is_rejected(tmp_path: Path):
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        done = run_train(f"sweep.trial={path}")
        assert (done.code, done.out) == (2, "")
        expected = f"error: sweep.trial must be the file of a trial, got {path}; use e.g. SWEEP/trials/000.json\n"
        assert done.err == expected


def test_second_launcher_of_a_running_sweep_is_rejected(tmp_path: Path):
    folder = make_sweep(tmp_path, 1)
    expected = f"sweep {folder.path} is already running in another process; wait for it or stop it first"
    with folder.locked():
        assert message(lambda: folder.locked().__enter__()) == expected


def test_last_override_of_a_key_counts():
    assert trials.identifying_overrides(["epochs=2", "seed=0,1", "epochs=3", "run_dir=x"]) == ["epochs=3", "seed=0,1"]
