"""The training loop: epochs and batches, what is measured, what is kept, when it stops.

It is ours rather than Keras's because it must be able to stop between any two batches.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop; `number` is the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


class Step(Protocol):
    """What the loop needs of a step; train/step/ has the real ones."""

    def __call__(self, images: Any, labels: Any) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def reset_metrics(self) -> None: ...
    def learning_rate(self) -> float: ...


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
    best: float | None = None
    stale_epochs: int = 0

    def done(self, values: dict[str, float]) -> bool:
        if self.metric is None:
            return False
        value = values[self.metric] * (-1 if self.metric.endswith("loss") else 1)
        if self.best is None or value > self.best + self.min_delta:
            self.best, self.stale_epochs = value, 0
        else:
            self.stale_epochs += 1
        return self.stale_epochs >= self.patience_epochs


@dataclass
class Clock:
    """Where the time of the training steps went; the first step, which traces the graph, is left out of rates."""

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
class Outcome:
    """What a finished loop reports."""

    epochs: int = 0
    steps: int = 0
    best_epoch: int = -1
    best_accuracy: float = -1.0
    stopped_early: bool = False
    clock: Clock = field(default_factory=Clock)


class Stops:
    """SIGINT and SIGTERM: at once where nothing can be lost, between two batches within `deferred`.

    A second signal leaves at once in any case.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._deferring = False

    def _note(self, number: int, _: Any) -> None:
        first, self._number = self._number is None, number
        if not (first and self._deferring):
            raise Interrupted(number)

    @contextmanager
    def listening(self) -> Iterator[Stops]:
        """Takes the two signals over, and gives them back."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted here, and obeyed where `obey` is called."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def obey(self) -> None:
        """Raises: Interrupted if a signal has been noted."""
        if self._number is not None:
            raise Interrupted(self._number)

    def heed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, as long as nobody asks to stop."""
        for batch in batches:
            self.obey()
            yield batch


def fit(
    step: Step,
    *,
    epochs: int,
    steps: int,
    log_every: int,
    batches: Callable[[int], Iterable[tuple]],
    validate: Callable[[], dict[str, float]],
    record: Callable[[int, int, dict[str, float]], None],
    keep_best: Callable[[int, dict[str, float]], None],
    stopper: Stopper,
    watch: Watch,
    outcome: Outcome,
    stops: Stops,
) -> Outcome:
    """Trains for `epochs` of `steps` batches, or until the stopper says so.

    Fills `outcome` as it goes, so that it is true at any moment.

    Epochs count from 0, steps from 1 over the whole run. `record(epoch, step, values)` gets every measured value.

    Raises: Interrupted between two batches, DivergedError when the loss is not finite.
    """
    with stops.deferred():
        for epoch in range(epochs):
            clock = _train_epoch(step, epoch, batches(epoch), steps, log_every, record, watch, outcome, stops)
            outcome.clock.add(clock)
            values = {f"train/{name}": value for name, value in step.metrics().items()}
            _refuse_divergence(values["train/loss"], epoch, outcome.steps)
            values |= {f"validation/{name}": value for name, value in validate().items()}
            values |= {
                "learning_rate": step.learning_rate(),
                "images_per_second": clock.images_per_second(),
                "data_wait_fraction": clock.data_wait_fraction(),
            }
            record(epoch, outcome.steps, values)
            outcome.epochs = epoch + 1
            if values["validation/main_accuracy"] > outcome.best_accuracy:
                outcome.best_epoch, outcome.best_accuracy = epoch, values["validation/main_accuracy"]
                keep_best(epoch, values)
            watch.epoch(epoch, values)
            if stopper.done(values):
                outcome.stopped_early = True
                break
    return outcome


def _train_epoch(
    step: Step,
    epoch: int,
    batches: Iterable[tuple],
    steps: int,
    log_every: int,
    record: Callable[[int, int, dict[str, float]], None],
    watch: Watch,
    outcome: Outcome,
    stops: Stops,
) -> Clock:
    step.reset_metrics()
    clock, stream = Clock(), iter(batches)
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        batch = next(stream, None)
        clock.waited += time.perf_counter() - before
        if batch is None:
            break
        step(*batch)
        outcome.steps += 1
        clock.images += len(batch[0])
        if outcome.steps == 1:
            clock.images, clock.waited, start = 0, 0.0, time.perf_counter()
        values: dict[str, float] = {}
        if outcome.steps % log_every == 0 and outcome.steps % steps:  # the epoch's own line has its last step
            values = {f"train/{name}": value for name, value in step.metrics().items()}
            record(epoch, outcome.steps, {**values, "learning_rate": step.learning_rate()})
            _refuse_divergence(values["train/loss"], epoch, outcome.steps)
        watch.step(epoch, outcome.steps, values)
        stops.obey()
    step.metrics()  # waits for the device, so that the time is that of the work
    clock.seconds = time.perf_counter() - start
    return clock


def _refuse_divergence(loss: float, epoch: int, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise DivergedError(
            f"train/loss must stay finite, got {loss} in epoch {epoch + 1} at step {step}; "
            "use a lower optimizer.learning_rate, a gradient_clip, or precision=float32"
        )
