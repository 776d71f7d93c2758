"""Sweeps: what the words mean, which trials there are and in which order, and one that is killed and goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from support.commands import ROOT, Done, message, run_command, run_train
from support.shared import once
from train.config.composition import quote_value
from train.config.schema import Config, Sweep
from train.sweep import run, search, search_space, trials, workers
from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial
from train.sweep.workers import SweepSignalHandler, TrialResult, WorkerPool, classify_exit

# ------------------------------------------------------------------------------------------------------- the words


def axes_of(*words: str) -> list[Axis]:
    return search_space.parse_axes(words, None)[1]


def test_words_become_axes():
    common, axes = search_space.parse_axes(
        [
            "epochs=3", "model=vgg16,inception_v3", "seed=range(1,4)", "batch_size=choice(16,32)",
            "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", "model.width=interval(0.1,1)",
            "model.blocks=[conv,conv],[conv_bn,conv_bn]", "optimizer.nesterov=true,false", "data.root='a b','c,d'",
        ],
        None,
    )  # fmt: skip
    assert common == ["epochs=3"]
    assert {axis.key: axis.values for axis in axes if not axis.is_range} == {
        "model": ("vgg16", "inception_v3"), "seed": (1, 2, 3), "batch_size": (16, 32),
        "model.blocks": (["conv", "conv"], ["conv_bn", "conv_bn"]), "optimizer.nesterov": (True, False),
        "data.root": ("a b", "c,d"),
    }  # fmt: skip
    assert {axis.key: (axis.low, axis.high, axis.log) for axis in axes if axis.is_range} == {
        "optimizer.learning_rate": (1e-4, 0.1, True), "model.width": (0.1, 1.0, False),
    }  # fmt: skip
    assert [axis.key for axis in axes if axis.is_config_group] == ["model"]
    assert search_space.config_group_choices(axes) == [["model=vgg16"], ["model=inception_v3"]]


def test_the_last_axis_turns_fastest():
    found = list(search_space.grid_points(axes_of("model=vgg16,inception_v3", "seed=0,1")))
    assert [(point["model"], point["seed"]) for point in found] == [
        ("vgg16", 0), ("vgg16", 1), ("inception_v3", 0), ("inception_v3", 1),
    ]  # fmt: skip


def test_corners_have_every_value_and_both_ends():
    axes = axes_of("model=vgg16,inception_v3", "batch_size=8,16,32", "model.width=interval(0.1,1)")
    found = list(search_space.boundary_points(axes))
    assert len(found) == 6
    for model in ("vgg16", "inception_v3"):
        ours = [point for point in found if point["model"] == model]
        assert {point["batch_size"] for point in ours} == {8, 16, 32}
        assert {point["model.width"] for point in ours} == {0.1, 1.0}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "model.width=interval(1,0.5)",
            "model.width must be a range from low to high, got model.width=interval(1,0.5); use e.g. "
            "model.width=interval(0.1,1)",
        ),
        (
            "model.width=tag(log,interval(0,1))",
            "model.width must be a range from low to high, above 0, got model.width=tag(log,interval(0,1)); use e.g. "
            "model.width=interval(0.1,1)",
        ),
    ],
)
def test_a_range_that_is_none_is_refused(word: str, told: str):
    assert message(axes_of, word) == told


SMALL = ("model=vgg16", "model.width=0.1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["epochz=1,2"], "epochz is no key; did you mean epochs?"),
        (["epochs=1,0"], "epochs must be at least 1, got 0; use e.g. epochs=12"),
        (["epochs=1,two"], "epochs must be a whole number, got two; use e.g. epochs=12"),
        (["model=vgg16,vgg"], "model must be one of "),
        (["model=vgg16,inception_v3", "data.image_size=32"], "data.image_size must be at least 75 for inception_v3"),
        (["epochs=1"], "a sweep must have something to try, got one value for every key; use e.g. seed=0,1,2"),
        (["seed=range(10000)"], "a sweep must have at most sweep.most=200 trials, got 10,000; use sweep.most=10000 if"),
        (["seed=0,1", "sweep.seeds=2"], "sweep.seeds must be 1 where seed has several values, got 2; use one of them"),
        (["model.width=interval(0.1,1)"], "model.width must be a list of values for sweep.search=grid, got a range;"),
        (["model.width=interval(0.1,9)", "sweep.search=tpe"], "model.width must be above 0 and at most 4, got 9"),
        (["batch_size=interval(1.5,8)", "sweep.search=random"], "batch_size must be a whole number, got 1.5"),
        (["epochs=4,8", "sweep.search=asha"], "epochs must be one number with sweep.search=asha, got several"),
        (["seed=0,1", "sweep.parallel=0"], "sweep.parallel must be at least 1, got 0"),
        (["model.weights=null,/no/such.h5"], "model.weights must be a file, got /no/such.h5, which is none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_all_trials_are_checked_before_the_first_one(words: list[str], told: str, tmp_path: Path):
    done = run_train("-m", *words, f"run_dir={tmp_path / 'sweep'}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {told}")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_same_trial_twice_is_run_once():
    done = run_train("-m", *SMALL, "seed=0,1,0", "sweep.dry_run=true")
    assert done.out == "given twice, run once: seed=0\n1: seed=0\n2: seed=1\nthe config is valid\n"


def test_a_space_from_a_file_and_what_is_typed_before_it():
    done = run_train("-m", "sweep=rates", "sweep.search=random", "epochs=3", "sweep.dry_run=true")
    assert (done.code, done.out) == (0, "the config is valid\n")  # a search has no trials beforehand
    done = run_train(
        "-m", "sweep=rates", "optimizer.learning_rate=0.1,0.01", "label_smoothing=0.1", "sweep.dry_run=true"
    )
    assert done.out.splitlines() == [
        f"{number}: optimizer.learning_rate={rate} schedule.warmup_epochs={epochs}"
        for number, (rate, epochs) in enumerate(((r, e) for r in (0.1, 0.01) for e in (0, 1, 2)), 1)
    ] + ["the config is valid"]


def test_the_spaces_of_conf_can_be_run():
    done = run_train("-m", "sweep=blocks", "sweep.dry_run=true")
    assert done.out.count("\n") == 16
    assert "15: model.blocks=[conv_bn,conv_bn,inception_v3,conv_bn,inception_v3] seed=2\n" in done.out


# ------------------------------------------------------------------------------------------------------- the folder


def frozen(number: int, **content: Any) -> dict[str, Any]:
    config = {"epochs": 9, "batch_size": 32} | content
    return {"label": f"n={number}", "key": str(number), "values": {"n": number}, "config": config, "point": number}


def made(place: Path, number: int, words: tuple[str, ...] = ("seed=0,1",), **content: Any) -> SweepDir:
    return trials.create_sweep(
        place, list(words), str(place / "sweep"), content, [frozen(found) for found in range(number)]
    )


def test_another_order_and_another_way_of_running_is_the_same_sweep(tmp_path: Path):
    first = trials.create_sweep(tmp_path, ["seed=0,1", "epochs=2", "sweep.parallel=2"], None, {}, [frozen(0)])
    found = trials.find_sweep(
        tmp_path, ["epochs=2", "seed=0,1", "tracking.uri=x", "sweep.minutes=1"], None, fresh=False
    )
    assert found is not None
    assert found.path == first.path
    assert trials.find_sweep(tmp_path, ["epochs=2", "seed=0,1"], None, fresh=True) is None
    assert trials.find_sweep(tmp_path, ["epochs=2", "seed=0,2"], None, fresh=False) is None


def test_trials_come_by_number_however_many_there_are(tmp_path: Path):
    folder = made(tmp_path, 2)
    folder.add(1000, **frozen(1000))
    folder.add(999, **frozen(999))
    assert [trial.number for trial in folder.trials] == [0, 1, 999, 1000]


def test_half_the_batch_is_another_run_of_the_trial(tmp_path: Path):
    folder = made(tmp_path, 1)
    [trial] = folder.trials
    half = run.with_half_batch(folder, trial)
    quarter = run.with_half_batch(folder, half)
    assert [found.config["batch_size"] for found in (trial, half, quarter)] == [32, 16, 8]
    assert [found.folder.name for found in (trial, half, quarter)] == ["000", "000-batch16", "000-batch8"]
    assert folder.trials == [quarter]


def test_the_folder_of_another_sweep_is_refused(tmp_path: Path):
    made(tmp_path, 1)
    place = str(tmp_path / "sweep")
    assert message(trials.find_sweep, tmp_path, ["seed=5,6"], place, fresh=False) == (
        f"run_dir must be a folder without a sweep, got {place}, of seed=0,1; use another run_dir"
    )
    assert message(trials.find_sweep, tmp_path, ["seed=0,1"], place, fresh=True) == (
        f"run_dir must be a folder without a sweep, got {place}, which is there; use another run_dir"
    )


def test_a_sweep_that_was_killed_while_it_was_made_is_made_anew(tmp_path: Path):
    (tmp_path / "sweep/trials").mkdir(parents=True)
    (tmp_path / "sweep/trials/001.json").write_text("{}")
    assert [trial.number for trial in made(tmp_path, 1).trials] == [0]


@pytest.mark.parametrize("text", ["/a b/c,d={x}$y", "it's", "back\\slash", "tail\\'q", "[a"])
def test_any_path_can_be_told_to_a_trial(text: str):
    assert OverridesParser.create().parse_override(f"sweep.trial={quote_value(text)}").value() == text


def test_what_is_no_trial_is_refused(tmp_path: Path):
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        done = run_train(f"sweep.trial={path}")
        assert (done.code, done.out) == (2, "")
        assert done.err == f"error: sweep.trial must be a trial's file, got {path}; use e.g. SWEEP/trials/000.json\n"


def uploaders(sweep: Path) -> list[int]:
    """Processes that complete the MLflow records of a sweep."""
    found = subprocess.run(["pgrep", "-f", f"train.tracking.uploader {sweep}/"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.splitlines()]


@pytest.mark.slow
def test_a_password_in_the_address_is_nowhere(tmp_path: Path):
    """It goes to the trials all the same: they would not get that far without an address that is one."""
    path = tmp_path / "sweep"
    words = [*SMALL, "epochs=1", "steps_per_epoch=1", "seed=0,1", "sweep.parallel=2", "tracking.wait_seconds=0",
             "evaluate.test=false", "tracking.log_model=false"]  # fmt: skip
    done = run_train("-m", *words, "tracking.uri='http://me:hunter2@127.0.0.1:9'", f"run_dir={path}")
    for process in uploaders(path):  # they would try for ever
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    assert done.code == 0, done.err
    for file in path.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert "http://127.0.0.1:9" in (path / "000/config.yaml").read_text()


def test_two_launchers_of_one_sweep_are_one_too_many(tmp_path: Path):
    folder = made(tmp_path, 1)
    told = f"a sweep must not be run twice at once, got {folder.path}, where one is alive"
    with folder.locked():
        assert message(lambda: folder.locked().__enter__()) == told


# -------------------------------------------------------------------------------------------------------- the plans


def trained(trial: Trial, epochs: int, accuracy: float, status: str | None = None) -> None:
    """What a run of that trial leaves when it has come so far."""
    trial.folder.mkdir(exist_ok=True)
    (trial.folder / "run.json").write_text(json.dumps({"run_id": str(trial.number), "log_model": False}))
    lines = [
        {"epoch": epoch, "step": epoch + 1, "time": 0.0, "values": {"validation/accuracy": accuracy}}
        for epoch in range(epochs)
    ]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = status or ("finished" if epochs == trial.total_epochs() else "interrupted")
    summary = {"status": status, "validation": {"accuracy": accuracy}}
    (trial.folder / "summary.json").write_text(json.dumps(summary))


def test_a_grid_keeps_what_has_finished_and_tries_again_what_has_failed(tmp_path: Path):
    folder = made(tmp_path, 4)
    trained(folder.trials[0], 9, 0.5)
    trained(folder.trials[1], 3, 0.5)
    trained(folder.trials[2], 3, 0.5, "failed")
    plan = search.GridSearch(folder)
    assert [trial.number for trial in iter(plan.next_trial, None)] == [1, 2, 3]
    assert plan.expected == 4


def point_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    number = values["n"]
    content = frozen(number)
    del content["point"]
    return [content | {"label": f"n={number:.3f}", "key": repr(number), "values": values}]


def searched(tmp_path: Path, axis: Axis, **settings: Any) -> tuple[SweepDir, Any]:
    """A sweep's folder, and how to make its plan, as a launcher does that is started again."""
    folder = made(tmp_path, 0, axes=[vars(axis)], seed=0, epochs=9)
    return folder, partial(
        search.create_algorithm, folder, Sweep(**settings), point_of, f"sqlite:///{tmp_path / 'optuna.db'}"
    )


def worth(trial: Trial) -> float:
    return 1 - abs(trial.values["n"] - 0.7)


LINE = Axis("n", low=0.0, high=1.0)


def drive(plan: search.SearchAlgorithm, turns: int = 1000) -> list[tuple[int, int]]:
    """Does what a launcher does, one trial at a time: (trial, until which epoch)."""
    done = []
    while len(done) < turns and (trial := plan.next_trial()):
        until = int(trial.overrides[0].partition("=")[2]) if trial.overrides else trial.total_epochs()
        trained(trial, until, worth(trial))
        done.append((trial.number, until))
        plan.on_trial_end(trial)
    return done


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_search_goes_on_where_it_was(kind: str, tmp_path: Path):
    folder, plan = searched(tmp_path, LINE, search=kind, trials=12)
    assert len(drive(plan(), turns=5)) == 5
    abandoned = plan().next_trial()  # frozen, and its launcher dies
    assert abandoned is not None
    assert abandoned.number == 5
    assert [number for number, _ in drive(plan())] == [5, 6, 7, 8, 9, 10, 11]
    assert drive(plan()) == []
    assert len({trial.values["n"] for trial in folder.trials}) == 12

    import optuna

    study = optuna.load_study(study_name=folder.manifest["sweep_id"], storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    assert study.best_value == max(map(worth, folder.trials))


def test_tpe_looks_where_good_ones_have_been(tmp_path: Path):
    folder, plan = searched(tmp_path, LINE, search="tpe", trials=30)
    drive(plan())
    late = [worth(trial) for trial in folder.trials[15:]]
    assert sum(late) / len(late) > 0.85  # at random: 0.71


def test_a_launcher_that_died_between_asking_and_freezing_leaves_no_hole(tmp_path: Path):
    folder, plan = searched(tmp_path, LINE, search="random", trials=3)
    first = plan()
    first._study.ask({"n": search.to_distribution(LINE)})
    assert len(drive(plan())) == 3
    assert [trial.number for trial in folder.trials] == [0, 1, 2]


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path, capsys: pytest.CaptureFixture):
    axis = Axis("n", values=(0.1, 0.2, 0.7), words=("0.1", "0.2", "0.7"))
    _, plan = searched(tmp_path, axis, search="random", trials=50)
    assert len(drive(plan())) == 3
    assert capsys.readouterr().out == "no more than 3 points are found that differ, of the 50 wanted\n"


def test_a_failed_point_has_no_value(tmp_path: Path):
    _, plan = searched(tmp_path, LINE, search="tpe", trials=4)
    now = plan()
    trial = now.next_trial()
    trained(trial, 2, 0.9, "failed")
    now.on_trial_end(trial)
    drive(now)
    assert [found.state.name for found in now._study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_epochs_of_the_comparisons():
    assert search.rungs(Sweep(), 27) == [1, 3, 9, 27]
    assert search.rungs(Sweep(), 20) == [1, 3, 9, 20]
    assert search.rungs(Sweep(first_epochs=2, reduction=2), 12) == [2, 4, 8, 12]
    assert search.rungs(Sweep(first_epochs=5), 3) == [3]


def test_asha_goes_on_with_the_best_third(tmp_path: Path):
    folder, plan = searched(tmp_path, LINE, search="asha", trials=9)
    done = drive(plan())
    come = dict(done)
    assert [number for number, until in done if until == 1] == list(range(9))
    by_worth = sorted(folder.trials, key=worth, reverse=True)
    assert max(come.values()) == 9  # one is finished, and it is the best
    assert [number for number, until in come.items() if until == 9] == [by_worth[0].number]
    assert {number for number, until in come.items() if until >= 3} >= {trial.number for trial in by_worth[:3]}
    for number in come:  # no comparison is left out, none is done twice
        untils = [until for found, until in done if found == number]
        assert untils == [1, 3, 9][: len(untils)]
    left = plan().abandoned()
    assert sorted(trial.number for trial in left) == sorted(number for number, until in come.items() if until < 9)


def test_asha_goes_on_after_a_death(tmp_path: Path):
    _, plan = searched(tmp_path / "a", LINE, search="asha", trials=9)
    _, other = searched(tmp_path / "b", LINE, search="asha", trials=9)
    whole = drive(plan())
    pieces = []
    while found := drive(other(), turns=2):
        pieces += found
    assert pieces == whole


def test_asha_waits_for_what_it_compares(tmp_path: Path):
    _, plan = searched(tmp_path, LINE, search="asha", trials=3)
    now = plan()
    first, second, third = (now.next_trial() for _ in range(3))
    assert now.next_trial() is None
    for trial in (first, second):
        trained(trial, 1, worth(trial))
        now.on_trial_end(trial)
        assert now.next_trial() is None
    trained(third, 1, worth(third))
    now.on_trial_end(third)
    best = max((first, second, third), key=worth)
    following = now.next_trial()
    assert (following.number, following.words) == (best.number, ("sweep.until=3",))


def test_a_trial_between_two_comparisons_comes_first(tmp_path: Path):
    folder, plan = searched(tmp_path, LINE, search="asha", trials=9)
    drive(plan(), turns=4)
    trial = folder.trials[2]
    trained(trial, 2, worth(trial))
    following = plan().next_trial()
    assert (following.number, following.words) == (2, ("sweep.until=3",))


# --------------------------------------------------------------------------------------------------- the processes


def test_what_exit_codes_mean(tmp_path: Path):
    trial = made(tmp_path, 1).trials[0]
    trial.folder.mkdir()
    output = trial.folder / "output.txt"
    output.write_text("a line\nerror: seed must be 0\nanother\n")
    assert classify_exit(0, "", trial, 5.0) == TrialResult(0)
    assert classify_exit(2, "", trial, 5.0) == TrialResult(2, "seed must be 0")
    assert classify_exit(-9, "", trial, 5.0) == TrialResult(
        -9, "ended by SIGKILL", is_retryable=True, is_out_of_memory=True
    )
    assert classify_exit(-11, "", trial, 5.0) == TrialResult(-11, "ended by SIGSEGV", is_retryable=True)
    assert classify_exit(143, "", trial, 5.0) == TrialResult(143, "stopped by somebody else", is_retryable=True)
    assert classify_exit(143, workers.TIMEOUT_REASON, trial, 5.0) == TrialResult(143, workers.TIMEOUT_REASON)
    output.write_text("error: ResourceExhaustedError; the whole story is in train.log\n")
    assert classify_exit(1, "", trial, 5.0) == TrialResult(
        1, "ResourceExhaustedError; the whole story is in train.log", is_retryable=True, is_out_of_memory=True
    )
    output.write_text("")
    assert classify_exit(1, "", trial, 5.0).reason == "exit code 1"
    for time_, found in (
        (4.0, TrialResult(143, workers.TIMEOUT_REASON)),
        (6.0, TrialResult(0)),
    ):  # of this start, or of one before
        (trial.folder / "run.json").write_text(json.dumps({"run_id": "x"}))
        (trial.folder / "summary.json").write_text(json.dumps({"status": "finished", "time": time_}))
        assert classify_exit(143, workers.TIMEOUT_REASON, trial, 5.0) == found


def alone(folder: SweepDir, **settings: Any) -> run.SweepSession:
    """A sweep as its launcher has it in hand."""
    life = run.SweepSession(folder, Config(sweep=Sweep(**settings)), None, SweepSignalHandler())
    life.algorithm = search.GridSearch(folder)
    return life


KILLED = TrialResult(-9, "ended by SIGKILL", is_retryable=True, is_out_of_memory=True)
WRONG = TrialResult(1, "no such file")


def test_what_was_killed_goes_on_again_and_what_is_wrong_does_not(tmp_path: Path):
    folder = made(tmp_path, 2)
    first, second = folder.trials
    life = alone(folder, retries=2)
    for _ in range(2):
        assert run.handle_result(life, first, KILLED)
        assert run.next_trial(life) == first  # before what has not begun
    assert run.handle_result(life, first, KILLED)
    assert run.handle_result(life, second, WRONG)
    assert life.retry_queue == []
    assert [(trial.number, why) for trial, why in life.failures.values()] == [(0, KILLED.reason), (1, WRONG.reason)]


def test_half_the_batch_only_where_that_was_asked_for(tmp_path: Path):
    folder = made(tmp_path, 1)
    for asked, size in ((False, 32), (True, 16)):
        life = alone(folder, halve_batch=asked)
        run.handle_result(life, folder.trials[0], KILLED)
        [again] = life.retry_queue
        assert again.config["batch_size"] == size


def test_the_first_failure_stops_a_sweep_that_wants_it(tmp_path: Path):
    folder = made(tmp_path, 2)
    assert run.handle_result(alone(folder), folder.trials[0], WRONG)
    life = alone(folder, fail_fast=True)
    assert not run.handle_result(life, folder.trials[0], WRONG)
    trained(folder.trials[1], 9, 0.5)
    run.finalize_best(life, run.find_best_trials(life), pytest.fail)  # nothing more is begun


def crowned(folder: SweepDir, capsys: pytest.CaptureFixture, *failed: Trial) -> tuple[list[int], str]:
    """The trials that get what only the best gets, and what is said of it."""
    life = alone(folder)
    life.failures = {trial.number: (trial, "x") for trial in failed}
    run.finalize_best(life, run.find_best_trials(life), lambda _: None)
    return [trial.number for trial in life.retry_queue], capsys.readouterr().out


def test_the_best_is_tested_when_no_failed_trial_may_be_better(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = made(tmp_path, 3, identity=["seed=0,1"])
    first, second, third = folder.trials
    for trial, accuracy in ((first, 0.5), (second, 0.4)):
        trained(trial, 9, accuracy)
    trained(third, 3, 0.9, "failed")
    assert crowned(folder, capsys, third) == (
        [],
        "the best trial is not tested yet, since failed ones (1) may still beat it; run the same command again, or "
        f"test it now: make resume run={first.folder} "
        "evaluate.test=true evaluate.report=true tracking.log_model=true\n",
    )
    summary = json.loads((third.folder / "summary.json").read_text())
    (third.folder / "summary.json").write_text(json.dumps(summary | {"config_error": True}))
    assert crowned(folder, capsys, third) == ([0], "the best: n=0\n")  # it would fail again
    assert crowned(folder, capsys) == ([0], "the best: n=0\n")


def test_a_second_trial_is_not_tested(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = made(tmp_path, 2, identity=["seed=0,1"])
    first, second = folder.trials
    trained(first, 9, 0.5)
    summary = json.loads((first.folder / "summary.json").read_text())
    (first.folder / "summary.json").write_text(json.dumps(summary | {"test": {"accuracy": 0.5}}))
    trained(second, 9, 0.6)
    said = "the best trial is not tested: the test split was already used for n=0\n"
    assert crowned(folder, capsys) == ([], said)


def test_of_words_with_one_key_the_last_one_counts():
    assert trials.identifying_overrides(["epochs=2", "seed=0,1", "epochs=3", "run_dir=x"]) == ["epochs=3", "seed=0,1"]


ORPHAN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""


def runs(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty of one that has ended and waits to be noted
    except OSError:
        return False


@pytest.mark.parametrize("heeds", [True, False])
def test_it_is_the_signal_that_ends_trials_with_their_launcher(heeds: bool):
    """Without asking for it a process lives on."""
    code = "from train.sweep.workers import die_with_parent; import os, time; "
    code += (
        f"{'die_with_parent(os.getppid())' if heeds else 'die_with_parent'}; print('asked', flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN, code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    child = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "asked\n"
    launcher.kill()
    launcher.wait()
    try:
        assert eventually(lambda: not runs(child), 60 if heeds else 1) == heeds
    finally:
        launcher.stdout.close()
        if not heeds:
            os.kill(child, signal.SIGKILL)


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    assert [slot.cores for slot in WorkerPool(2).workers] == [(0, 1), (2, 3)]
    assert [slot.cores for slot in WorkerPool(1).workers] == [(0, 1, 2, 3, 6)]
    assert [slot.cores for slot in WorkerPool(6).workers] == [(0,), (1,), (2,), (3,), (6,), (0,)]


def test_every_trial_has_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(workers, "GPU_DRIVER_DIR", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus() == ("0", "1")
    for named, found in (("3,5", ("3", "5")), ("-1", ()), ("", ()), ("GPU-8a", ("GPU-8a",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert workers.visible_gpus() == found
    assert [slot.gpu for slot in WorkerPool(3, gpus=("3", "5")).workers] == ["3", "5", "3"]
    assert [slot.gpu for slot in WorkerPool(2).workers] == [None, None]


@pytest.mark.slow
def test_a_gpu_is_shared_by_a_stated_limit_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = ["-m", "seed=0,1,2", "sweep.parallel=3", "sweep.dry_run=true"]
    assert run_train(*words).err == (
        "error: sweep.parallel must be at most the number of GPUs, 2, got 3; "
        "use gpu_memory=MIB to let several trials share one\n"
    )
    for fine in ("gpu_memory=20000", "device=cpu", "sweep.parallel=2"):
        assert run_train(*words, fine).code == 0


# --------------------------------------------------------------------------------------- one that is killed and goes on

WORDS = [
    "model=vgg16", "model.width=0.1", "epochs=3", "steps_per_epoch=4", "batch_size=8", "checkpoint.every_steps=2",
    "gradient_accumulation=1,2,13", "precision=float32", "evaluate.report=false", "sweep.parallel=2",
]  # fmt: skip


@dataclass
class Swept:
    """A sweep that has ended. left: trials that lived on after their launcher was killed, where it was."""

    path: Path
    uri: str
    done: Done
    left: list[str] | None = None


def alive(folder: Path) -> list[str]:
    """Trials whose process lives."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().split("\0")
        except OSError:
            continue
        found += [word for word in words if word.startswith(f"sweep.trial='{folder}/")]
    return found


def eventually(reached: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(reached())


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return once(tmp_path_factory, "swept", sweep)


@pytest.fixture(scope="session")
def swept_twice(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return once(tmp_path_factory, "swept twice", sweep_twice)


def sweep(place: Path) -> Swept:
    path, uri = place / "sweep", f"sqlite:///{place / 'mlflow.db'}"
    words = [*WORDS, f"run_dir={path}", "tracking.uri=${oc.env:INCEPTION_TEST_STORE}"]
    return Swept(path, uri, run_command("make", "sweep", *words, env={"INCEPTION_TEST_STORE": uri}))


def sweep_twice(place: Path) -> Swept:
    """Its launcher is killed, and the same command goes on."""
    path = place / "sweep"
    words = [*WORDS, f"run_dir={path}", f"tracking.uri=sqlite:///{place / 'mlflow.db'}"]
    with (place / "output.txt").open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "train", "-m", *words], cwd=ROOT, stdout=output, stderr=output
        )
    assert eventually(lambda: list(path.glob("*/checkpoints/*")), 300), (place / "output.txt").read_text()
    launcher.kill()
    launcher.wait()
    eventually(lambda: not alive(path), 60)
    left = alive(path)
    found = sweep(place)
    found.left = left
    return found


@pytest.mark.slow
def test_trials_do_not_outlive_their_launcher(swept_twice: Swept):
    assert swept_twice.left == []


@pytest.mark.slow
def test_the_second_start_goes_on(swept_twice: Swept):
    told = f"going on with a sweep as it was begun, whatever conf/ says now: {swept_twice.path}\n"
    assert swept_twice.done.out.startswith(told)
    tells_what_came_of_it(swept_twice, swept_twice.done.out.removeprefix(told))
    has_every_run_once(swept_twice)


def test_a_sweep_tells_what_came_of_it(swept: Swept):
    tells_what_came_of_it(swept, swept.done.out)


def tells_what_came_of_it(swept: Swept, told: str) -> None:
    assert swept.done.code != 0
    lines = told.splitlines()
    assert lines[0].startswith("sweep: 3 trials, 2 at a time, each on ")
    failed = [line for line in lines if line.startswith("failed: ")]
    assert failed == [
        "failed: gradient_accumulation=13: gradient_accumulation must be at most the run's 12 steps, got 13; use e.g. "
        f"gradient_accumulation=1 ({swept.path}/002/output.txt)"
    ]
    [best] = [line for line in lines if line.startswith("best: ")]
    assert " test accuracy 0." in best
    assert re.fullmatch(rf"sweep: 2 finished, 1 failed, \d+ MiB  {swept.path}", lines[-1])


def test_of_the_checkpoints_those_of_the_best_are_kept(swept: Swept):
    values = [json.loads((swept.path / name / "summary.json").read_text())["validation"] for name in ("000", "001")]
    accuracies = [value["accuracy"] for value in values]
    kept = [bool(list((swept.path / name).glob("checkpoints/*"))) for name in ("000", "001")]
    assert kept == [accuracies[0] >= accuracies[1], accuracies[1] > accuracies[0]]


@pytest.mark.slow
def test_trials_are_the_runs_that_one_starts_by_hand(swept_twice: Swept, tmp_path: Path):
    path = swept_twice.path
    summaries = {name: json.loads((path / name / "summary.json").read_text()) for name in ("000", "001")}
    assert max(summary["attempts"] for summary in summaries.values()) >= 2  # the kill came in the middle
    share = json.loads((path / "trials/000.json").read_text())["config"]["threads"]
    words = [word for word in WORDS if not word.startswith(("gradient", "sweep"))]
    done = run_train(
        *words, "gradient_accumulation=2", f"threads={share}", "evaluate.test=false", "tracking.log_model=false",
        f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    by_hand = json.loads((tmp_path / "run/summary.json").read_text())
    assert by_hand["weights_sha256"] == summaries["001"]["weights_sha256"] != summaries["000"]["weights_sha256"]


def test_mlflow_has_every_run_once_below_the_sweep(swept: Swept):
    has_every_run_once(swept)


def has_every_run_once(swept: Swept) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(swept.uri)
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    [parent] = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 4
    assert sorted((run.info.run_name, run.info.status) for run in children) == [
        ("vgg16 gradient_accumulation=1", "FINISHED"),
        ("vgg16 gradient_accumulation=13", "FAILED"),
        ("vgg16 gradient_accumulation=2", "FINISHED"),
    ]
    assert (parent.info.status, parent.info.run_name) == ("FAILED", "sweep of gradient_accumulation")
    assert parent.data.metrics["sweep/finished"] == 2
    assert parent.data.metrics["sweep/failed"] == 1
    best = parent.data.metrics["best/validation_accuracy"]
    tested = [run for run in children if "test/accuracy" in run.data.metrics]
    assert len(tested) == 1  # what chooses does not see the test
    assert tested[0].data.tags["run_dir"] in parent.data.tags["best_trial"]
    [output] = client.get_run(tested[0].info.run_id).outputs.model_outputs
    [version] = client.search_model_versions("name = 'inception-digits'")
    assert version.source == f"models:/{output.model_id}"
    values = [json.loads((swept.path / name / "summary.json").read_text())["validation"] for name in ("000", "001")]
    assert best == max(value["accuracy"] for value in values)


@pytest.fixture
def trial(tmp_path: Path, swept: Swept, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """One that has not begun."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    content = json.loads((swept.path / "trials/000.json").read_text())
    del content["number"]
    content["config"]["tracking"]["uri"] = f"sqlite:///{tmp_path / 'mlflow.db'}"  # its record is nobody else's
    [found] = trials.create_sweep(tmp_path, ["x"], str(tmp_path / "sweep"), {}, [content]).trials
    return found


def work(slots: WorkerPool, trial: Trial, watch: Any) -> list[TrialResult]:
    """How it ended."""
    todo, ends = [trial], []
    slots.run(
        lambda: todo.pop() if todo else None, lambda _, ended: bool(ends.append(ended)) or True, watch,
        SweepSignalHandler(),
    )  # fmt: skip
    return ends


def test_a_trial_that_hangs_is_ended(trial: Trial):
    """Stopped in its tracks, it can't heed the request to end."""
    slots = WorkerPool(1, time_limit_minutes=0.02)

    def watch() -> None:
        for slot in slots.busy:
            assert slot.process
            slot.process.send_signal(signal.SIGSTOP)

    assert work(slots, trial, watch) == [TrialResult(-9, workers.TIMEOUT_REASON)]


@pytest.mark.parametrize("so_far", ["waiting", "running"])
def test_a_trial_that_hangs_and_has_lost_its_launcher_is_ended(so_far: str, trial: Trial):
    [slot] = WorkerPool(1).workers
    slot.start(trial, None)
    assert slot.process
    assert eventually(lambda: trial.state() == so_far, 300)
    assert eventually(lambda: workers.find_process(trial), 60)
    slot.process.send_signal(signal.SIGSTOP)
    assert work(WorkerPool(1, time_limit_minutes=0.01), trial, slot.process.poll) == [
        TrialResult(1, workers.TIMEOUT_REASON)
    ]
    assert slot.process.wait(60) == -signal.SIGKILL
    assert workers.find_process(trial) is None


@pytest.mark.slow
def test_an_interrupted_sweep_says_what_is_left_and_goes_on(tmp_path: Path):
    path, uri = tmp_path / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [*WORDS[:-1], "sweep.parallel=1", f"run_dir={path}", f"tracking.uri={uri}"]
    words[words.index("gradient_accumulation=1,2,13")] = "seed=0,1"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train", "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert eventually(lambda: list(path.glob("000/checkpoints/*")), 300)
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 130
    assert re.search(r"sweep: 0 finished, 0 failed, 2 to go \(the same command again\), ", said)
    assert alive(path) == []
    assert list(path.glob("000/checkpoints/*-stop"))

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert {run.data.tags.get("kind", "train"): run.info.status for run in runs} == {
        "sweep": "KILLED",
        "train": "KILLED",
    }
    done = run_train("-m", *words)
    assert done.code == 0, done.err
    assert "sweep: 2 finished, 0 failed, " in done.out
    assert json.loads((path / "000/summary.json").read_text())["attempts"] == 2


@pytest.mark.slow
def test_what_a_sweep_with_a_failure_says_tests_its_best_once(tmp_path: Path):
    """The command that it prints is run as it stands; then the failed trial can be run, and nothing is tested again."""
    path = tmp_path / "sweep"
    words = [*SMALL, "epochs=1", "steps_per_epoch=2", "seed=0,1", f"run_dir={path}",
             f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", "tracking.wait_seconds=600"]  # fmt: skip
    (path / "001/metrics.jsonl").mkdir(parents=True)
    done = run_train("-m", *words)
    assert done.code == 1
    [line] = [line for line in done.out.splitlines() if line.startswith("the best trial is not tested yet, ")]
    assert trials_that_saw_the_test(path) == []
    done = run_command(*shlex.split(line.partition("test it now: ")[2]))
    assert done.code == 0, done.err
    assert trials_that_saw_the_test(path) == ["000"]
    (path / "001/metrics.jsonl").rmdir()
    done = run_train("-m", *words)
    assert done.code == 0, done.err
    assert "sweep: 2 finished, 0 failed, " in done.out
    assert trials_that_saw_the_test(path) == ["000"]


def trials_that_saw_the_test(path: Path) -> list[str]:
    """The trials that have seen the test split."""
    return sorted(file.parent.name for file in path.glob("*/summary.json") if "test" in json.loads(file.read_text()))


@pytest.mark.slow
def test_the_torture_of_a_sweep(tmp_path: Path):
    """The short version of `scripts/stress/sweep.py`."""
    report = tmp_path / "report.json"
    done = run_command(
        sys.executable, "scripts/stress/sweep.py", "--quick", "--trials", "4", "--kills", "2", "--report", str(report),
        timeout=1800,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    found = json.loads(report.read_text())
    assert (found["identical"], len(found["told"]), found["runs_in_mlflow"]) == (4, 3, 5)


# -------------------------------------------------------------------------------------------------- other launchers

TINY = [
    "model=vgg16", "model.width=0.1", "epochs=2", "steps_per_epoch=4", "batch_size=8", "gradient_accumulation=1,2,13",
    "precision=float32",
]  # fmt: skip

SBATCH = """#!/bin/sh
cp "$1" "$SCRIPTS/$$.sh"
echo "Submitted batch job $$"
"""


@pytest.mark.slow
def test_a_launcher_that_cannot_begin_is_told(tmp_path: Path):
    done = run_train("-m", *TINY, "hydra/launcher=submitit_slurm", f"run_dir={tmp_path / 'sweep'}")
    told = 'error: hydra/launcher must be able to begin, got submitit_slurm: Could not detect "srun", are you indeed on'
    assert (done.code, done.err.startswith(told), done.err.count("\n")) == (2, True, 1)


@pytest.mark.slow
def test_another_launcher_runs_the_trials(tmp_path: Path):
    """As jobs of submitit's own executor for this machine, in which each is a process that knows nothing of us."""
    path = tmp_path / "sweep"
    done = run_train(
        "-m", *TINY, "hydra/launcher=submitit_local", f"run_dir={path}", f"tracking.uri=sqlite:///{tmp_path / 'm.db'}"
    )
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[0] == "sweep: 3 trials, handed over to submitit_local"
    assert lines[-1].startswith("sweep: 2 finished, 1 failed, ")
    assert [line for line in lines if line.startswith("failed: gradient_accumulation=13: ConfigError: ")]
    assert " test accuracy 0." in next(line for line in lines if line.startswith("best: "))
    assert len(list((path / "jobs/.submitit").glob("*/*_result.pkl"))) == 4  # the best one once more
    assert not (ROOT / "multirun").exists()


def test_slurm_gets_a_script_for_the_trials(tmp_path: Path):
    """A `sbatch` that only keeps what it is given: what is in the script is what a cluster would run."""
    programs, scripts, path = tmp_path / "bin", tmp_path / "scripts", tmp_path / "sweep"
    programs.mkdir()
    scripts.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct"):
        (programs / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SCRIPTS": str(scripts)}
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=7", "hydra.launcher.gpus_per_node=1"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train", "-m", *TINY, *words, f"run_dir={path}"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert eventually(lambda: list(scripts.glob("*.sh")), 300)
    finally:
        launcher.kill()
        launcher.wait()
    [script] = [file.read_text() for file in scripts.glob("*.sh")]
    assert "#SBATCH --array=0-2%" in script
    assert "#SBATCH --time=7" in script
    assert "#SBATCH --gpus-per-node=1" in script
    assert str(path / "jobs/.submitit") in script
    assert f"{sys.executable} -u -m submitit.core._submit" in script


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")
def test_ray_runs_the_trials(tmp_path: Path):
    path = tmp_path / "sweep"
    done = run_train("-m", *TINY, "sweep.engine=ray", f"run_dir={path}", f"tracking.uri=sqlite:///{tmp_path / 'm.db'}")
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[0] == "sweep: 3 trials, handed over to ray"
    assert lines[-1].startswith("sweep: 2 finished, 1 failed, ")
    assert "gradient_accumulation must be at most" in (path / "jobs/2.txt").read_text()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_said(tmp_path: Path):
    done = run_train("-m", *TINY, "sweep.engine=ray", f"run_dir={tmp_path / 'sweep'}")
    told = "error: sweep.engine=ray must have Ray, got none; use pip install ray in the environment (.venv)\n"
    assert (done.code, done.out, done.err) == (2, "", told)
