"""Intervals of accuracies, means over seeds, and paired differences between variants that were run with the same seeds.

SciPy is imported where it is used: commands that compute no statistics do not load it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_LEVEL = 0.95  # of every interval
ROUNDING = 1e-12  # differences that are closer than this are equal


@dataclass(frozen=True)
class Mean:
    """The mean of `n` values, their sample standard deviation (nan for one) and the 95 % interval `low` to `high`."""

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


def accuracy_interval(correct: int, examples: int) -> list[float]:
    """Computes Wilson's score interval of an accuracy that was measured on `examples` independent examples.

    Unlike a bootstrap interval it does not vanish where all examples are right: 10 of 10 give 0.72 to 1.
    Source: Wilson 1927; recommended by Brown, Cai & DasGupta 2001, Interval Estimation for a Binomial Proportion.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, examples).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return [float(interval.low), float(interval.high)]


def mean_interval(values: Sequence[float]) -> Mean:
    """Computes the mean and its t-interval. Raises: ValueError if there are no values."""
    if not len(values):
        raise ValueError("a mean needs at least one value, got none")
    array = np.asarray(values, np.float64)
    n = len(array)
    mean = float(array.mean())
    if n == 1:
        return Mean(1, mean, math.nan, math.nan, math.nan)
    deviation = float(array.std(ddof=1))
    half = _t_quantile(n) * deviation / math.sqrt(n)
    return Mean(n, mean, deviation, mean - half, mean + half)


def mean_accuracy(values: Sequence[float]) -> Mean:
    """Computes the mean of accuracies over seeds and its interval, which lies within [0, 1].

    The interval is Wilson's, with the effective sample size that the variance over seeds amounts to, and with the
    t quantile, as for proportions in clustered surveys: a seed is a cluster. Away from 0 and 1 it comes close to
    the t-interval, which can leave [0, 1] with two or three seeds.
    Source: Dean & Pagano 2015, Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys;
    `svyciprop(method="wilson")` of R's package survey.

    Raises: ValueError if there are no values.
    """
    interval = mean_interval(values)
    n, mean, deviation = interval.n, interval.mean, interval.deviation
    if n == 1 or deviation == 0:
        return interval
    ratio = _t_quantile(n) ** 2 * (deviation**2 / n) / (mean * (1 - mean))  # t² / effective sample size
    centre = (mean + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio) / (1 + ratio) * math.sqrt(mean * (1 - mean) + ratio / 4)
    return Mean(n, mean, deviation, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Computes `values` minus `baseline`, {seed: value}, over the seeds that both have; None if they share none.

    If all differences are equal, `p` is 0, or 1 where they are zero.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    pair = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = np.subtract(*pair)
    interval = mean_interval(differences.tolist())
    return Difference(**vars(interval), p=_p_value(*pair))


def _p_value(values: Sequence[float], baseline: Sequence[float]) -> float:
    """That of the two-sided paired t-test; SciPy's is nan, with a warning, for differences without any variance."""
    from scipy.stats import ttest_rel

    differences = np.subtract(values, baseline)
    if len(differences) == 1:
        return math.nan
    if np.ptp(differences) < ROUNDING:
        return 0.0 if abs(differences[0]) > ROUNDING else 1.0
    return float(ttest_rel(values, baseline).pvalue)


def _t_quantile(n: int) -> float:
    """Half the width, in standard errors, of the t-interval of the mean of `n` values."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1))
