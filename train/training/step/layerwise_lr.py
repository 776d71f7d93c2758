"""Freezing and layer-wise learning rates, by group of layers and fine-tuning stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import keras

from train.training.tensors import Tensor

ALL, UPPER = "all", "upper"


class LayerRate(NamedTuple):
    """The learning rate of a variable relative to the schedule's, and the number of updates before its first."""

    multiplier: float = 1.0
    first_update: int = 0

    def scale(self, learning_rate: Tensor) -> Tensor:
        """The learning rate of the variable. learning_rate: the schedule's."""
        return learning_rate if self.multiplier == 1.0 else learning_rate * self.multiplier


@dataclass(frozen=True)
class FreezeSchedule:
    """Which layer groups are trained in which stage, and at which learning rate.

    layer_groups: from the input to the head. stages: (epochs, first trained group, `all`, or `upper` for the upper
    half); the last one does not end. decay: learning rate of a group relative to that of the next one.
    updates_per_epoch: of the weights.
    """

    layer_groups: dict[str, list[keras.Layer]]
    stages: tuple[tuple[int, str], ...]
    decay: float = 1.0
    updates_per_epoch: float = 1.0
    _trainable_groups: list[list[str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        names = list(self.layer_groups)
        positions = {ALL: 0, UPPER: len(names) // 2} | {name: position for position, name in enumerate(names)}
        self._trainable_groups.extend(names[positions[first_group] :] for _, first_group in self.stages)

    def stage_of(self, epoch: int) -> int:
        """The index of the stage that an epoch, counted from 0, belongs to."""
        ends = accumulate(epochs for epochs, _ in self.stages)
        return next((stage for stage, end in enumerate(ends) if epoch < end), len(self.stages) - 1)

    def trainable_groups(self, stage: int) -> list[str]:
        """The groups that are trained in a stage."""
        return self._trainable_groups[stage]

    def freeze(self, stage: int) -> None:
        """Freezes the weights and normalisation statistics of all other groups than the stage's."""
        for name, layers in self.layer_groups.items():
            for layer in layers:
                layer.trainable = name in self.trainable_groups(stage)

    def lr_multiplier(self, group: str) -> float:
        """The factor of a group's learning rate."""
        return self.decay ** (len(self.layer_groups) - 1 - list(self.layer_groups).index(group))

    def first_update(self, group: str) -> int:
        """The number of updates before the group's first."""
        first_stage = next(stage for stage, names in enumerate(self._trainable_groups) if group in names)
        return int(sum(epochs for epochs, _ in self.stages[:first_stage]) * self.updates_per_epoch)

    def rates(self, stage: int) -> dict[str, LayerRate]:
        """The rates of all variables of the groups that are trained in a stage, by path."""
        return {
            variable.path: LayerRate(self.lr_multiplier(group), self.first_update(group))
            for group in self.trainable_groups(stage)
            for layer in self.layer_groups[group]
            for variable in layer.variables
        }
