"""Optimizers, by name."""

from __future__ import annotations

from collections.abc import Callable

import keras

NO_DECAY = ("bias", "beta", "gamma")


def sgd(learning_rate, *, momentum: float, nesterov: bool, **common) -> keras.optimizers.Optimizer:
    """SGD with momentum. Source: Sutskever et al. 2013 for Nesterov's momentum."""
    return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=nesterov, **common)


def adamw(learning_rate, *, beta_1: float, beta_2: float, epsilon: float, **common) -> keras.optimizers.Optimizer:
    """AdamW. Source: Loshchilov & Hutter 2019."""
    common["weight_decay"] = common["weight_decay"] or 0.0  # Keras rejects None here
    return keras.optimizers.AdamW(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **common)


def rmsprop(learning_rate, *, rho: float, momentum: float, epsilon: float, **common) -> keras.optimizers.Optimizer:
    """RMSprop. Source: Szegedy et al. 2016, section 8."""
    return keras.optimizers.RMSprop(learning_rate, rho=rho, momentum=momentum, epsilon=epsilon, **common)


OPTIMIZERS: dict[str, Callable] = {"sgd": sgd, "adamw": adamw, "rmsprop": rmsprop}


def build_optimizer(
    name: str,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    *,
    weight_decay: float,
    gradient_clip: float | None,
    gradient_accumulation: int,
    ema: float | None,
    **options,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer whose weight decay excludes biases and batch normalisation.

    `weight_decay` is decoupled (Loshchilov & Hutter 2019): each step subtracts `learning_rate * weight_decay` times
    the weight. `gradient_clip`: maximum global norm. `ema`: decay of the averaged weights.

    Raises: ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name}")
    optimizer = OPTIMIZERS[name](
        schedule,
        weight_decay=weight_decay or None,
        global_clipnorm=gradient_clip,
        gradient_accumulation_steps=gradient_accumulation if gradient_accumulation > 1 else None,
        name=name,  # fixed: checkpoints contain the names of its variables
        use_ema=ema is not None,
        # Keras averages after every step, even if only every n-th one updates the weights.
        ema_momentum=ema ** (1 / gradient_accumulation) if ema is not None else 0.99,
        **options,
    )
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=list(NO_DECAY))
    return optimizer
