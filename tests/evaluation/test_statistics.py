"""train/evaluation/statistics.py, compared with scipy."""

import math

import pytest
from scipy import stats

from support.commands import message
from train.evaluation.statistics import mean_interval, paired_difference

ONE = {0: 0.91, 1: 0.93, 2: 0.90, 3: 0.95, 4: 0.92}
OTHER = {0: 0.90, 1: 0.90, 2: 0.91, 3: 0.93, 5: 0.10}


def test_mean_has_the_t_interval_of_its_sample():
    mean, values = mean_interval(list(ONE.values())), list(ONE.values())
    low, high = stats.t.interval(0.95, 4, loc=0.922, scale=stats.sem(values))
    assert (mean.n, mean.mean, mean.low, mean.high) == pytest.approx((5, 0.922, low, high))
    assert mean.deviation == pytest.approx(stats.tstd(values))
    assert mean.half_width == pytest.approx((high - low) / 2)


def test_single_value_has_no_interval():
    mean = mean_interval([0.5])
    assert (mean.n, mean.mean) == (1, 0.5)
    assert all(map(math.isnan, (mean.deviation, mean.low, mean.high)))
    assert message(mean_interval, []).startswith("a mean needs at least one value")


def test_differences_are_paired_by_common_seeds():
    difference = paired_difference(ONE, OTHER)
    theirs = stats.ttest_rel([ONE[seed] for seed in range(4)], [OTHER[seed] for seed in range(4)])
    interval = theirs.confidence_interval(0.95)
    assert difference is not None
    assert (difference.n, difference.mean) == (4, pytest.approx(0.0125))
    assert (difference.p, difference.low, difference.high) == pytest.approx(
        (theirs.pvalue, interval.low, interval.high)
    )


def test_difference_of_equal_pairs_and_of_none():
    twice = paired_difference({0: 0.5, 1: 0.75}, {0: 0.5, 1: 0.75})
    assert twice is not None
    assert (twice.mean, twice.p, twice.low, twice.high) == (0, 1, 0, 0)
    same = paired_difference({0: 0.75, 1: 1.0}, {0: 0.5, 1: 0.75})
    assert same is not None
    assert (same.mean, same.p) == (0.25, 0)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 1.0}, {0: 0.5})
    assert single is not None
    assert math.isnan(single.p)
