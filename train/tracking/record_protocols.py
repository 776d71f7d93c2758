"""Protocols of what a run's record takes from data set, loop and step, whose packages `tracking` does not import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from train.tracking.run_dir import RunDir


class RecordedSplit(Protocol):
    @property
    def digest(self) -> str: ...

    def load_example(self, index: int) -> np.ndarray: ...


class RecordedDataset(Protocol):
    """`train.data.dataset.Dataset` is one."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def validation(self) -> RecordedSplit: ...

    @property
    def splits(self) -> Mapping[str, RecordedSplit]: ...

    @property
    def split_sizes(self) -> Mapping[str, int]: ...

    @property
    def class_counts(self) -> Mapping[str, list[int]]: ...

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]: ...

    @property
    def leak_counts(self) -> Mapping[str, int]: ...


class RecordedTimer(Protocol):
    def images_per_second(self) -> float: ...

    def data_wait_fraction(self) -> float: ...


class RecordedProgress(Protocol):
    """`train.training.loop.Progress` is one."""

    epoch: int
    steps: int
    rollbacks: int
    stopped_early: bool
    best_epoch: int
    best_accuracy: float
    best_loss: float

    @property
    def timer(self) -> RecordedTimer: ...


class RecordedCheckpoints(Protocol):
    stall_seconds: float


class RecordedState(Protocol):
    """The state of a run after its loop."""

    @property
    def run_dir(self) -> RunDir: ...

    @property
    def progress(self) -> RecordedProgress: ...

    @property
    def checkpoints(self) -> RecordedCheckpoints: ...


class RecordedStep(Protocol):
    def weights_sha256(self) -> str: ...
