"""Means over seeds, and differences between variants that were run with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """Of `n` values: `mean`, `deviation` (of the sample; nan for one value) and the 95 % t-interval `low` to `high`."""

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
    """Of pairs; `p` is that of the two-sided paired t-test, nan for one pair."""

    p: float


def mean_interval(values: Sequence[float]) -> Mean:
    """Raises: ValueError for no value."""
    if not len(values):
        raise ValueError("a mean must have at least one value, got none")
    found = np.asarray(values, np.float64)
    n, mean = len(found), float(found.mean())
    if n == 1:
        return Mean(1, mean, math.nan, math.nan, math.nan)
    deviation = float(found.std(ddof=1))
    half = _t_quantile(n - 1) * deviation / math.sqrt(n)
    return Mean(n, mean, deviation, mean - half, mean + half)


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """`one` minus `other` over the seeds that both have; None where there is none. Equal differences have p 0 or 1."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    found = mean_interval([values[seed] - baseline[seed] for seed in seeds])
    if found.n == 1:
        return Difference(**vars(found), p=math.nan)
    if found.deviation == 0:
        return Difference(**vars(found), p=0.0 if found.mean else 1.0)
    from scipy.stats import t

    statistic = found.mean / (found.deviation / math.sqrt(found.n))
    return Difference(**vars(found), p=float(2 * t.sf(abs(statistic), found.n - 1)))


def _t_quantile(degrees_of_freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, degrees_of_freedom))
