"""Freezing and layer-wise learning rates, by group of layers and fine-tuning stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import keras
from keras import ops

ALL, UPPER = "all", "upper"


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


@contextmanager
def layerwise_lr(
    optimizer: keras.optimizers.Optimizer, freeze_schedule: FreezeSchedule | None, stage: int
) -> Iterator[None]:
    """Traces updates and weight decay with the learning rate of each group inside the block.

    Adam moments that start later than the run are bias-corrected for their own age (Kingma & Ba 2015, section 3).
    Source of the multipliers: Howard & Ruder 2018 (Universal Language Model Fine-tuning), section 3.2.
    """
    if freeze_schedule is None:
        yield
        return
    original_update = optimizer.update_step
    key = optimizer._var_key  # the same for a Keras variable and its TensorFlow variable
    groups = {
        key(variable): group
        for group in freeze_schedule.trainable_groups(stage)
        for layer in freeze_schedule.layer_groups[group]
        for variable in layer.variables
    }

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        group = groups[key(variable)]
        rate = learning_rate * freeze_schedule.lr_multiplier(group)
        rate = rate * bias_correction(optimizer, freeze_schedule.first_update(group))
        original_update(gradient, variable, rate)

    def apply_weight_decay(variables: list[Any]) -> None:
        for variable in variables if optimizer.weight_decay else ():
            if optimizer._use_weight_decay(variable):
                multiplier = freeze_schedule.lr_multiplier(groups[key(variable)])
                rate = ops.cast(optimizer.learning_rate * multiplier, variable.dtype)
                variable.assign(variable - variable * ops.cast(optimizer.weight_decay, variable.dtype) * rate)

    replacement = vars(optimizer).get("update_step")  # `fused_kernels` may have set one
    optimizer.update_step, optimizer._apply_weight_decay = update_step, apply_weight_decay
    try:
        yield
    finally:
        del optimizer.update_step, optimizer._apply_weight_decay
        if replacement is not None:
            optimizer.update_step = replacement


def bias_correction(optimizer: keras.optimizers.Optimizer, first_update: int) -> Any:
    """The ratio of Adam's bias correction for moments that start at `first_update` to the one it applies itself."""
    if not first_update or not isinstance(optimizer, keras.optimizers.AdamW):
        return 1.0

    def correction(updates: Any) -> Any:
        return ops.sqrt(1 - optimizer.beta_2**updates) / (1 - optimizer.beta_1**updates)

    updates = ops.cast(optimizer.iterations + 1, "float32")
    return correction(updates - first_update) / correction(updates)
