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
class Plan:
    """Which parts of the network learn when, and how fast. layers: of each part, from the image on, the head last.

    stages: (epochs, the first part that learns; `all`; or `upper`, the upper half); the last one does not end. decay:
    learning rate of a part as a share of that of the next one. epoch_updates: of the weights in an epoch.
    """

    layers: dict[str, list[keras.Layer]]
    stages: tuple[tuple[int, str], ...]
    decay: float = 1.0
    epoch_updates: float = 1.0
    _free: list[list[str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        names = list(self.layers)
        firsts = {ALL: 0, UPPER: len(names) // 2} | {name: place for place, name in enumerate(names)}
        self._free.extend(names[firsts[part] :] for _, part in self.stages)

    def stage_of(self, epoch: int) -> int:
        ends = accumulate(epochs for epochs, _ in self.stages)
        return next((stage for stage, end in enumerate(ends) if epoch < end), len(self.stages) - 1)

    def free(self, stage: int) -> list[str]:
        """The parts that learn in a stage."""
        return self._free[stage]

    def freeze(self, stage: int) -> None:
        """Their weights stay, and the statistics of their normalisation."""
        for name, layers in self.layers.items():
            for layer in layers:
                layer.trainable = name in self.free(stage)

    def scale(self, part: str) -> float:
        """What the learning rate of a part is multiplied with."""
        return self.decay ** (len(self.layers) - 1 - list(self.layers).index(part))

    def start(self, part: str) -> int:
        """How many updates there were before the part's first."""
        first = next(stage for stage, names in enumerate(self._free) if part in names)
        return int(sum(epochs for epochs, _ in self.stages[:first]) * self.epoch_updates)


@contextmanager
def scaled(optimizer: keras.optimizers.Optimizer, plan: Plan | None, stage: int) -> Iterator[None]:
    """While it lasts, updates and decays of a part are traced with the learning rate times its scale.

    Moments that start later than the run are corrected for their own age (Kingma & Ba 2015, section 3), not the run's.
    Source of scales: Howard & Ruder 2018 (Universal Language Model Fine-tuning), section 3.2.
    """
    if plan is None:
        yield
        return
    update, key = optimizer.update_step, optimizer._var_key  # which knows Keras's variables and TensorFlow's
    parts = {key(v): part for part in plan.free(stage) for layer in plan.layers[part] for v in layer.variables}

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        part = parts[key(variable)]
        update(gradient, variable, learning_rate * plan.scale(part) * correction(optimizer, plan.start(part)))

    def apply_weight_decay(variables: list[Any]) -> None:
        for variable in variables if optimizer.weight_decay else ():
            if optimizer._use_weight_decay(variable):
                rate = ops.cast(optimizer.learning_rate * plan.scale(parts[key(variable)]), variable.dtype)
                variable.assign(variable - variable * ops.cast(optimizer.weight_decay, variable.dtype) * rate)

    own = vars(optimizer).get("update_step")  # somebody else may have put a faster one there
    optimizer.update_step, optimizer._apply_weight_decay = update_step, apply_weight_decay
    try:
        yield
    finally:
        del optimizer.update_step, optimizer._apply_weight_decay
        if own is not None:
            optimizer.update_step = own


def correction(optimizer: keras.optimizers.Optimizer, start: int) -> Any:
    """Adam's correction for moments that are `start` updates younger than the run, over that which it makes itself."""
    if not start or not isinstance(optimizer, keras.optimizers.AdamW):
        return 1.0

    def factor(updates: Any) -> Any:
        return ops.sqrt(1 - optimizer.beta_2**updates) / (1 - optimizer.beta_1**updates)

    updates = ops.cast(optimizer.iterations + 1, "float32")
    return factor(updates - start) / factor(updates)
