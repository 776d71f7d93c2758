"""Optimizers, by name."""

from __future__ import annotations

import keras

from train.training.step.staged_optimizer import SGD, AdamW, RMSprop, StagedOptimizer

OPTIMIZERS: dict[str, type[StagedOptimizer]] = {"sgd": SGD, "adamw": AdamW, "rmsprop": RMSprop}


def build_optimizer(
    name: str,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    *,
    weight_decay: float,
    gradient_clip: float | None,
    gradient_accumulation: int,
    ema: float | None,
    **options: object,
) -> StagedOptimizer:
    """Builds an optimizer whose weight decay excludes biases and batch normalisation.

    `weight_decay` is decoupled (Loshchilov & Hutter 2019): each step subtracts `learning_rate * weight_decay` times
    the weight. `gradient_clip`: maximum global norm. `ema`: decay of the averaged weights.

    Raises: ValueError for an unknown name.
    """
    return optimizer_class(name)(
        schedule,
        weight_decay=weight_decay,
        global_clipnorm=gradient_clip,
        gradient_accumulation_steps=gradient_accumulation if gradient_accumulation > 1 else None,
        name=name,  # fixed: checkpoints contain the names of its variables
        use_ema=ema is not None,
        # Keras averages after every step, even if only every n-th one updates the weights.
        ema_momentum=ema ** (1 / gradient_accumulation) if ema is not None else 0.99,
        **options,
    )


def optimizer_class(name: str) -> type[StagedOptimizer]:
    """The optimizer of this name for Keras's backend. Raises: ValueError for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name}")
    if keras.backend.backend() == "tensorflow":
        from train.training.step.fused_updates import FUSED_OPTIMIZERS

        return FUSED_OPTIMIZERS[name]
    return OPTIMIZERS[name]
