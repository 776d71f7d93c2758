"""Workers: exit codes, signals, cores and GPUs, and trials that hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.commands import ROOT, THREADS, run_train
from support.sweeps import SMALL, make_sweep, trial_record
from support.waiting import happens_within
from train.config import composition
from train.config.serialization import Redactor, to_dict
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
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A trial that has not started, and takes longer than any test."""
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    overrides = [*SMALL, "epochs=1000", "steps_per_epoch=4", "batch_size=8", f"threads={THREADS}"]
    config = composition.compose([*overrides, f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"])
    record = trial_record(0) | {"config": to_dict(config, Redactor())}
    [created] = trials.create_sweep(tmp_path, ["x"], str(tmp_path / "sweep"), {}, [record]).trials
    return created


def run_in_pool(pool: WorkerPool, trial: Trial, watch: Callable[[], object]) -> list[TrialResult]:
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


# Starts the first trial of a sweep; its process does not know its launcher if its number is not passed on.
KILLED_LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from train.sweep import workers
from train.sweep.trials import SweepDir
folder, how = sys.argv[1:]
if how == "unknown":
    workers.PARENT_PID_VARIABLE = "NOT_READ"
[trial] = SweepDir(Path(folder), {}).trials
[worker] = workers.WorkerPool(1).workers
worker.start(trial, None)
print(worker.process.pid, flush=True)
if how == "at once":
    worker.process.send_signal(signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@contextmanager
def launched(trial: Trial, how: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A launcher of the trial, and the trial's process."""
    command = [sys.executable, "-c", KILLED_LAUNCHER, str(trial.file.parent.parent), how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        child = int(launcher.stdout.readline())
        try:
            yield launcher, child
        finally:
            launcher.kill()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def has_checkpoint(trial: Trial, suffix: str = "") -> bool:
    return bool(list(trial.folder.glob(f"checkpoints/epoch-*{suffix}")))


@pytest.mark.parametrize("how", ["", pytest.param("unknown", marks=pytest.mark.slow)])
def test_trial_ends_after_a_checkpoint_where_its_launcher_is_killed(how: str, trial: Trial):
    """Nobody starts the launcher again. Negative control: a trial that does not call `die_with_parent` goes on."""
    with launched(trial, how) as (launcher, child):
        assert happens_within(lambda: has_checkpoint(trial), 300)
        launcher.kill()
        launcher.wait()
        assert happens_within(lambda: not is_alive(child), 120 if not how else 5) == (not how)
        assert has_checkpoint(trial, "-stop") == (not how)
        assert trial.state() == ("running" if how else "interrupted")


def test_trial_ends_where_its_launcher_is_killed_before_it_asks(trial: Trial):
    """It has no lock yet, so that the next launcher starts the trial: it must not meet another process then."""
    with launched(trial, "at once") as (launcher, child):
        assert launcher.wait(60) == -signal.SIGKILL
        assert (is_alive(child), trial.state()) == (True, "waiting")
        os.kill(child, signal.SIGCONT)
        assert happens_within(lambda: not is_alive(child), 120)
        assert sorted(path.name for path in trial.folder.iterdir()) == ["output.txt"]


def test_hanging_trial_of_a_killed_launcher_is_killed_by_the_next_one(trial: Trial, monkeypatch: pytest.MonkeyPatch):
    """It does not obey the signal that its launcher's death sends. Negative control: who does not look for its process
    can only give it up."""
    with launched(trial) as (launcher, child):
        assert happens_within(lambda: trial.state() == "running", 300)
        os.kill(child, signal.SIGSTOP)
        launcher.kill()
        launcher.wait()
        given_up = [TrialResult(1, workers.TIMEOUT_REASON)]
        with monkeypatch.context() as patch:
            patch.setattr(workers, "find_process", lambda _: None)
            assert run_in_pool(WorkerPool(1, time_limit_minutes=0.01), trial, lambda: None) == given_up
        assert (is_alive(child), trial.state()) == (True, "running")
        assert run_in_pool(WorkerPool(1, time_limit_minutes=0.01), trial, lambda: None) == given_up
        assert not is_alive(child)
        assert happens_within(lambda: trial.state() == "interrupted", 60)  # the kernel frees its memory before its lock


def test_sweep_that_is_stopped_does_not_wait_for_a_run_started_by_hand(trial: Trial):
    trial.folder.mkdir()
    (trial.folder / "run.json").write_text(json.dumps({"format_version": 2, "run_id": "x"}))
    run_dir = trial.run()
    assert run_dir
    [worker] = WorkerPool(1).workers
    with run_dir.locked():
        worker.start(trial, None)
        assert (worker.process, worker.poll()) == (None, None)
        worker.stop(workers.STOPPED_REASON)
        assert worker.poll() == TrialResult(1, workers.STOPPED_REASON)
