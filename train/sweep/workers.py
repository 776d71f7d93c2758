"""Worker pool: runs trials in separate processes, several at a time, each on its share of the cores."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.sweep.trials import Trial
from train.training.signals import StopSignals

PARENT_PID_VARIABLE = "INCEPTION_SWEEP_PROCESS"
TRACKING_URI_VARIABLE = "INCEPTION_SWEEP_ADDRESS"  # may hold a password, and is therefore not in a trial's file
REFERENCES_VARIABLE = "INCEPTION_SWEEP_REFERENCES"  # trusted environment references: those in a trial's file are not
PR_SET_PDEATHSIG = 1
GPU_DRIVER_DIR = Path("/proc/driver/nvidia/gpus")  # has one folder per GPU
TIMEOUT_REASON = "exceeded the time limit sweep.minutes"
STOPPED_REASON = "the sweep was stopped"
GRACE_SECONDS = 30.0  # between SIGTERM, which a trial obeys at its next batch, and SIGKILL
POLL_SECONDS = 0.1
OUT_OF_MEMORY_MARKERS = ("ResourceExhaustedError", "MemoryError", "RESOURCE_EXHAUSTED", "Cannot allocate memory")


@dataclass(frozen=True)
class TrialResult:
    """How a trial's process ended. exit_code: negative for a signal. reason: one line, empty if the trial finished."""

    exit_code: int
    reason: str = ""
    is_retryable: bool = False
    is_out_of_memory: bool = False


@dataclass
class Worker:
    """Runs one trial at a time. cores: the processor cores that the trial may use."""

    cores: tuple[int, ...]
    gpu: str | None = None
    trial: Trial | None = None
    process: subprocess.Popen[bytes] | None = None
    orphan_pid: int | None = None  # process of a trial whose launcher was killed, if it is on this machine
    started_at: float = 0.0
    deadline: float = float("inf")
    stop_requested_at: float | None = None
    stop_reason: str = ""

    def start(self, trial: Trial, time_limit_minutes: float | None) -> None:
        """Starts the trial's process; its output goes to output.txt in the trial's folder.

        If the trial is running already, no process is started: the running one is polled. It hangs, so that it did not
        end with its launcher, or it was started by hand.
        """
        self.trial = trial
        self.process = None
        self.stop_requested_at = None
        self.stop_reason = ""
        self.started_at = time.time()
        self.deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes else float("inf")
        self.orphan_pid = None
        if trial.state() == "running":
            self.orphan_pid = find_process(trial)
            return
        trial.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, PARENT_PID_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with (trial.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train", trial.selector, *trial.overrides],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        os.sched_setaffinity(self.process.pid, self.cores)

    def stop(self, reason: str, *, immediate: bool = False) -> None:
        """Asks the trial to checkpoint and exit; kills it after GRACE_SECONDS, or at once if `immediate`."""
        if self.stop_requested_at is None:
            self.stop_requested_at = time.monotonic()
            self.stop_reason = reason
            self._send(signal.SIGTERM)
        if immediate or time.monotonic() > self.stop_requested_at + GRACE_SECONDS:
            self._send(signal.SIGKILL)

    def _send(self, signum: int) -> None:
        if self.process is not None:
            self.process.send_signal(signum)
        elif self._orphan_is_alive():
            assert self.orphan_pid
            os.kill(self.orphan_pid, signum)

    def _orphan_is_alive(self) -> bool:
        return bool(self.orphan_pid and self.trial and is_trial_process(self.orphan_pid, self.trial))

    def poll(self) -> TrialResult | None:
        """Returns the trial's result, or None while it is running."""
        assert self.trial
        if time.monotonic() > self.deadline:
            self.stop(TIMEOUT_REASON)
        elif self.stop_requested_at is not None:
            self.stop(self.stop_reason)
        if self.process is None:
            return self._poll_foreign_process(self.trial)
        exit_code = self.process.poll()
        return None if exit_code is None else classify_exit(exit_code, self.stop_reason, self.trial, self.started_at)

    def _poll_foreign_process(self, trial: Trial) -> TrialResult | None:
        """As `poll`, for a process that this launcher did not start. Gives up one that it cannot stop."""
        if self._orphan_is_alive():
            return None
        state = trial.state()
        if state in ("finished", "paused"):
            return TrialResult(0)
        if self.stop_reason:
            return TrialResult(1, self.stop_reason)
        return None if state == "running" else TrialResult(1, "the process disappeared", is_retryable=True)


def find_process(trial: Trial) -> int | None:
    """Returns the process on this machine that a launcher started to run a trial.

    Needed for a trial that hangs and whose launcher was killed: it does not obey the signal of `die_with_parent`, and
    the next launcher has to end it when the sweep is stopped or the trial has taken too long. No other trial outlives
    its launcher.
    """
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return next((pid for pid in pids if is_trial_process(pid, trial)), None)


def is_trial_process(pid: int, trial: Trial) -> bool:
    try:
        return trial.selector.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def classify_exit(exit_code: int, stop_reason: str, trial: Trial, started_at: float) -> TrialResult:
    """Maps an exit code to a result. stop_reason: why the launcher stopped the trial, if it did. started_at: seconds.

    A trial stopped after it finished was only waiting for its upload, which continues without it.
    """
    summary = trial.summary()
    if exit_code == 0 or (summary.get("status") == "finished" and summary["time"] > started_at):
        return TrialResult(0)
    if stop_reason:
        return TrialResult(exit_code, stop_reason)
    error = last_error_line(trial.folder / "output.txt")
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return TrialResult(exit_code, f"ended by {name}", is_retryable=True, is_out_of_memory=name == "SIGKILL")
    if exit_code in (129, 130, 143):
        return TrialResult(exit_code, "stopped by a signal from outside the sweep", is_retryable=True)
    memory = any(marker in error for marker in OUT_OF_MEMORY_MARKERS)
    return TrialResult(exit_code, error or f"exit code {exit_code}", is_retryable=memory, is_out_of_memory=memory)


def last_error_line(path: Path) -> str:
    """Returns the last error in a trial's output, else the last line."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@dataclass
class WorkerPool:
    """A fixed number of workers, each with its share of the cores and GPUs."""

    num_workers: int
    time_limit_minutes: float | None = None
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // self.num_workers)
        self.workers = [
            Worker(
                tuple(cores[(index * share + core) % len(cores)] for core in range(share)),
                self.gpus[index % len(self.gpus)] if self.gpus else None,
            )
            for index in range(self.num_workers)
        ]

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.trial]

    def run(
        self,
        next_trial: Callable[[], Trial | None],
        on_trial_end: Callable[[Trial, TrialResult], bool],
        on_poll: Callable[[], object],
        signals: StopSignals,
    ) -> None:
        """Runs trials until `next_trial` returns None and no trial is running.

        next_trial: returns a trial to start now, or None if there is none until another one has ended. on_trial_end:
        takes a trial and its result, and returns whether to continue. on_poll: called ten times a second.
        """
        should_continue = True
        try:
            while True:
                for worker in self.busy:
                    if result := worker.poll():
                        trial, worker.trial = worker.trial, None
                        should_continue = on_trial_end(trial, result) and should_continue  # type: ignore[arg-type]
                should_continue = should_continue and not signals.received_signal()
                for worker in self.workers:
                    if should_continue and not worker.trial and (trial := next_trial()):
                        worker.start(trial, self.time_limit_minutes)
                if not self.busy:
                    return
                for worker in () if should_continue else self.busy:
                    worker.stop(STOPPED_REASON, immediate=signals.immediate)
                on_poll()
                time.sleep(POLL_SECONDS)
        finally:
            for worker in self.busy:
                if worker.process:
                    worker.process.kill()


def visible_gpus() -> tuple[str, ...]:
    """Returns NVIDIA GPUs as CUDA_VISIBLE_DEVICES names them, without loading a library that would allocate them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name not in ("", "-1"))
    return tuple(str(number) for number, _ in enumerate(sorted(GPU_DRIVER_DIR.glob("*"))))


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel send SIGTERM to this process when its parent, the launcher, dies for whatever reason.

    Needed where a launcher is killed and not started again: the trial saves a checkpoint and ends, instead of using
    the machine until it has finished. Also where it has not acquired the lock of its run: the next launcher would not
    know of it. More precisely, the signal is sent when the parent's thread ends that has started this process.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGTERM)
