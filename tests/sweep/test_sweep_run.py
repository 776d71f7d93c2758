"""A sweep from its start to its best trial: retries, the final test, interruption and resumption."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.commands import ROOT, run_command, run_train
from support.sweeps import OVERRIDES, SMALL, CompletedSweep, make_sweep, running_trials, write_results
from support.waiting import happens_within
from train.config.schema import Config, Sweep
from train.sweep import run, search
from train.sweep.trials import SweepDir, Trial
from train.sweep.workers import TrialResult
from train.training.signals import StopSignals


def test_trial_with_half_the_batch_gets_its_own_run_dir(tmp_path: Path):
    sweep = make_sweep(tmp_path, 1)
    [trial] = sweep.trials
    half = run.with_half_batch(sweep, trial)
    quarter = run.with_half_batch(sweep, half)
    assert [each.config["batch_size"] for each in (trial, half, quarter)] == [32, 16, 8]
    assert [each.folder.name for each in (trial, half, quarter)] == ["000", "000-batch16", "000-batch8"]
    assert sweep.trials == [quarter]


def uploaders(sweep: Path) -> list[int]:
    """Process ids of the uploaders of a sweep's runs."""
    processes = subprocess.run(["pgrep", "-f", f"train.tracking.uploader {sweep}/"], capture_output=True, text=True)
    return [int(line) for line in processes.stdout.splitlines()]


@pytest.mark.slow
def test_password_of_the_tracking_uri_is_written_nowhere(tmp_path: Path):
    """The trials do receive it: without a valid URI they would fail earlier."""
    path = tmp_path / "sweep"
    overrides = [*SMALL, "epochs=1", "steps_per_epoch=1", "seed=0,1", "sweep.parallel=2", "tracking.wait_seconds=0",
             "evaluate.test=false", "tracking.log_model=false"]  # fmt: skip
    done = run_train("-m", *overrides, "tracking.uri='http://me:hunter2@127.0.0.1:9'", f"run_dir={path}")
    for process in uploaders(path):  # they would retry forever
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    assert done.code == 0, done.err
    for file in path.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert "http://127.0.0.1:9" in (path / "000/config.yaml").read_text()


def make_session(sweep_dir: SweepDir, **settings: Any) -> run.SweepSession:
    """The session of a launcher with a grid search."""
    session = run.SweepSession(sweep_dir, Config(sweep=Sweep(**settings)), None, StopSignals())
    session.algorithm = search.GridSearch(sweep_dir)
    return session


KILLED = TrialResult(-9, "ended by SIGKILL", is_retryable=True, is_out_of_memory=True)
FAILED = TrialResult(1, "no such file")


def test_killed_trial_is_retried_and_failed_trial_is_not(tmp_path: Path):
    folder = make_sweep(tmp_path, 2)
    first, second = folder.trials
    session = make_session(folder, retries=2)
    for _ in range(2):
        assert run.handle_result(session, first, KILLED)
        assert run.next_trial(session) == first  # before trials that have not started
    assert run.handle_result(session, first, KILLED)
    assert run.handle_result(session, second, FAILED)
    assert session.retry_queue == []
    assert [(trial.number, why) for trial, why in session.failures.values()] == [(0, KILLED.reason), (1, FAILED.reason)]


def test_batch_is_halved_only_with_halve_batch(tmp_path: Path):
    folder = make_sweep(tmp_path, 1)
    for asked, size in ((False, 32), (True, 16)):
        session = make_session(folder, halve_batch=asked)
        run.handle_result(session, folder.trials[0], KILLED)
        [again] = session.retry_queue
        assert again.config["batch_size"] == size


def test_fail_fast_stops_the_sweep_at_the_first_failure(tmp_path: Path):
    folder = make_sweep(tmp_path, 2)
    assert run.handle_result(make_session(folder), folder.trials[0], FAILED)
    session = make_session(folder, fail_fast=True)
    assert not run.handle_result(session, folder.trials[0], FAILED)
    write_results(folder.trials[1], 9, 0.5)
    run.finalize_best(session, run.find_best_trials(session), pytest.fail)  # nothing more is started


def finalize(folder: SweepDir, capsys: pytest.CaptureFixture, *failed: Trial) -> tuple[list[int], str]:
    """The numbers of the trials queued for the final test, and the message about it."""
    session = make_session(folder)
    session.failures = {trial.number: (trial, "x") for trial in failed}
    run.finalize_best(session, run.find_best_trials(session), lambda _: None)
    return [trial.number for trial in session.retry_queue], capsys.readouterr().out


def test_best_trial_is_tested_only_when_no_failed_trial_may_beat_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = make_sweep(tmp_path, 3, identity=["seed=0,1"])
    first, second, third = folder.trials
    for trial, accuracy in ((first, 0.5), (second, 0.4)):
        write_results(trial, 9, accuracy)
    write_results(third, 3, 0.9, "failed")
    assert finalize(folder, capsys, third) == (
        [],
        "the best trial has not been tested yet: failed trials (1) may still beat it; run the same command again, or "
        f"test it now: make resume run={first.folder} "
        "evaluate.test=true evaluate.report=true tracking.log_model=true\n",
    )
    summary = json.loads((third.folder / "summary.json").read_text())
    (third.folder / "summary.json").write_text(json.dumps(summary | {"config_error": True}))
    expected = ([0], "finalizing the best trial: n=0\n")
    assert finalize(folder, capsys, third) == expected  # a configuration error would only repeat
    assert finalize(folder, capsys) == expected


def test_no_second_trial_sees_the_test_split(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = make_sweep(tmp_path, 2, identity=["seed=0,1"])
    first, second = folder.trials
    write_results(first, 9, 0.5)
    summary = json.loads((first.folder / "summary.json").read_text())
    (first.folder / "summary.json").write_text(json.dumps(summary | {"test": {"accuracy": 0.5}}))
    write_results(second, 9, 0.6)
    expected = "the best trial was not tested: the test split has already been used for n=0\n"
    assert finalize(folder, capsys) == ([], expected)


@pytest.mark.slow
def test_trials_do_not_outlive_their_launcher(swept_twice: CompletedSweep):
    assert swept_twice.left == []


@pytest.mark.slow
def test_second_start_resumes_the_sweep(swept_twice: CompletedSweep):
    first_line = f"resuming sweep {swept_twice.path} with its stored configuration\n"
    assert swept_twice.done.out.startswith(first_line)
    assert_reports_results(swept_twice, swept_twice.done.out.removeprefix(first_line))
    assert_each_trial_is_in_mlflow_once(swept_twice)


def test_sweep_reports_its_results(swept: CompletedSweep):
    assert_reports_results(swept, swept.done.out)


def assert_reports_results(swept: CompletedSweep, output: str) -> None:
    assert swept.done.code != 0
    lines = output.splitlines()
    assert lines[0].startswith("sweep: 3 trials, 2 at a time, each on ")
    failed = [line for line in lines if line.startswith("failed: ")]
    assert failed == [
        "failed: gradient_accumulation=13: gradient_accumulation must be at most the run's 12 steps, got 13; use e.g. "
        f"gradient_accumulation=1 ({swept.path}/002/output.txt)"
    ]
    [best] = [line for line in lines if line.startswith("best: ")]
    assert " test accuracy 0." in best
    assert re.fullmatch(rf"sweep: 2 finished, 1 failed, \d+ MiB  {swept.path}", lines[-1])


def test_only_the_best_trial_keeps_its_checkpoints(swept: CompletedSweep):
    values = [json.loads((swept.path / name / "summary.json").read_text())["validation"] for name in ("000", "001")]
    accuracies = [value["accuracy"] for value in values]
    kept = [bool(list((swept.path / name).glob("checkpoints/*"))) for name in ("000", "001")]
    assert kept == [accuracies[0] >= accuracies[1], accuracies[1] > accuracies[0]]


@pytest.mark.slow
def test_trial_equals_the_run_started_by_hand(swept_twice: CompletedSweep, tmp_path: Path):
    path = swept_twice.path
    summaries = {name: json.loads((path / name / "summary.json").read_text()) for name in ("000", "001")}
    assert max(summary["attempts"] for summary in summaries.values()) >= 2  # the launcher was killed during training
    threads = json.loads((path / "trials/000.json").read_text())["config"]["threads"]
    overrides = [override for override in OVERRIDES if not override.startswith(("gradient", "sweep"))]
    done = run_train(
        *overrides, "gradient_accumulation=2", f"threads={threads}", "evaluate.test=false", "tracking.log_model=false",
        f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    by_hand = json.loads((tmp_path / "run/summary.json").read_text())
    assert by_hand["weights_sha256"] == summaries["001"]["weights_sha256"] != summaries["000"]["weights_sha256"]


def test_mlflow_has_each_trial_once_under_its_sweep(swept: CompletedSweep):
    assert_each_trial_is_in_mlflow_once(swept)


def assert_each_trial_is_in_mlflow_once(swept: CompletedSweep) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(swept.uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
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
    assert len(tested) == 1  # only the selected trial is tested
    assert tested[0].data.tags["run_dir"] in parent.data.tags["best_trial"]
    [output] = client.get_run(tested[0].info.run_id).outputs.model_outputs
    [version] = client.search_model_versions("name = 'inception-digits'")
    assert version.source == f"models:/{output.model_id}"
    values = [json.loads((swept.path / name / "summary.json").read_text())["validation"] for name in ("000", "001")]
    assert best == max(value["accuracy"] for value in values)


@pytest.mark.slow
def test_interrupted_sweep_reports_remaining_trials_and_resumes(tmp_path: Path):
    path, uri = tmp_path / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = [*OVERRIDES[:-1], "sweep.parallel=1", f"run_dir={path}", f"tracking.uri={uri}"]
    overrides[overrides.index("gradient_accumulation=1,2,13")] = "seed=0,1"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train", "-m", *overrides], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert happens_within(lambda: list(path.glob("000/checkpoints/*")), 300)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 130
    assert re.search(r"sweep: 0 finished, 0 failed, 2 remaining \(run the same command to continue\), ", output)
    assert running_trials(path) == []
    assert list(path.glob("000/checkpoints/*-stop"))

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.data.tags.get("kind", "train"): run.info.status for run in runs} == {
        "sweep": "KILLED",
        "train": "KILLED",
    }
    done = run_train("-m", *overrides)
    assert done.code == 0, done.err
    assert "sweep: 2 finished, 0 failed, " in done.out
    assert json.loads((path / "000/summary.json").read_text())["attempts"] == 2


@pytest.mark.slow
def test_command_printed_after_a_failure_tests_the_best_trial_once(tmp_path: Path):
    """The printed command is run verbatim; then the failed trial is run, and nothing is tested again."""
    path = tmp_path / "sweep"
    overrides = [*SMALL, "epochs=1", "steps_per_epoch=2", "seed=0,1", f"run_dir={path}",
             f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", "tracking.wait_seconds=600"]  # fmt: skip
    (path / "001/metrics.jsonl").mkdir(parents=True)
    done = run_train("-m", *overrides)
    assert done.code == 1
    [line] = [line for line in done.out.splitlines() if line.startswith("the best trial has not been tested yet: ")]
    assert trials_with_test(path) == []
    done = run_command(*shlex.split(line.partition("test it now: ")[2]))
    assert done.code == 0, done.err
    assert trials_with_test(path) == ["000"]
    (path / "001/metrics.jsonl").rmdir()
    done = run_train("-m", *overrides)
    assert done.code == 0, done.err
    assert "sweep: 2 finished, 0 failed, " in done.out
    assert trials_with_test(path) == ["000"]


def trials_with_test(path: Path) -> list[str]:
    """Trials that were evaluated on the test split."""
    return sorted(file.parent.name for file in path.glob("*/summary.json") if "test" in json.loads(file.read_text()))


@pytest.mark.slow
def test_stress_script_for_sweeps(tmp_path: Path):
    """The short version of `scripts/stress/sweep.py`."""
    report = tmp_path / "report.json"
    done = run_command(
        sys.executable, "scripts/stress/sweep.py", "--quick", "--trials", "4", "--kills", "2", "--report", str(report),
        timeout=1800,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    results = json.loads(report.read_text())
    assert (results["identical"], len(results["told"]), results["runs_in_mlflow"]) == (4, 3, 5)
