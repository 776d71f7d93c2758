"""The training loop: epochs, batches, validation, checkpoints, early stopping and interruption.

It replaces Keras's `fit` because it has to be able to stop, and to resume, between any two batches.
"""

# A resumed run reproduces the bits of an uninterrupted one only if these operations keep their order:
#
# after every batch
#   1. the step updates weights, metrics and its own step count on the device
#   2. Progress.batch and .steps are advanced, so that progress and device state agree from here on
#   3. on_step_end, then the journal line (every `log_every` steps, not after an epoch's last batch)
#   4. the checkpoint, if one is due: it contains the length of the journal, so it must follow the journal line
#   5. a signal is obeyed: its checkpoint contains everything above
# at the end of an epoch
#   1. divergence check, before anything is recorded
#   2. training metrics are read, then validation; all processes adopt the metrics of process 0
#   3. the journal line
#   4. the best weights, then best_epoch, best_accuracy and best_loss, which a resumed run reads from best/model.json
#   5. early stopping, then Progress moves on to the next epoch
#   6. the checkpoint, if one is due
# Metrics are reset when an epoch's first batch begins, not when the last one ends: a checkpoint between two epochs
# holds those of the finished epoch. A run stopped during validation resumes with no batch left, and validates again.
# Every checkpoint is preceded by a divergence check.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from train.storage.json_types import JsonObject
from train.training.early_stopping import EarlyStopping
from train.training.signals import Interrupted, SignalExchange, SignalHandler
from train.training.step_timer import StepTimer
from train.training.tensors import Tensor


class DivergedError(ArithmeticError):
    """A tensor of the training is NaN or infinite; `epoch` (from 0) and `step` (from 1) are where that began."""

    def __init__(self, tensor: str, epoch: int, step: int):
        super().__init__(f"training diverged: non-finite {tensor} at step {step} (epoch {epoch + 1})")
        self.epoch = epoch
        self.step = step


class Step(SignalExchange, Protocol):
    """What the loop needs of a training step; train/training/step/ has the implementations."""

    def begin_epoch(self, epoch: int) -> bool: ...
    def __call__(self, images: Tensor, labels: Tensor, *weights: Tensor) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def reset_metrics(self) -> None: ...
    def learning_rate(self) -> float: ...
    def non_finite(self) -> tuple[str, int] | None: ...


class ProgressDisplay(Protocol):
    """Shows the progress of training to a person."""

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def epoch(self, epoch: int, values: dict[str, float]) -> None: ...


@dataclass
class Progress:
    """The position and the records of the loop between two batches; saved with every checkpoint."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    steps: int = 0  # finished steps of the whole run
    best_epoch: int = -1
    best_accuracy: float = -1.0
    best_loss: float = math.inf  # at best_epoch
    best_metric: float | None = None  # of early stopping; negated where lower is better
    epochs_without_improvement: int = 0
    stopped_early: bool = False
    rollbacks: int = 0
    timer: StepTimer = field(default_factory=StepTimer)

    @classmethod
    def from_dict(cls, values: JsonObject) -> Progress:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values | {"timer": StepTimer(**values["timer"])})

    @property
    def checkpoint_name(self) -> str:
        """Names sort in the order of training."""
        return f"epoch-{self.epoch:05d}-batch-{self.batch:07d}"


class Callbacks(Protocol):
    """Stores what the loop produces; train/run/state.py has the implementations.

    `broadcast_metrics` returns the metrics of process 0, which all processes of a run act on.
    """

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]: ...
    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None: ...
    def save_best(self, epoch: int, values: dict[str, float]) -> None: ...
    def on_step_end(self, progress: Progress) -> None: ...
    def should_checkpoint(self, progress: Progress) -> bool: ...
    def save(self, progress: Progress, *, periodic: bool) -> None: ...


@dataclass
class Loop:
    """Trains from `progress` on, and updates it after every batch.

    `batches(epoch, first)` yields the batches of an epoch from number `first` on. Epochs and batches count from 0,
    steps from 1 over the whole run.
    """

    step: Step
    progress: Progress
    epochs: int
    steps_per_epoch: int
    batch_size: int
    log_every: int
    batches: Callable[[int, int], Iterable[tuple[Tensor, ...]]]
    validate: Callable[[], dict[str, float]]
    callbacks: Callbacks
    early_stopping: EarlyStopping
    display: ProgressDisplay
    signals: SignalHandler

    def __post_init__(self) -> None:
        self._first_step = self.progress.steps

    def run(self) -> None:
        """Trains up to the last epoch, or until early stopping.

        Raises: Interrupted between two batches, after a checkpoint; DivergedError for NaN or infinity.
        """
        with self.signals.deferred():
            try:
                while self.progress.epoch < self.epochs and not self.progress.stopped_early:
                    timer = self._train_epoch()
                    self._end_epoch(timer)
                self.save()  # a finished run can be resumed with more epochs
            except Interrupted as interruption:
                if not interruption.immediate:
                    self.save(periodic=False)
                raise

    def save(self, *, periodic: bool = True) -> None:
        """Saves a checkpoint, unless training has diverged. `periodic`: not made because the run is stopped."""
        self._raise_if_diverged()
        self.callbacks.save(self.progress, periodic=periodic)

    def _train_epoch(self) -> StepTimer:
        """Trains on the remaining batches of the epoch."""
        progress = self.progress
        is_retraced = self.step.begin_epoch(progress.epoch)
        if progress.batch == 0:
            self.step.reset_metrics()
        timer = StepTimer()
        stream = iter(self.batches(progress.epoch, progress.batch))
        start = time.perf_counter()
        is_warm = progress.steps > self._first_step and not is_retraced
        while True:
            wait_start = time.perf_counter()
            batch = next(stream, None)
            timer.wait_seconds += time.perf_counter() - wait_start
            if batch is None:
                break
            self.step(*batch)
            progress.batch += 1
            progress.steps += 1
            timer.images += self.batch_size
            if not is_warm:  # the first step of an attempt or of a stage is slow: it compiles and allocates
                timer = StepTimer()
                start = time.perf_counter()
                is_warm = True
            self.callbacks.on_step_end(progress)
            self._log()
            if progress.batch < self.steps_per_epoch and self.callbacks.should_checkpoint(progress):
                self.save()
            self.signals.raise_if_requested()
        self.step.metrics()  # waits for the device, so that its work is included in the time
        timer.seconds = time.perf_counter() - start
        return timer

    def _log(self) -> None:
        progress = self.progress
        values: dict[str, float] = {}
        is_last_of_epoch = progress.batch >= self.steps_per_epoch  # the line of the epoch contains its metrics
        if progress.steps % self.log_every == 0 and not is_last_of_epoch:
            self._raise_if_diverged()
            values = {f"train/{name}": value for name, value in self.step.metrics().items()}
            logged = values | {"learning_rate": self.step.learning_rate()}
            self.callbacks.log_metrics(progress.epoch, progress.steps, logged)
        self.display.step(progress.epoch, progress.steps, values)

    def _end_epoch(self, timer: StepTimer) -> None:
        """Validates, logs, saves the best weights and a checkpoint, and moves on to the next epoch."""
        self._raise_if_diverged()
        progress = self.progress
        epoch = progress.epoch
        values = {f"train/{name}": value for name, value in self.step.metrics().items()}
        values |= {f"validation/{name}": value for name, value in self.validate().items()}
        values |= {
            "learning_rate": self.step.learning_rate(),
            "images_per_second": timer.images_per_second(),
            "data_wait_fraction": timer.data_wait_fraction(),
        }
        values = self.callbacks.broadcast_metrics(values)
        self.callbacks.log_metrics(epoch, progress.steps, values)
        if values["validation/accuracy"] > progress.best_accuracy:
            self.callbacks.save_best(epoch, values)
            progress.best_epoch = epoch
            progress.best_accuracy = values["validation/accuracy"]
            progress.best_loss = values["validation/loss"]
        self.early_stopping.update(values, progress)
        progress.epoch, progress.batch = epoch + 1, 0
        progress.timer.add(timer)
        self.display.epoch(epoch, values)
        if self.callbacks.should_checkpoint(progress):
            self.save()

    def _raise_if_diverged(self) -> None:
        if non_finite := self.step.non_finite():
            tensor, step = non_finite
            raise DivergedError(tensor, (step - 1) // self.steps_per_epoch, step)
