"""Optimizers and learning rates, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
from keras import ops

NO_DECAY = ("bias", "beta", "gamma")


def sgd(learning_rate, *, momentum: float, nesterov: bool, **common) -> keras.optimizers.Optimizer:
    """Source: Sutskever et al. 2013 for Nesterov's momentum."""
    return keras.optimizers.SGD(learning_rate, momentum=momentum, nesterov=nesterov, **common)


def adamw(learning_rate, *, beta_1: float, beta_2: float, epsilon: float, **common) -> keras.optimizers.Optimizer:
    """Source: Loshchilov & Hutter 2019."""
    common["weight_decay"] = common["weight_decay"] or 0.0  # Keras wants a number here
    return keras.optimizers.AdamW(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **common)


def rmsprop(learning_rate, *, rho: float, momentum: float, epsilon: float, **common) -> keras.optimizers.Optimizer:
    """Source: Szegedy et al. 2016, section 8."""
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
    """An optimizer whose weight decay spares biases and batch normalisation.

    `weight_decay` is decoupled (Loshchilov & Hutter 2019): each step takes `learning_rate * weight_decay` of a weight
    away. `gradient_clip` is the largest global norm. `ema` is the decay of averaged weights, kept beside the weights.

    Raises: ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name}")
    optimizer = OPTIMIZERS[name](
        schedule,
        weight_decay=weight_decay or None,
        global_clipnorm=gradient_clip,
        gradient_accumulation_steps=gradient_accumulation if gradient_accumulation > 1 else None,
        name=name,  # a fixed one: the names of its variables are in checkpoints
        use_ema=ema is not None,
        # Keras averages after every step, also where only each n-th one moves the weights.
        ema_momentum=ema ** (1 / gradient_accumulation) if ema is not None else 0.99,
        **options,
    )
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=list(NO_DECAY))
    return optimizer


# ------------------------------------------------------------------------------------------------------- schedules


class Span(NamedTuple):
    """How long a schedule runs: in all, and one epoch."""

    total_steps: int
    steps_per_epoch: int


def constant(peak: float, _: Span) -> Callable:
    """The peak at every step."""
    return lambda step: peak + 0.0 * step


def cosine(peak: float, span: Span, *, final_fraction: float) -> Callable:
    """Half a cosine from the peak to `final_fraction` of it. Source: Loshchilov & Hutter 2017, without restarts."""
    return keras.optimizers.schedules.CosineDecay(peak, span.total_steps, alpha=final_fraction)


def exponential(peak: float, span: Span, *, factor: float, every_epochs: float) -> Callable:
    """Times `factor` every `every_epochs`, in stairs. Source: Szegedy et al. 2016, section 8."""
    return keras.optimizers.schedules.ExponentialDecay(
        peak, max(1, round(every_epochs * span.steps_per_epoch)), factor, staircase=True
    )


def step(peak: float, span: Span, *, factor: float, milestones: Sequence[float]) -> Callable:
    """Times `factor` at each milestone, a share of the steps."""
    boundaries = [round(share * span.total_steps) for share in milestones]
    values = [peak * factor**n for n in range(len(milestones) + 1)]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


SCHEDULES: dict[str, Callable] = {"constant": constant, "cosine": cosine, "exponential": exponential, "step": step}


class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Follows `decay`, times `factor`, a variable: going back after a divergence lowers it while the run goes on."""

    def __init__(self, decay: Callable):
        self.decay = decay
        self.scale = keras.Variable(1.0, trainable=False, dtype="float32", name="learning_rate_factor")

    def __call__(self, step):
        return self.scale * self.decay(ops.cast(step, "float32"))

    def get_config(self):
        return {"decay": self.decay}


class PiecewiseSchedule:
    """One schedule after the other, each with its own warm-up and counted from its own start."""

    def __init__(self, segments: Sequence[tuple[int, Callable]]):
        """parts: steps and schedule of each."""
        self.segments = segments

    def __call__(self, step):
        start, found = 0, None
        for steps, schedule in self.segments:
            value = schedule(ops.maximum(step - start, 0.0))
            found = value if found is None else ops.where(step >= start, value, found)
            start += steps
        return found


def with_warmup(schedule: Callable, warmup_steps: int) -> Callable:
    """Climbs linearly to `decay`'s first value over `warmup_steps`, then follows it, counted from there."""
    if not warmup_steps:
        return schedule
    return lambda step: schedule(ops.maximum(step - warmup_steps, 0.0)) * ops.minimum((step + 1.0) / warmup_steps, 1.0)


def build_schedule(
    name: str, *, stages: Sequence[tuple[int, float]], steps_per_epoch: int, warmup_epochs: float, **options
) -> ScaledSchedule:
    """Learning rate by step: in every stage (its epochs, its peak) warm-up, then the named schedule over what is left.

    Raises: ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name}")
    warmup_steps, parts = round(warmup_epochs * steps_per_epoch), []
    for epochs, peak in stages:
        span = Span(max(1, epochs * steps_per_epoch - warmup_steps), steps_per_epoch)
        parts.append((epochs * steps_per_epoch, with_warmup(SCHEDULES[name](peak, span, **options), warmup_steps)))
    return ScaledSchedule(PiecewiseSchedule(parts))
