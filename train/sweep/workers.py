"""Trials in processes of their own, some at a time, each on its share of the cores."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train.sweep.trials import Trial
from train.training.loop import SignalHandler

PARENT_PID_VARIABLE = "INCEPTION_SWEEP_PROCESS"
TRACKING_URI_VARIABLE = "INCEPTION_SWEEP_ADDRESS"  # of the store, which may hold a password: it is in no trial's file
REFERENCES_VARIABLE = (
    "INCEPTION_SWEEP_REFERENCES"  # to the environment, that were typed: in a trial's file they are only text
)
PR_SET_PDEATHSIG = 1
GPU_DRIVER_DIR = Path("/proc/driver/nvidia/gpus")  # a folder for each
TIMEOUT_REASON = "it took longer than sweep.minutes allows"
STOPPED_REASON = "the sweep was stopped"
GRACE_SECONDS = 30.0  # from asking a trial to stop, which it does at its next batch, to ending it
POLL_SECONDS = 0.1
OUT_OF_MEMORY_MARKERS = ("ResourceExhaustedError", "MemoryError", "RESOURCE_EXHAUSTED", "Cannot allocate memory")


@dataclass(frozen=True)
class TrialResult:
    """How a trial's process ended. code: its exit code, negative for a signal. why: one line, empty where it finished.

    again: whether it may be begun again; memory: whether that was what it lacked.
    """

    exit_code: int
    reason: str = ""
    is_retryable: bool = False
    is_out_of_memory: bool = False


ORPHAN_RESULTS = {"running": None, "finished": TrialResult(0)}


@dataclass
class Worker:
    """A place for one trial at a time. cores: what it may run on."""

    cores: tuple[int, ...]
    gpu: str | None = None
    trial: Trial | None = None
    process: subprocess.Popen | None = None
    orphan_pid: int | None = None  # the process of a trial whose launcher died, where it is one of this machine
    started_at: float = 0.0
    deadline: float = float("inf")
    stop_requested_at: float | None = None  # when it was asked to stop
    stop_reason: str = ""

    def start(self, trial: Trial, time_limit_minutes: float | None) -> None:
        """The trial's process; what it prints goes to output.txt in its folder.

        One that lives already, because the launcher that began it died, is not begun again but waited for.
        """
        self.trial, self.process, self.orphan_pid, self.stop_requested_at, self.stop_reason = (
            trial,
            None,
            None,
            None,
            "",
        )
        self.started_at = time.time()
        self.deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes else float("inf")
        self.orphan_pid = find_process(trial)
        if self.orphan_pid or trial.state() == "running":
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
        """Asks for a checkpoint and the end; who does not obey in time is ended."""
        if self.stop_requested_at is None:
            self.stop_requested_at, self.stop_reason = time.monotonic(), reason
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
        """How the trial has ended; None as long as it lives."""
        assert self.trial
        if time.monotonic() > self.deadline:
            self.stop(TIMEOUT_REASON)
        elif self.stop_requested_at is not None:
            self.stop(self.stop_reason)
        if self.process is None:
            if self._orphan_is_alive():
                return None
            gone = (
                TrialResult(1, self.stop_reason)
                if self.stop_reason
                else TrialResult(1, "the process is gone", is_retryable=True)
            )
            return ORPHAN_RESULTS.get(self.trial.state(), gone)
        code = self.process.poll()
        return None if code is None else classify_exit(code, self.stop_reason, self.trial, self.started_at)


def find_process(trial: Trial) -> int | None:
    """The process on this machine that runs a trial, also where it has not come so far as to hold its lock."""
    numbers = (int(place.name) for place in Path("/proc").glob("[0-9]*"))
    return next((number for number in numbers if is_trial_process(number, trial)), None)


def is_trial_process(pid: int, trial: Trial) -> bool:
    try:
        return trial.selector.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def classify_exit(exit_code: int, stop_reason: str, trial: Trial, started_at: float) -> TrialResult:
    """What an exit code means. asked: why we asked it to stop, if we did; begun: when it was started, in seconds.

    A trial that has finished may still have waited for its record, which is completed without it.
    """
    summary = trial.summary()
    if exit_code == 0 or (summary.get("status") == "finished" and summary["time"] > started_at):
        return TrialResult(0)
    if stop_reason:
        return TrialResult(exit_code, stop_reason)
    said = last_error_line(trial.folder / "output.txt")
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return TrialResult(exit_code, f"ended by {name}", is_retryable=True, is_out_of_memory=name == "SIGKILL")
    if exit_code in (129, 130, 143):
        return TrialResult(exit_code, "stopped by somebody else", is_retryable=True)
    memory = any(word in said for word in OUT_OF_MEMORY_MARKERS)
    return TrialResult(exit_code, said or f"exit code {exit_code}", is_retryable=memory, is_out_of_memory=memory)


def last_error_line(path: Path) -> str:
    """The last error that a trial has told, else the last line."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@dataclass
class WorkerPool:
    """All places. minutes: how long a trial may take."""

    num_workers: int
    time_limit_minutes: float | None = None
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // self.num_workers)
        self.workers = [
            Worker(
                tuple(cores[(place * share + core) % len(cores)] for core in range(share)),
                self.gpus[place % len(self.gpus)] if self.gpus else None,
            )
            for place in range(self.num_workers)
        ]

    @property
    def busy(self) -> list[Worker]:
        return [slot for slot in self.workers if slot.trial]

    def run(
        self,
        next_trial: Callable[[], Trial | None],
        on_trial_end: Callable[[Trial, TrialResult], bool],
        on_poll: Callable[[], None],
        signals: SweepSignalHandler,
    ) -> None:
        """Runs what `following` gives until it gives nothing and nothing runs any more.

        following: a trial to be run now; None where there is none until another has ended. told: hears how one has
        ended, and says whether to go on. watch: called ten times a second.
        """
        on = True
        try:
            while True:
                for slot in self.busy:
                    if ended := slot.poll():
                        trial, slot.trial = slot.trial, None
                        on = on_trial_end(trial, ended) and on  # type: ignore[arg-type]
                on = on and not signals.signal
                for slot in self.workers:
                    if on and not slot.trial and (trial := next_trial()):
                        slot.start(trial, self.time_limit_minutes)
                if not self.busy:
                    return
                for slot in () if on else self.busy:
                    slot.stop(STOPPED_REASON, immediate=signals.immediate)
                on_poll()
                time.sleep(POLL_SECONDS)
        finally:
            for slot in self.busy:
                if slot.process:
                    slot.process.kill()


class SweepSignalHandler:
    """What a signal asks of a sweep: to stop after a checkpoint, and by a second one at once. See `Stops`."""

    def __init__(self) -> None:
        self.signal, self.immediate, self._received_at = 0, False, 0.0

    def _handle(self, signum: int, _: object) -> None:
        if self.signal and SignalHandler.is_repeat(signum, self.signal, self._received_at):
            return
        self.immediate = bool(self.signal)
        self.signal, self._received_at = signum, time.monotonic()

    @contextmanager
    def installed(self) -> Iterator[SweepSignalHandler]:
        """Takes the signals over, and gives them back."""
        with SignalHandler.handler_installed(self._handle):
            yield self

    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0


def visible_gpus() -> tuple[str, ...]:
    """NVIDIA's, as CUDA_VISIBLE_DEVICES names them; found without loading what would take them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name for name in named.split(",") if name not in ("", "-1"))
    return tuple(str(number) for number, _ in enumerate(sorted(GPU_DRIVER_DIR.glob("*"))))


def die_with_parent(parent_pid: int) -> None:
    """This process, a child of the launcher's, gets SIGTERM when the launcher dies, however that is."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGTERM)
