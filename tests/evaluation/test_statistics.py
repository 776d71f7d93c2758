"""train/evaluation/statistics.py, compared with published values, tables and SciPy."""

import math
import sys
import warnings

import numpy as np
import pytest
from scipy import stats

from support.commands import message, run_command
from train.evaluation.statistics import accuracy_interval, mean_accuracy, mean_interval, paired_difference

ONE = {0: 0.91, 1: 0.93, 2: 0.90, 3: 0.95, 4: 0.92}
OTHER = {0: 0.90, 1: 0.90, 2: 0.91, 3: 0.93, 5: 0.10}


@pytest.mark.parametrize(
    ("correct", "examples", "low", "high"),
    [  # Newcombe 1998 (Two-sided confidence intervals for the single proportion), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(correct: int, examples: int, low: float, high: float):
    assert accuracy_interval(correct, examples) == pytest.approx([low, high], abs=5e-5)
    assert accuracy_interval(examples - correct, examples) == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_interval_does_not_vanish_where_all_examples_are_right():
    z = 1.959964
    assert accuracy_interval(10, 10) == pytest.approx([10 / (10 + z**2), 1.0], abs=1e-6)  # 0.7225


T_TABLE = {2: 12.706, 3: 4.303, 5: 2.776}  # 97.5 %, by the number of seeds


@pytest.mark.parametrize(
    "values", [(0.3, 0.4), (0.2, 0.9), (0.99, 1.0), (0.97, 0.98, 1.0), (0.0, 0.0, 0.1), (0.91, 0.93, 0.9, 0.95, 0.92)]
)
def test_interval_of_an_accuracy_over_seeds_solves_the_score_equation(values: tuple[float, ...]):
    """Its ends are as many standard errors away from the mean as the t-table says, if the truth is there."""
    mean = np.mean(values)
    interval = mean_accuracy(values)
    assert 0 <= interval.low < mean < interval.high <= 1
    effective_size = mean * (1 - mean) / (np.var(values, ddof=1) / len(values))
    for end in (interval.low, interval.high):
        error = math.sqrt(end * (1 - end) / effective_size)
        assert abs(mean - end) / error == pytest.approx(T_TABLE[len(values)], rel=2e-4)
    assert (interval.n, interval.mean) == (len(values), pytest.approx(mean))
    assert interval.deviation == pytest.approx(np.std(values, ddof=1))


def test_interval_of_an_accuracy_stays_within_0_and_1():
    """With the t-interval as a control, which does not."""
    values = (0.2, 0.6)
    plain = mean_interval(values)
    assert (plain.low, plain.high) == pytest.approx((0.4 - 12.706 * 0.2, 0.4 + 12.706 * 0.2), abs=1e-3)
    interval = mean_accuracy(values)
    by_hand = 0.0058, 0.9870  # t² / effective size = 12.706² * 0.04 / 0.24 = 26.91
    assert (interval.low, interval.high) == pytest.approx(by_hand, abs=1e-4)
    many = [0.90, 0.91, 0.92, 0.93, 0.94] * 4
    assert (mean_accuracy(many).low, mean_accuracy(many).high) == pytest.approx(
        (mean_interval(many).low, mean_interval(many).high), abs=5e-4
    )


def test_equal_accuracies_and_a_single_one_have_the_interval_of_their_mean():
    assert vars(mean_accuracy([1.0, 1.0])) == vars(mean_interval([1.0, 1.0])) == {
        "n": 2, "mean": 1.0, "deviation": 0.0, "low": 1.0, "high": 1.0,
    }  # fmt: skip
    assert all(map(math.isnan, (mean_accuracy([0.5]).low, mean_accuracy([0.5]).high)))
    assert message(mean_accuracy, []).startswith("a mean needs at least one value")


def test_importing_statistics_does_not_load_scipy():
    code = "import sys, train.evaluation.statistics, train.evaluation.metrics; print('scipy' in sys.modules)"
    done = run_command(sys.executable, "-c", code)
    assert (done.code, done.out) == (0, "False\n"), done.err


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


def test_differences_that_are_equal_but_for_rounding_are_equal():
    """SciPy would warn about them, on the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = paired_difference({0: 0.93, 1: 0.92, 2: 0.81}, {0: 0.92, 1: 0.91, 2: 0.80})
        none = paired_difference({0: 0.1 + 0.2, 1: 0.5}, {0: 0.3, 1: 0.5})
    assert same is not None
    assert none is not None
    assert (same.p, none.p) == (0, 1)
