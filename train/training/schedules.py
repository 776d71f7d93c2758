"""Learning rate schedules, by name, with warm-up and fine-tuning stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
from keras import ops

from train.training.tensors import Tensor

Decay = Callable[[Tensor], Tensor]  # from the step, float32 [], to the learning rate, float32 []


class Span(NamedTuple):
    """The length of a schedule and of an epoch, in steps."""

    total_steps: int
    steps_per_epoch: int


def constant(peak: float, _: Span) -> Decay:
    """The peak learning rate at every step."""
    return lambda step: peak + 0.0 * step


def cosine(peak: float, span: Span, *, final_fraction: float) -> Decay:
    """Half a cosine from the peak to `final_fraction` of it. Source: Loshchilov & Hutter 2017, without restarts."""
    return keras.optimizers.schedules.CosineDecay(peak, span.total_steps, alpha=final_fraction)


def exponential(peak: float, span: Span, *, factor: float, every_epochs: float) -> Decay:
    """Multiplies the rate by `factor` every `every_epochs`, in steps. Source: Szegedy et al. 2016, section 8."""
    return keras.optimizers.schedules.ExponentialDecay(
        peak, max(1, round(every_epochs * span.steps_per_epoch)), factor, staircase=True
    )


def step(peak: float, span: Span, *, factor: float, milestones: Sequence[float]) -> Decay:
    """Multiplies the rate by `factor` at each milestone, a fraction of all steps."""
    boundaries = [round(fraction * span.total_steps) for fraction in milestones]
    values = [peak * factor**n for n in range(len(milestones) + 1)]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


SCHEDULES: dict[str, Callable[..., Decay]] = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
}


class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times `scale`, a variable that rollbacks after a divergence lower during the run."""

    def __init__(self, decay: Decay):
        self.decay = decay
        self.scale = keras.Variable(1.0, trainable=False, dtype="float32", name="learning_rate_factor")

    def __call__(self, step: Tensor) -> Tensor:
        return self.scale * self.decay(ops.cast(step, "float32"))

    def get_config(self) -> dict[str, object]:
        return {"decay": self.decay}


class PiecewiseSchedule:
    """Schedules in sequence, each counted from its own start."""

    def __init__(self, segments: Sequence[tuple[int, Decay]]):
        """segments: number of steps and schedule of each."""
        self.segments = segments

    def __call__(self, step: Tensor) -> Tensor:
        start = 0
        rate = None
        for steps, schedule in self.segments:
            value = schedule(ops.maximum(step - start, 0.0))
            rate = value if rate is None else ops.where(step >= start, value, rate)
            start += steps
        return rate


def with_warmup(schedule: Decay, warmup_steps: int) -> Decay:
    """Rises linearly to the first value of `schedule` over `warmup_steps`, then follows it from its start."""
    if not warmup_steps:
        return schedule
    return lambda step: schedule(ops.maximum(step - warmup_steps, 0.0)) * ops.minimum((step + 1.0) / warmup_steps, 1.0)


def build_schedule(
    name: str, *, stages: Sequence[tuple[int, float]], steps_per_epoch: int, warmup_epochs: float, **options: object
) -> ScaledSchedule:
    """Builds the learning rate by step: every stage (epochs, peak) has a warm-up, then the named schedule.

    Raises: ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name}")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    segments = []
    for epochs, peak in stages:
        span = Span(max(1, epochs * steps_per_epoch - warmup_steps), steps_per_epoch)
        schedule = with_warmup(SCHEDULES[name](peak, span, **options), warmup_steps)
        segments.append((epochs * steps_per_epoch, schedule))
    return ScaledSchedule(PiecewiseSchedule(segments))
