"""Workers: exit codes, signals, cores and GPUs, and trials that hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.commands import ROOT, run_train
from support.sweeps import CompletedSweep, make_sweep
from support.waiting import happens_within
from train.sweep import trials, workers
from train.sweep.trials import Trial
from train.sweep.workers import TrialResult, WorkerPool, classify_exit
from train.training.signals import StopSignals


def test_exit_codes_are_classified(tmp_path: Path):
    trial = make_sweep(tmp_path, 1).trials[0]
    trial.folder.mkdir()
    output = trial.folder / "output.txt"
    output.write_text("a line\nerror: seed must be 0\nanother\n")
    assert classify_exit(0, "", trial, 5.0) == TrialResult(0)
    assert classify_exit(2, "", trial, 5.0) == TrialResult(2, "seed must be 0")
    assert classify_exit(-9, "", trial, 5.0) == TrialResult(
        -9, "ended by SIGKILL", is_retryable=True, is_out_of_memory=True
    )
    assert classify_exit(-11, "", trial, 5.0) == TrialResult(-11, "ended by SIGSEGV", is_retryable=True)
    assert classify_exit(143, "", trial, 5.0) == TrialResult(
        143, "stopped by a signal from outside the sweep", is_retryable=True
    )
    assert classify_exit(143, workers.TIMEOUT_REASON, trial, 5.0) == TrialResult(143, workers.TIMEOUT_REASON)
    output.write_text("error: unexpected ResourceExhaustedError; full traceback in train.log\n")
    assert classify_exit(1, "", trial, 5.0) == TrialResult(
        1, "unexpected ResourceExhaustedError; full traceback in train.log", is_retryable=True, is_out_of_memory=True
    )
    output.write_text("")
    assert classify_exit(1, "", trial, 5.0).reason == "exit code 1"
    for end, expected in (
        (4.0, TrialResult(143, workers.TIMEOUT_REASON)),
        (6.0, TrialResult(0)),
    ):  # the summary is of this start, or of an earlier one
        (trial.folder / "run.json").write_text(json.dumps({"format_version": 2, "run_id": "x"}))
        (trial.folder / "summary.json").write_text(json.dumps({"status": "finished", "time": end}))
        assert classify_exit(143, workers.TIMEOUT_REASON, trial, 5.0) == expected


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty for a zombie
    except OSError:
        return False


@pytest.mark.parametrize("asks", [True, False])
def test_trial_dies_with_its_launcher_only_after_die_with_parent(asks: bool):
    """Negative control: a process that did not call it survives its launcher."""
    code = "from train.sweep.workers import die_with_parent; import os, time; "
    code += (
        f"{'die_with_parent(os.getppid())' if asks else 'die_with_parent'}; print('asked', flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    child = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "asked\n"
    launcher.kill()
    launcher.wait()
    try:
        assert happens_within(lambda: not is_alive(child), 60 if asks else 1) == asks
    finally:
        launcher.stdout.close()
        if not asks:
            os.kill(child, signal.SIGKILL)


def test_cores_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    assert [worker.cores for worker in WorkerPool(2).workers] == [(0, 1), (2, 3)]
    assert [worker.cores for worker in WorkerPool(1).workers] == [(0, 1, 2, 3, 6)]
    assert [worker.cores for worker in WorkerPool(6).workers] == [(0,), (1,), (2,), (3,), (6,), (0,)]


def test_each_worker_gets_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(workers, "GPU_DRIVER_DIR", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus() == ("0", "1")
    for visible, expected in (("3,5", ("3", "5")), ("-1", ()), ("", ()), ("GPU-8a", ("GPU-8a",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert workers.visible_gpus() == expected
    assert [worker.gpu for worker in WorkerPool(3, gpus=("3", "5")).workers] == ["3", "5", "3"]
    assert [worker.gpu for worker in WorkerPool(2).workers] == [None, None]


@pytest.mark.slow
def test_gpu_is_shared_only_with_a_memory_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    arguments = ["-m", "seed=0,1,2", "sweep.parallel=3", "sweep.dry_run=true"]
    assert run_train(*arguments).err == (
        "error: sweep.parallel must be at most the number of GPUs, 2, got 3; "
        "use gpu_memory=MIB to let several trials share one\n"
    )
    for override in ("gpu_memory=20000", "device=cpu", "sweep.parallel=2"):
        assert run_train(*arguments, override).code == 0


@pytest.fixture
def trial(tmp_path: Path, swept: CompletedSweep, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A trial that has not started."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    record = json.loads((swept.path / "trials/000.json").read_text())
    del record["number"]
    record["config"]["tracking"]["uri"] = f"sqlite:///{tmp_path / 'mlflow.db'}"  # a store of its own
    [created] = trials.create_sweep(tmp_path, ["x"], str(tmp_path / "sweep"), {}, [record]).trials
    return created


def run_in_pool(pool: WorkerPool, trial: Trial, watch: Any) -> list[TrialResult]:
    """Run the trial in the pool; return its results."""
    waiting, results = [trial], []
    pool.run(
        lambda: waiting.pop() if waiting else None, lambda _, result: bool(results.append(result)) or True, watch,
        StopSignals(),
    )  # fmt: skip
    return results


def test_hanging_trial_is_killed(trial: Trial):
    """A process stopped by SIGSTOP cannot react to SIGTERM."""
    pool = WorkerPool(1, time_limit_minutes=0.02)

    def watch() -> None:
        for worker in pool.busy:
            assert worker.process
            worker.process.send_signal(signal.SIGSTOP)

    assert run_in_pool(pool, trial, watch) == [TrialResult(-9, workers.TIMEOUT_REASON)]


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_hanging_trial_of_a_dead_launcher_is_killed(state: str, trial: Trial):
    [worker] = WorkerPool(1).workers
    worker.start(trial, None)
    assert worker.process
    assert happens_within(lambda: trial.state() == state, 300)
    assert happens_within(lambda: workers.find_process(trial), 60)
    worker.process.send_signal(signal.SIGSTOP)
    assert run_in_pool(WorkerPool(1, time_limit_minutes=0.01), trial, worker.process.poll) == [
        TrialResult(1, workers.TIMEOUT_REASON)
    ]
    assert worker.process.wait(60) == -signal.SIGKILL
    assert workers.find_process(trial) is None
