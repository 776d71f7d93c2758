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
from train.training.loop import Stops

PARENT = "INCEPTION_SWEEP_PROCESS"
ADDRESS = "INCEPTION_SWEEP_ADDRESS"  # of the store, which may hold a password: it is in no trial's file
REFERENCES = "INCEPTION_SWEEP_REFERENCES"  # to the environment, that were typed: in a trial's file they are only text
PR_SET_PDEATHSIG = 1
DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each
TOO_LONG = "it took longer than sweep.minutes allows"
STOPPED = "the sweep was stopped"
GRACE_SECONDS = 30.0  # from asking a trial to stop, which it does at its next batch, to ending it
POLL_SECONDS = 0.1
OUT_OF_MEMORY = ("ResourceExhaustedError", "MemoryError", "RESOURCE_EXHAUSTED", "Cannot allocate memory")


@dataclass(frozen=True)
class Ended:
    """How a trial's process ended. code: its exit code, negative for a signal. why: one line, empty where it finished.

    again: whether it may be begun again; memory: whether that was what it lacked.
    """

    code: int
    why: str = ""
    again: bool = False
    memory: bool = False


ADOPTED = {"running": None, "finished": Ended(0)}


@dataclass
class Slot:
    """A place for one trial at a time. cores: what it may run on."""

    cores: tuple[int, ...]
    gpu: str | None = None
    trial: Trial | None = None
    process: subprocess.Popen | None = None
    adopted: int | None = None  # the process of a trial whose launcher died, where it is one of this machine
    begun: float = 0.0
    until: float = float("inf")
    asked: float | None = None  # when it was asked to stop
    why: str = ""

    def start(self, trial: Trial, minutes: float | None) -> None:
        """The trial's process; what it prints goes to output.txt in its folder.

        One that lives already, because the launcher that began it died, is not begun again but waited for.
        """
        self.trial, self.process, self.adopted, self.asked, self.why = trial, None, None, None, ""
        self.begun = time.time()
        self.until = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.adopted = process_of(trial)
        if self.adopted or trial.state() == "running":
            return
        trial.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with (trial.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train", trial.word, *trial.words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        os.sched_setaffinity(self.process.pid, self.cores)

    def stop(self, why: str, *, at_once: bool = False) -> None:
        """Asks for a checkpoint and the end; who does not obey in time is ended."""
        if self.asked is None:
            self.asked, self.why = time.monotonic(), why
            self._send(signal.SIGTERM)
        if at_once or time.monotonic() > self.asked + GRACE_SECONDS:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
        elif self._adopted_lives():
            assert self.adopted
            os.kill(self.adopted, number)

    def _adopted_lives(self) -> bool:
        return bool(self.adopted and self.trial and is_process_of(self.adopted, self.trial))

    def ended(self) -> Ended | None:
        """How the trial has ended; None as long as it lives."""
        assert self.trial
        if time.monotonic() > self.until:
            self.stop(TOO_LONG)
        elif self.asked is not None:
            self.stop(self.why)
        if self.process is None:
            if self._adopted_lives():
                return None
            gone = Ended(1, self.why) if self.why else Ended(1, "the process is gone", again=True)
            return ADOPTED.get(self.trial.state(), gone)
        code = self.process.poll()
        return None if code is None else judge(code, self.why, self.trial, self.begun)


def process_of(trial: Trial) -> int | None:
    """The process on this machine that runs a trial, also where it has not come so far as to hold its lock."""
    numbers = (int(place.name) for place in Path("/proc").glob("[0-9]*"))
    return next((number for number in numbers if is_process_of(number, trial)), None)


def is_process_of(number: int, trial: Trial) -> bool:
    try:
        return trial.word.encode() in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def judge(code: int, asked: str, trial: Trial, begun: float) -> Ended:
    """What an exit code means. asked: why we asked it to stop, if we did; begun: when it was started, in seconds.

    A trial that has finished may still have waited for its record, which is completed without it.
    """
    summary = trial.summary()
    if code == 0 or (summary.get("status") == "finished" and summary["time"] > begun):
        return Ended(0)
    if asked:
        return Ended(code, asked)
    said = last_line(trial.folder / "output.txt")
    if code < 0:
        name = signal.Signals(-code).name
        return Ended(code, f"ended by {name}", again=True, memory=name == "SIGKILL")
    if code in (129, 130, 143):
        return Ended(code, "stopped by somebody else", again=True)
    memory = any(word in said for word in OUT_OF_MEMORY)
    return Ended(code, said or f"exit code {code}", again=memory, memory=memory)


def last_line(path: Path) -> str:
    """The last error that a trial has told, else the last line."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@dataclass
class Slots:
    """All places. minutes: how long a trial may take."""

    number: int
    minutes: float | None = None
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // self.number)
        self.places = [
            Slot(
                tuple(cores[(place * share + core) % len(cores)] for core in range(share)),
                self.gpus[place % len(self.gpus)] if self.gpus else None,
            )
            for place in range(self.number)
        ]

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self.places if slot.trial]

    def work(
        self,
        following: Callable[[], Trial | None],
        told: Callable[[Trial, Ended], bool],
        watch: Callable[[], None],
        wish: Wish,
    ) -> None:
        """Runs what `following` gives until it gives nothing and nothing runs any more.

        following: a trial to be run now; None where there is none until another has ended. told: hears how one has
        ended, and says whether to go on. watch: called ten times a second.
        """
        on = True
        try:
            while True:
                for slot in self.busy:
                    if ended := slot.ended():
                        trial, slot.trial = slot.trial, None
                        on = told(trial, ended) and on  # type: ignore[arg-type]
                on = on and not wish.number
                for slot in self.places:
                    if on and not slot.trial and (trial := following()):
                        slot.start(trial, self.minutes)
                if not self.busy:
                    return
                for slot in () if on else self.busy:
                    slot.stop(STOPPED, at_once=wish.urgent)
                watch()
                time.sleep(POLL_SECONDS)
        finally:
            for slot in self.busy:
                if slot.process:
                    slot.process.kill()


class Wish:
    """What a signal asks of a sweep: to stop after a checkpoint, and by a second one at once. See `Stops`."""

    def __init__(self) -> None:
        self.number, self.urgent, self._noted = 0, False, 0.0

    def _note(self, number: int, _: object) -> None:
        if self.number and Stops.repeats(number, self.number, self._noted):
            return
        self.urgent = bool(self.number)
        self.number, self._noted = number, time.monotonic()

    @contextmanager
    def heard(self) -> Iterator[Wish]:
        """Takes the signals over, and gives them back."""
        with Stops.handled_by(self._note):
            yield self

    def code(self) -> int:
        return 128 + self.number if self.number else 0


def visible_gpus() -> tuple[str, ...]:
    """NVIDIA's, as CUDA_VISIBLE_DEVICES names them; found without loading what would take them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name for name in named.split(",") if name not in ("", "-1"))
    return tuple(str(number) for number, _ in enumerate(sorted(DRIVER.glob("*"))))


def end_with(launcher: int) -> None:
    """This process, a child of the launcher's, gets SIGTERM when the launcher dies, however that is."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGTERM)
