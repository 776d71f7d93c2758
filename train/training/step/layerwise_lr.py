"""Learning rates that differ from part to part of a network, for a step that is traced."""

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
    """Which parts of the network learn when, and how fast. layers: of each part, from the image on, the head last.

    stages: (epochs, the first part that learns; `all`; or `upper`, the upper half); the last one does not end. decay:
    learning rate of a part as a share of that of the next one. epoch_updates: of the weights in an epoch.
    """

    layer_groups: dict[str, list[keras.Layer]]
    stages: tuple[tuple[int, str], ...]
    decay: float = 1.0
    updates_per_epoch: float = 1.0
    _trainable_groups: list[list[str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        names = list(self.layer_groups)
        firsts = {ALL: 0, UPPER: len(names) // 2} | {name: place for place, name in enumerate(names)}
        self._trainable_groups.extend(names[firsts[part] :] for _, part in self.stages)

    def stage_of(self, epoch: int) -> int:
        ends = accumulate(epochs for epochs, _ in self.stages)
        return next((stage for stage, end in enumerate(ends) if epoch < end), len(self.stages) - 1)

    def trainable_groups(self, stage: int) -> list[str]:
        """The parts that learn in a stage."""
        return self._trainable_groups[stage]

    def freeze(self, stage: int) -> None:
        """Their weights stay, and the statistics of their normalisation."""
        for name, layers in self.layer_groups.items():
            for layer in layers:
                layer.trainable = name in self.trainable_groups(stage)

    def lr_multiplier(self, group: str) -> float:
        """What the learning rate of a part is multiplied with."""
        return self.decay ** (len(self.layer_groups) - 1 - list(self.layer_groups).index(group))

    def first_update(self, group: str) -> int:
        """How many updates there were before the part's first."""
        first = next(stage for stage, names in enumerate(self._trainable_groups) if group in names)
        return int(sum(epochs for epochs, _ in self.stages[:first]) * self.updates_per_epoch)


@contextmanager
def layerwise_lr(
    optimizer: keras.optimizers.Optimizer, freeze_schedule: FreezeSchedule | None, stage: int
) -> Iterator[None]:
    """While it lasts, updates and decays of a part are traced with the learning rate times its scale.

    Moments that start later than the run are corrected for their own age (Kingma & Ba 2015, section 3), not the run's.
    Source of scales: Howard & Ruder 2018 (Universal Language Model Fine-tuning), section 3.2.
    """
    if freeze_schedule is None:
        yield
        return
    update, key = optimizer.update_step, optimizer._var_key  # which knows Keras's variables and TensorFlow's
    parts = {
        key(v): part
        for part in freeze_schedule.trainable_groups(stage)
        for layer in freeze_schedule.layer_groups[part]
        for v in layer.variables
    }

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        part = parts[key(variable)]
        update(
            gradient,
            variable,
            learning_rate
            * freeze_schedule.lr_multiplier(part)
            * bias_correction(optimizer, freeze_schedule.first_update(part)),
        )

    def apply_weight_decay(variables: list[Any]) -> None:
        for variable in variables if optimizer.weight_decay else ():
            if optimizer._use_weight_decay(variable):
                rate = ops.cast(
                    optimizer.learning_rate * freeze_schedule.lr_multiplier(parts[key(variable)]), variable.dtype
                )
                variable.assign(variable - variable * ops.cast(optimizer.weight_decay, variable.dtype) * rate)

    own = vars(optimizer).get("update_step")  # somebody else may have put a faster one there
    optimizer.update_step, optimizer._apply_weight_decay = update_step, apply_weight_decay
    try:
        yield
    finally:
        del optimizer.update_step, optimizer._apply_weight_decay
        if own is not None:
            optimizer.update_step = own


def bias_correction(optimizer: keras.optimizers.Optimizer, first_update: int) -> Any:
    """Adam's correction for moments that are `start` updates younger than the run, over that which it makes itself."""
    if not first_update or not isinstance(optimizer, keras.optimizers.AdamW):
        return 1.0

    def factor(updates: Any) -> Any:
        return ops.sqrt(1 - optimizer.beta_2**updates) / (1 - optimizer.beta_1**updates)

    updates = ops.cast(optimizer.iterations + 1, "float32")
    return factor(updates - first_update) / factor(updates)
