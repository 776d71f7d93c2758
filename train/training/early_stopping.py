"""Early stopping: ends training when a metric has not improved for a number of epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class EarlyStoppingState(Protocol):
    """The part of the training progress that early stopping reads and updates."""

    best_metric: float | None
    epochs_without_improvement: int
    stopped_early: bool


@dataclass
class EarlyStopping:
    """Stops after `patience_epochs` without an improvement of `metric`: lower for `.../loss`, higher for any other."""

    metric: str | None
    patience_epochs: int
    min_delta: float

    def update(self, values: dict[str, float], progress: EarlyStoppingState) -> None:
        """Counts the epochs without an improvement in `progress`, and sets its `stopped_early`."""
        if self.metric is None:
            return
        value = values[self.metric] * (-1 if self.metric.endswith("loss") else 1)
        threshold = -math.inf if progress.best_metric is None else progress.best_metric + self.min_delta
        if value > threshold:  # False for NaN
            progress.best_metric = value
            progress.epochs_without_improvement = 0
        else:
            progress.epochs_without_improvement += 1
        progress.stopped_early = progress.epochs_without_improvement >= self.patience_epochs
