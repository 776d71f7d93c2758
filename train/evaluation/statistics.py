"""Means over seeds, and paired differences between variants that were run with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of `n` values, their sample standard deviation (nan for one) and the 95 % t-interval `low` to `high`."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference(Mean):
    """The mean difference of `n` pairs; `p` is that of the two-sided paired t-test, nan for one pair."""

    p: float


def mean_interval(values: Sequence[float]) -> Mean:
    """Computes the mean and its interval. Raises: ValueError if there are no values."""
    if not len(values):
        raise ValueError("a mean needs at least one value, got none")
    array = np.asarray(values, np.float64)
    n = len(array)
    mean = float(array.mean())
    if n == 1:
        return Mean(1, mean, math.nan, math.nan, math.nan)
    deviation = float(array.std(ddof=1))
    half = _t_quantile(n - 1) * deviation / math.sqrt(n)
    return Mean(n, mean, deviation, mean - half, mean + half)


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Computes `values` minus `baseline`, {seed: value}, over the seeds that both have; None if they share none.

    If all differences are equal, `p` is 0, or 1 where they are zero.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    interval = mean_interval([values[seed] - baseline[seed] for seed in seeds])
    if interval.n == 1:
        return Difference(**vars(interval), p=math.nan)
    if interval.deviation == 0:
        return Difference(**vars(interval), p=0.0 if interval.mean else 1.0)
    from scipy.stats import t

    statistic = interval.mean / (interval.deviation / math.sqrt(interval.n))
    return Difference(**vars(interval), p=float(2 * t.sf(abs(statistic), interval.n - 1)))


def _t_quantile(degrees_of_freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, degrees_of_freedom))
