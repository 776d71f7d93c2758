"""The order of an epoch, and random draws: functions of seed, purpose and epoch alone."""

import numpy as np
import pytest

from support.batches import INCEPTION
from train.data import sampling
from train.data.augmentation import random_resized_crop


def test_permutation_has_every_index_once_and_differs_by_epoch_and_seed():
    first = sampling.permutation(0, 0, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(first, sampling.permutation(0, 0, 1000))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != sampling.permutation(seed, epoch, 1000)).mean() > 0.99


def test_draws_match_golden_values():
    np.testing.assert_array_equal(sampling.permutation(0, 0, 8), [5, 1, 6, 7, 0, 2, 4, 3])
    np.testing.assert_array_equal(
        sampling.balanced_order(0, 0, np.array([0, 0, 0, 0, 0, 1, 2, 2])), [0, 2, 5, 7, 6, 3, 5, 5]
    )
    np.testing.assert_array_equal(
        sampling.uniform_rows(3, "augment", 2, 10, 3)[0], np.array([0.8530739, 0.56678474, 0.8276501], np.float32)
    )
    np.testing.assert_array_equal(
        sampling.uniform_rows(3, "crop", 2, 10, 3)[0], np.array([0.09266347, 0.8025931, 0.58499205], np.float32)
    )
    draws = sampling.uniform_rows(3, "crop", 2, 10, random_resized_crop.DRAWS)
    np.testing.assert_array_equal(
        INCEPTION.random_resized_crop.sample_boxes(np.array([[900, 1200]] * 10), draws)[0], [300, 297, 387, 461]
    )


def test_another_column_of_draws_leaves_the_others_unchanged():
    wide, narrow = sampling.uniform_rows(3, "augment", 2, 10, 3), sampling.uniform_rows(3, "augment", 2, 10, 2)
    np.testing.assert_array_equal(wide[:, :2], narrow)
    assert wide.dtype == np.float32
    assert wide.min() >= 0
    assert wide.max() < 1
    assert (wide != sampling.uniform_rows(3, "other", 2, 10, 3)).all()


def test_draws_of_seeds_purposes_and_epochs_differ():
    rows = {
        sampling.uniform_rows(seed, purpose, epoch, 1, 3).tobytes()
        for seed in range(10)
        for purpose in ("crop", "mix")
        for epoch in range(10)
    }
    assert len(rows) == 200


@pytest.mark.parametrize("counts", [(20, 50, 90), (1, 1, 98), (7, 7, 7), (3, 0, 97), (1, 2, 2)])
def test_balanced_order_has_every_class_equally_often(counts):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    drawn = sampling.balanced_order(0, 0, labels)
    assert drawn.shape == labels.shape
    often = np.bincount(labels[drawn], minlength=3)[np.array(counts) > 0]
    assert often.max() - often.min() <= 1
    times = np.bincount(drawn, minlength=len(labels))
    for label in np.unique(labels):  # each before one comes again
        assert np.ptp(times[labels == label]) <= 1


def test_permutation_is_not_balanced():
    labels = np.repeat([0, 1, 2], (20, 50, 90))
    often = np.bincount(labels[sampling.permutation(0, 0, 160)])
    np.testing.assert_array_equal(often, [20, 50, 90])
    np.testing.assert_array_equal(np.sort(np.bincount(labels[sampling.balanced_order(0, 0, labels)])), [53, 53, 54])


def test_balanced_order_is_mixed_and_depends_on_seed_and_epoch():
    labels = np.repeat([0, 1, 2], (20, 50, 90))
    first = sampling.balanced_order(0, 0, labels)
    np.testing.assert_array_equal(first, sampling.balanced_order(0, 0, labels))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != sampling.balanced_order(seed, epoch, labels)).mean() > 0.9
    in_large = [
        set(sampling.balanced_order(0, epoch, labels)[labels[sampling.balanced_order(0, epoch, labels)] == 2])
        for epoch in (0, 1)
    ]
    assert in_large[0] != in_large[1]  # others are left out the next time
    for quarter in np.split(labels[first], 4):
        assert set(quarter) == {0, 1, 2}
