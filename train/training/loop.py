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

    def __init__(self, signal_number: int, *, immediate: bool = False, all_processes: bool = False):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number, self.immediate, self.all_processes = signal_number, immediate, all_processes


class DivergedError(ArithmeticError):
    """A number that the training stands on is no longer finite; `epoch` and `step` are the first where that was so."""

    def __init__(self, what: str, epoch: int, step: int):
        super().__init__(f"{what} must stay finite, but did not in epoch {epoch + 1} at step {step}")
        self.epoch, self.step = epoch, step


class Step(Protocol):
    """What the loop needs of a step; train/step/ has the real ones."""

    local_signal: Callable[[], int]

    def agreed_signal(self) -> int: ...
    def begin_epoch(self, epoch: int) -> bool: ...
    def __call__(self, images: Any, labels: Any) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def reset_metrics(self) -> None: ...
    def learning_rate(self) -> float: ...
    def non_finite(self) -> tuple[str, int] | None: ...


class ProgressDisplay(Protocol):
    """Who looks on: the terminal."""

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def epoch(self, epoch: int, values: dict[str, float]) -> None: ...


@dataclass
class EarlyStopping:
    """Early stopping by a metric that should fall (`loss`) or rise (anything else)."""

    metric: str | None
    patience_epochs: int
    min_delta: float

    def update(self, values: dict[str, float], progress: Progress) -> None:
        """Counts the epochs without an improvement, and stops when there were too many."""
        if self.metric is None:
            return
        value = values[self.metric] * (-1 if self.metric.endswith("loss") else 1)
        known = -math.inf if progress.best_metric is None else progress.best_metric + self.min_delta
        if value > known:  # a value that is no number never is
            progress.best_metric, progress.epochs_without_improvement = value, 0
        else:
            progress.epochs_without_improvement += 1
        progress.stopped_early = progress.epochs_without_improvement >= self.patience_epochs


@dataclass
class StepTimer:
    """Where the time of the training steps went; a life's first step is left out."""

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def data_wait_fraction(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def add(self, other: StepTimer) -> None:
        self.images += other.images
        self.seconds += other.seconds
        self.wait_seconds += other.wait_seconds


@dataclass
class Progress:
    """Where the loop stands between two batches, in numbers; saved with every checkpoint."""

    epoch: int = 0  # epochs behind us
    batch: int = 0  # batches of the next epoch behind us
    steps: int = 0  # steps behind us, over the whole run
    best_epoch: int = -1
    best_accuracy: float = -1.0
    best_loss: float = math.inf  # of the best accuracy's epoch
    best_metric: float | None = None  # the best value that early stopping knows
    epochs_without_improvement: int = 0
    stopped_early: bool = False
    rollbacks: int = 0
    timer: StepTimer = field(default_factory=StepTimer)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """From what `dataclasses.asdict` gave."""
        return cls(**values | {"timer": StepTimer(**values["timer"])})

    @property
    def checkpoint_name(self) -> str:
        """Names sort as places do."""
        return f"epoch-{self.epoch:05d}-batch-{self.batch:07d}"


class SignalHandler:
    """SIGINT, SIGTERM and SIGHUP: at once where nothing can be lost, between two batches within `deferred`.

    A second signal leaves at once in any case. Where Python can't run, in the middle of a long step, it is the process
    that ends a moment later, which loses no more than a kill.
    """

    GRACE_SECONDS = 3.0
    REPEAT_SECONDS = 1.0  # the same one so soon is one wish: it goes to make and to all its children
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._signal_number: int | None = None
        self._received_at = 0.0
        self._deferring = False
        self._poll_signal = self.received_signal

    def _handle(self, number: int, _: Any) -> None:
        first = self._signal_number is None
        if not first and self.is_repeat(number, self._signal_number, self._received_at):
            return
        self._signal_number, self._received_at = number, time.monotonic()
        if not (first and self._deferring):
            raise Interrupted(number, immediate=not first)

    @classmethod
    def is_repeat(cls, number: int, previous: int | None, received_at: float) -> bool:
        """Whether a signal asks for no more than the one before, which came at `noted`.

        When a terminal closes, the kernel and the shell each send SIGHUP, and SIGTERM may follow from whoever ends the
        session. SIGHUP comes from no person in a hurry, so it never counts as the second signal.
        """
        if number == signal.SIGHUP:
            return True
        return previous in (number, signal.SIGHUP) and time.monotonic() - received_at < cls.REPEAT_SECONDS

    @classmethod
    @contextmanager
    def handler_installed(cls, handler: Callable[[int, Any], None]) -> Iterator[None]:
        """Takes the signals over, and gives them back. An ignored SIGHUP stays so: that is how nohup is asked for."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in cls.SIGNALS if not (nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)

    def received_signal(self) -> int:
        """Of the signal that has come; 0 for none."""
        return self._signal_number or 0

    def exit_code(self) -> int:
        """The exit code of what was asked; 0 for nothing."""
        return 128 + self._signal_number if self._signal_number is not None else 0

    @contextmanager
    def installed(self) -> Iterator[SignalHandler]:
        """Takes the signals over, and gives them back."""
        with self.handler_installed(self._handle):
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._exit_on_second_signal, args=(reader,), daemon=True).start()
            try:
                yield self
            finally:
                signal.set_wakeup_fd(former)
                os.close(writer)

    def _exit_on_second_signal(self, reader: int) -> None:
        """In a thread: the number of every signal comes through a pipe, also while the main thread is busy."""
        first: tuple[int, float] | None = None
        while byte := os.read(reader, 1):
            number = byte[0]
            if number not in self.SIGNALS:
                continue
            if first is None:
                first = number, time.monotonic()
            elif not self.is_repeat(number, *first) and not _wait_for_close(reader, self.GRACE_SECONDS):
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
    def synchronized(self, step: Step) -> Iterator[None]:
        """A signal to one process of a run is obeyed by all, after the same step: the step tells them."""
        step.local_signal, self._poll_signal = self.received_signal, step.agreed_signal
        try:
            yield
        finally:
            self._poll_signal = self.received_signal

    def raise_if_requested(self) -> None:
        """Raises: Interrupted if a signal has been noted."""
        if number := self._poll_signal():
            raise Interrupted(number, all_processes=self._poll_signal != self.received_signal)

    def guard(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, as long as nobody asks to stop."""
        for batch in batches:
            self.raise_if_requested()
            yield batch


def _wait_for_close(reader: int, seconds: float) -> bool:
    """Waits; whether the other end of the pipe was closed meanwhile."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0] and not os.read(reader, 1):
            return True
    return False


class Callbacks(Protocol):
    """Who keeps what the loop finds; run.py ties one to the run's folder. heed: what all processes of the run go by."""

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]: ...
    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def save_best(self, epoch: int, values: dict[str, float]) -> None: ...
    def on_step_end(self, progress: Progress) -> None: ...
    def should_checkpoint(self, progress: Progress) -> bool: ...
    def save(self, progress: Progress, *, periodic: bool) -> None: ...


@dataclass
class Loop:
    """Trains from where `progress` stands, and moves it along, so that it is true at any moment.

    `epochs` of `steps` batches of `batch_size`. `batches(epoch, first)` are those of an epoch from number `first` on.
    Epochs and batches count from 0, steps from 1 over the whole run.
    """

    step: Step
    progress: Progress
    epochs: int
    steps_per_epoch: int
    batch_size: int
    log_every: int
    batches: Callable[[int, int], Iterable[tuple]]
    validate: Callable[[], dict[str, float]]
    callbacks: Callbacks
    early_stopping: EarlyStopping
    display: ProgressDisplay
    signals: SignalHandler

    def __post_init__(self) -> None:
        self._first_step = self.progress.steps

    def run(self) -> None:
        """To the last epoch, or until the stopper says so.

        Raises: Interrupted between two batches, with a checkpoint made; DivergedError when a number is not finite.
        """
        with self.signals.deferred():
            try:
                while self.progress.epoch < self.epochs and not self.progress.stopped_early:
                    clock = self._train_epoch()
                    self._end_epoch(clock)
                self.save()  # what one may want to train longer from
            except Interrupted as stop:
                if not stop.immediate:
                    self.save(periodic=False)
                raise

    def save(self, *, periodic: bool = True) -> None:
        """A checkpoint; never one of a state that is broken. `planned`: not because somebody stops the run."""
        self._raise_if_diverged()
        self.callbacks.save(self.progress, periodic=periodic)

    def _train_epoch(self) -> StepTimer:
        """What is left of the epoch."""
        progress = self.progress
        fresh = self.step.begin_epoch(progress.epoch)
        if progress.batch == 0:
            self.step.reset_metrics()
        clock, stream = StepTimer(), iter(self.batches(progress.epoch, progress.batch))
        start, warm = time.perf_counter(), progress.steps > self._first_step and not fresh
        while True:
            before = time.perf_counter()
            batch = next(stream, None)
            clock.wait_seconds += time.perf_counter() - before
            if batch is None:
                break
            self.step(*batch)
            progress.batch += 1
            progress.steps += 1
            clock.images += self.batch_size
            if not warm:  # the first step of a life, and of a stage, is slow: buffers and kernels are made
                clock.images, clock.wait_seconds, start, warm = 0, 0.0, time.perf_counter(), True
            self.callbacks.on_step_end(progress)
            self._log()
            if progress.batch < self.steps_per_epoch and self.callbacks.should_checkpoint(progress):
                self.save()
            self.signals.raise_if_requested()
        self.step.metrics()  # waits for the device, so that the time is that of the work
        clock.seconds = time.perf_counter() - start
        return clock

    def _log(self) -> None:
        progress, values = self.progress, {}
        if (
            progress.steps % self.log_every == 0 and progress.batch < self.steps_per_epoch
        ):  # the epoch's own line has its last
            self._raise_if_diverged()
            values = {f"train/{name}": value for name, value in self.step.metrics().items()}
            self.callbacks.log_metrics(
                progress.epoch, progress.steps, values | {"learning_rate": self.step.learning_rate()}
            )
        self.display.step(progress.epoch, progress.steps, values)

    def _end_epoch(self, clock: StepTimer) -> None:
        """Validates, records, keeps the best; from here the next epoch can begin."""
        self._raise_if_diverged()
        progress, epoch = self.progress, self.progress.epoch
        values = {f"train/{name}": value for name, value in self.step.metrics().items()}
        values |= {f"validation/{name}": value for name, value in self.validate().items()}
        values |= {
            "learning_rate": self.step.learning_rate(),
            "images_per_second": clock.images_per_second(),
            "data_wait_fraction": clock.data_wait_fraction(),
        }
        values = self.callbacks.broadcast_metrics(values)
        self.callbacks.log_metrics(epoch, progress.steps, values)
        if values["validation/accuracy"] > progress.best_accuracy:
            self.callbacks.save_best(epoch, values)
            progress.best_epoch = epoch
            progress.best_accuracy, progress.best_loss = values["validation/accuracy"], values["validation/loss"]
        self.early_stopping.update(values, progress)
        progress.epoch, progress.batch = epoch + 1, 0
        progress.timer.add(clock)
        self.display.epoch(epoch, values)
        if self.callbacks.should_checkpoint(progress):
            self.save()

    def _raise_if_diverged(self) -> None:
        found = self.step.non_finite()
        if found:
            what, step = found
            raise DivergedError(what, (step - 1) // self.steps_per_epoch, step)
