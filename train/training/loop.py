"""The training loop: epochs and batches, what is measured, what is kept, when it stops.

It is ours rather than Keras's because it must be able to stop between any two batches.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop; `number` is the signal, `at_once` whether it must not even save any more.

    `by_all`: all processes of the run stop here.
    """

    def __init__(self, number: int, *, at_once: bool = False, by_all: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.at_once, self.by_all = number, at_once, by_all


class DivergedError(ArithmeticError):
    """A number that the training stands on is no longer finite; `epoch` and `step` are the first where that was so."""

    def __init__(self, what: str, epoch: int, step: int):
        super().__init__(f"{what} must stay finite, but did not in epoch {epoch + 1} at step {step}")
        self.epoch, self.step = epoch, step


class Step(Protocol):
    """What the loop needs of a step; train/step/ has the real ones."""

    notes: Callable[[], int]

    def heard(self) -> int: ...
    def begin_epoch(self, epoch: int) -> bool: ...
    def __call__(self, images: Any, labels: Any) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def reset_metrics(self) -> None: ...
    def learning_rate(self) -> float: ...
    def fault(self) -> tuple[str, int] | None: ...


class Watch(Protocol):
    """Who looks on: the terminal."""

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def epoch(self, epoch: int, values: dict[str, float]) -> None: ...


@dataclass
class Stopper:
    """Early stopping by a metric that should fall (`loss`) or rise (anything else)."""

    metric: str | None
    patience_epochs: int
    min_delta: float

    def look(self, values: dict[str, float], progress: Progress) -> None:
        """Counts the epochs without an improvement, and stops when there were too many."""
        if self.metric is None:
            return
        value = values[self.metric] * (-1 if self.metric.endswith("loss") else 1)
        known = -math.inf if progress.stale_value is None else progress.stale_value + self.min_delta
        if value > known:  # a value that is no number never is
            progress.stale_value, progress.stale_epochs = value, 0
        else:
            progress.stale_epochs += 1
        progress.stopped_early = progress.stale_epochs >= self.patience_epochs


@dataclass
class Clock:
    """Where the time of the training steps went; a life's first step is left out."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def data_wait_fraction(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0

    def add(self, other: Clock) -> None:
        self.images += other.images
        self.seconds += other.seconds
        self.waited += other.waited


@dataclass
class Progress:
    """Where the loop stands between two batches, in numbers; saved with every checkpoint."""

    epoch: int = 0  # epochs behind us
    batch: int = 0  # batches of the next epoch behind us
    steps: int = 0  # steps behind us, over the whole run
    best_epoch: int = -1
    best_accuracy: float = -1.0
    stale_value: float | None = None  # the best value that early stopping knows
    stale_epochs: int = 0
    stopped_early: bool = False
    rollbacks: int = 0
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Progress:
        """From what `dataclasses.asdict` gave."""
        return cls(**content | {"clock": Clock(**content["clock"])})

    @property
    def name(self) -> str:
        """Names sort as places do."""
        return f"epoch-{self.epoch:05d}-batch-{self.batch:07d}"


class Stops:
    """SIGINT, SIGTERM and SIGHUP: at once where nothing can be lost, between two batches within `deferred`.

    A second signal leaves at once in any case. Where Python can't run, in the middle of a long step, it is the process
    that ends a moment later, which loses no more than a kill.
    """

    GRACE_SECONDS = 3.0
    REPEAT_SECONDS = 1.0  # the same one so soon is one wish: it goes to make and to all its children
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._number: int | None = None
        self._noted = 0.0
        self._deferring = False
        self._heard = self.number

    def _note(self, number: int, _: Any) -> None:
        first = self._number is None
        if not first and self.repeats(number, self._number, self._noted):
            return
        self._number, self._noted = number, time.monotonic()
        if not (first and self._deferring):
            raise Interrupted(number, at_once=not first)

    @classmethod
    def repeats(cls, number: int, before: int | None, noted: float) -> bool:
        """Whether a signal asks for no more than the one before, which came at `noted`.

        When a terminal closes, the kernel and the shell each send SIGHUP, and SIGTERM may follow from whoever ends the
        session. SIGHUP comes from no person in a hurry, so it never counts as the second signal.
        """
        if number == signal.SIGHUP:
            return True
        return before in (number, signal.SIGHUP) and time.monotonic() - noted < cls.REPEAT_SECONDS

    @classmethod
    @contextmanager
    def handled_by(cls, handler: Callable[[int, Any], None]) -> Iterator[None]:
        """Takes the signals over, and gives them back. An ignored SIGHUP stays so: that is how nohup is asked for."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in cls.SIGNALS if not (nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)

    def number(self) -> int:
        """Of the signal that has come; 0 for none."""
        return self._number or 0

    def code(self) -> int:
        """The exit code of what was asked; 0 for nothing."""
        return 128 + self._number if self._number is not None else 0

    @contextmanager
    def listening(self) -> Iterator[Stops]:
        """Takes the signals over, and gives them back."""
        with self.handled_by(self._note):
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._leave_at_second, args=(reader,), daemon=True).start()
            try:
                yield self
            finally:
                signal.set_wakeup_fd(former)
                os.close(writer)

    def _leave_at_second(self, reader: int) -> None:
        """In a thread: the number of every signal comes through a pipe, also while the main thread is busy."""
        first: tuple[int, float] | None = None
        while byte := os.read(reader, 1):
            number = byte[0]
            if number not in self.SIGNALS:
                continue
            if first is None:
                first = number, time.monotonic()
            elif not self.repeats(number, *first) and not _closed(reader, self.GRACE_SECONDS):
                os._exit(128 + number)
        os.close(reader)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted here, and obeyed where `obey` is called."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def among(self, step: Step) -> Iterator[None]:
        """A signal to one process of a run is obeyed by all, after the same step: the step tells them."""
        step.notes, self._heard = self.number, step.heard
        try:
            yield
        finally:
            self._heard = self.number

    def obey(self) -> None:
        """Raises: Interrupted if a signal has been noted."""
        if number := self._heard():
            raise Interrupted(number, by_all=self._heard != self.number)

    def heed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, as long as nobody asks to stop."""
        for batch in batches:
            self.obey()
            yield batch


def _closed(reader: int, seconds: float) -> bool:
    """Waits; whether the other end of the pipe was closed meanwhile."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0] and not os.read(reader, 1):
            return True
    return False


class Keeper(Protocol):
    """Who keeps what the loop finds; run.py ties one to the run's folder. heed: what all processes of the run go by."""

    def heed(self, values: dict[str, float]) -> dict[str, float]: ...
    def record(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def keep_best(self, epoch: int, values: dict[str, float]) -> None: ...
    def step_done(self, progress: Progress) -> None: ...
    def due(self, progress: Progress) -> bool: ...
    def save(self, progress: Progress, *, planned: bool) -> None: ...


@dataclass
class Loop:
    """Trains from where `progress` stands, and moves it along, so that it is true at any moment.

    `epochs` of `steps` batches of `batch_size`. `batches(epoch, first)` are those of an epoch from number `first` on.
    Epochs and batches count from 0, steps from 1 over the whole run.
    """

    step: Step
    progress: Progress
    epochs: int
    steps: int
    batch_size: int
    log_every: int
    batches: Callable[[int, int], Iterable[tuple]]
    validate: Callable[[], dict[str, float]]
    keeper: Keeper
    stopper: Stopper
    watch: Watch
    stops: Stops

    def __post_init__(self) -> None:
        self._first_step = self.progress.steps

    def run(self) -> None:
        """To the last epoch, or until the stopper says so.

        Raises: Interrupted between two batches, with a checkpoint made; DivergedError when a number is not finite.
        """
        with self.stops.deferred():
            try:
                while self.progress.epoch < self.epochs and not self.progress.stopped_early:
                    clock = self._train_epoch()
                    self._end_epoch(clock)
                self.save()  # what one may want to train longer from
            except Interrupted as stop:
                if not stop.at_once:
                    self.save(planned=False)
                raise

    def save(self, *, planned: bool = True) -> None:
        """A checkpoint; never one of a state that is broken. `planned`: not because somebody stops the run."""
        self._refuse_divergence()
        self.keeper.save(self.progress, planned=planned)

    def _train_epoch(self) -> Clock:
        """What is left of the epoch."""
        progress = self.progress
        fresh = self.step.begin_epoch(progress.epoch)
        if progress.batch == 0:
            self.step.reset_metrics()
        clock, stream = Clock(), iter(self.batches(progress.epoch, progress.batch))
        start, warm = time.perf_counter(), progress.steps > self._first_step and not fresh
        while True:
            before = time.perf_counter()
            batch = next(stream, None)
            clock.waited += time.perf_counter() - before
            if batch is None:
                break
            self.step(*batch)
            progress.batch += 1
            progress.steps += 1
            clock.images += self.batch_size
            if not warm:  # the first step of a life, and of a stage, is slow: buffers and kernels are made
                clock.images, clock.waited, start, warm = 0, 0.0, time.perf_counter(), True
            self.keeper.step_done(progress)
            self._log()
            if progress.batch < self.steps and self.keeper.due(progress):
                self.save()
            self.stops.obey()
        self.step.metrics()  # waits for the device, so that the time is that of the work
        clock.seconds = time.perf_counter() - start
        return clock

    def _log(self) -> None:
        progress, values = self.progress, {}
        if progress.steps % self.log_every == 0 and progress.batch < self.steps:  # the epoch's own line has its last
            self._refuse_divergence()
            values = {f"train/{name}": value for name, value in self.step.metrics().items()}
            self.keeper.record(progress.epoch, progress.steps, values | {"learning_rate": self.step.learning_rate()})
        self.watch.step(progress.epoch, progress.steps, values)

    def _end_epoch(self, clock: Clock) -> None:
        """Validates, records, keeps the best; from here the next epoch can begin."""
        self._refuse_divergence()
        progress, epoch = self.progress, self.progress.epoch
        values = {f"train/{name}": value for name, value in self.step.metrics().items()}
        values |= {f"validation/{name}": value for name, value in self.validate().items()}
        values |= {
            "learning_rate": self.step.learning_rate(),
            "images_per_second": clock.images_per_second(),
            "data_wait_fraction": clock.data_wait_fraction(),
        }
        values = self.keeper.heed(values)
        self.keeper.record(epoch, progress.steps, values)
        if values["validation/main_accuracy"] > progress.best_accuracy:
            self.keeper.keep_best(epoch, values)
            progress.best_epoch, progress.best_accuracy = epoch, values["validation/main_accuracy"]
        self.stopper.look(values, progress)
        progress.epoch, progress.batch = epoch + 1, 0
        progress.clock.add(clock)
        self.watch.epoch(epoch, values)
        if self.keeper.due(progress):
            self.save()

    def _refuse_divergence(self) -> None:
        found = self.step.fault()
        if found:
            what, step = found
            raise DivergedError(what, (step - 1) // self.steps, step)
