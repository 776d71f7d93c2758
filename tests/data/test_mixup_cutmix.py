"""MixUp and CutMix: images and labels against the definitions, and the distribution of shares."""

import numpy as np
import pytest
import tensorflow as tf

from support.batches import make_augmentation
from support.images import in_map, noise
from train.data.augmentation import mixup_cutmix


def mixed(images, labels, draws, **alphas):
    chosen = mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas))
    actual = chosen.apply(tf.constant(images), tf.constant(labels), tf.constant(draws, tf.float32))
    return tuple(part.numpy() for part in actual)


def some_batch(count=8, side=16, channels=3, classes=5):
    images = np.stack([noise(side, side, channels, seed) for seed in range(count)])
    labels = np.eye(classes, dtype=np.float32)[np.arange(count) % classes]
    return images, labels


def test_mixup_matches_the_definition():
    images, labels = some_batch()
    draws = mixup_cutmix.MixupCutmix(0.4, 0.0).draw(0, 0, 8)
    share = draws[:, :1].astype(float)
    actual, dense = mixed(images, labels, draws, mixup=0.4)
    partner = np.roll(images, -1, axis=0).astype(float)
    expected = share[..., None, None] * images + (1 - share[..., None, None]) * partner
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    np.testing.assert_allclose(dense, share * labels + (1 - share) * np.roll(labels, -1, axis=0), atol=1e-6)
    assert np.abs(dense - labels).max() > 0.1  # labels that are not mixed would be noticed


def test_mixup_of_given_shares_matches_calculations_by_hand():
    images, labels = some_batch(4)
    draws = np.full((4, mixup_cutmix.DRAWS), 0.5, np.float32)
    draws[:, 0] = (1.0, 0.0, 0.5, 0.25)
    actual, dense = mixed(images, labels, draws, mixup=1.0)
    np.testing.assert_array_equal(actual[0], images[0])
    np.testing.assert_array_equal(actual[1], images[2])
    np.testing.assert_array_equal(actual[2], (images[2].astype(float) + images[3]) / 2)
    np.testing.assert_array_equal(actual[3], 0.25 * images[3] + 0.75 * images[0])  # the last one's is the first
    np.testing.assert_array_equal(dense, [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0.5, 0.5, 0], [0.75, 0, 0, 0.25, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix_labels_match_the_fraction_of_pasted_pixels(channels):
    count, side = 64, 16
    images, _ = some_batch(count, side, channels)
    images = images // 2 + 128 * (np.arange(count) % 2).astype(np.uint8)[:, None, None, None]  # who a pixel is of
    labels = np.eye(count, dtype=np.float32)
    actual, dense = mixed(images, labels, mixup_cutmix.MixupCutmix(0.0, 1.0).draw(0, 0, count), cutmix=1.0)
    partner = np.roll(images, -1, axis=0)
    covered = ((actual >= 128) != (np.arange(count) % 2)[:, None, None, None]).all(axis=3)
    np.testing.assert_array_equal(actual, np.where(covered[..., None], partner, images))
    share = covered.mean(axis=(1, 2))
    np.testing.assert_array_equal(dense[np.arange(count), (np.arange(count) + 1) % count], share)
    np.testing.assert_array_equal(dense[np.arange(count), np.arange(count)], 1 - share)
    rows, columns = covered.any(axis=2), covered.any(axis=1)
    np.testing.assert_array_equal(covered, rows[:, :, None] & columns[:, None, :])  # a rectangle
    assert ((share > 0.05) & (share < 0.9)).sum() > 20


def test_cutmix_of_given_rectangles_matches_calculations_by_hand():
    images, labels = some_batch(2, 16)
    draws = np.array([[0.5, 0.75, 0.9, 0.5, 0.25], [0.5, 0.75, 0.0, 0.0, 0.99]], np.float32)  # a quarter of the area
    actual, dense = mixed(images, labels, draws, cutmix=1.0)
    expected = images.astype(np.float32)
    expected[0, 4:12, 0:8] = images[1, 4:12, 0:8]
    expected[1, 0:4, 12:16] = images[0, 0:4, 12:16]
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(dense[:, :2], [[0.75, 0.25], [1 / 16, 15 / 16]])


def test_cutmix_rectangles_have_the_drawn_area_where_they_fit():
    images = np.stack([np.zeros((64, 64, 1), np.uint8), np.ones((64, 64, 1), np.uint8)])
    for kept in (0.1, 0.5, 0.9):
        draws = np.array([[0.5, kept, 0, 0.5, 0.5]] * 2, np.float32)
        actual, _ = mixed(images, np.eye(2, dtype=np.float32), draws, cutmix=1.0)
        assert actual[0].mean() == pytest.approx(1 - kept, abs=0.03)


def test_mixup_and_cutmix_together_are_applied_to_half_the_images_each():
    count = 2000
    images = np.zeros((count, 4, 4, 1), np.uint8)
    images[::2] = 200
    draws = mixup_cutmix.MixupCutmix(1.0, 1.0).draw(0, 0, count)
    actual, dense = mixed(images, np.eye(2, dtype=np.float32)[np.arange(count) % 2], draws, mixup=1.0, cutmix=1.0)
    pasted = draws[:, 2] < 0.5
    assert 0.46 < pasted.mean() < 0.54
    assert np.isin(actual[pasted], [0, 200]).all()
    spread = np.ptp(actual[~pasted], axis=(1, 2, 3))
    assert (spread == 0).all()
    assert not np.isin(actual[~pasted], [0, 200]).all()
    own = dense[np.arange(count), np.arange(count) % 2]
    np.testing.assert_allclose(own[~pasted], draws[~pasted, 0], atol=1e-6)


@pytest.mark.parametrize(("alphas", "only"), [({"mixup": 0.3}, "mixup"), ({"cutmix": 0.7}, "cutmix")])
def test_alpha_of_zero_disables_mixup_or_cutmix(alphas, only):
    chosen = mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas))
    draws = chosen.draw(0, 0, 200)
    images = np.zeros((200, 8, 8, 1), np.uint8)
    images[::2] = 255
    actual, _ = mixed(images, np.eye(2, dtype=np.float32)[np.arange(200) % 2], draws, **alphas)
    uniform = np.ptp(actual, axis=(1, 2, 3)) == 0
    whole = np.isin(actual, [0, 255]).all(axis=(1, 2, 3))
    assert uniform.all() == (only == "mixup")
    assert whole.all() == (only == "cutmix")


def test_no_mixing_without_alphas():
    assert make_augmentation("flip_crop", mixup=0.0, cutmix=0.0).mixup_cutmix is None


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_shares_follow_the_beta_distribution(alpha):
    draws = mixup_cutmix.MixupCutmix(alpha, 2 * alpha).draw(0, 0, 20_000).astype(float)
    assert draws.shape == (20_000, mixup_cutmix.DRAWS)
    for column, own in ((0, alpha), (1, 2 * alpha)):
        assert draws[:, column].mean() == pytest.approx(0.5, abs=0.015)
        assert draws[:, column].var() == pytest.approx(1 / (4 * (2 * own + 1)), rel=0.05)
    for column in (2, 3, 4):
        assert draws[:, column].mean() == pytest.approx(0.5, abs=0.015)
        assert draws[:, column].var() == pytest.approx(1 / 12, rel=0.05)


def test_shares_depend_on_seed_and_epoch_only():
    chosen = mixup_cutmix.MixupCutmix(0.2, 1.0)
    first = chosen.draw(0, 0, 100)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, chosen.draw(0, 0, 100))
    assert (first != chosen.draw(0, 1, 100)).all()
    assert (first != chosen.draw(1, 0, 100)).all()
    np.testing.assert_array_equal(first[:, 2:], mixup_cutmix.MixupCutmix(0.2, 0.0).draw(0, 0, 100)[:, 2:])


@pytest.mark.parametrize("side", [16, 37, 224])
@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixed_labels_sum_to_one_and_pixels_stay_in_range(alphas, side):
    images, labels = some_batch(8, side)
    actual, dense = mixed(
        images, labels, mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas)).draw(0, 0, 8), **alphas
    )
    assert (actual.shape, actual.dtype) == (images.shape, np.float32)
    assert (dense.shape, dense.dtype) == (labels.shape, np.float32)
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-6)
    assert dense.min() >= 0
    assert actual.min() >= 0
    assert actual.max() <= 255
    assert ((dense > 0).sum(axis=1) == 2).any()


def test_mixing_is_the_same_eagerly_and_in_a_map():
    images, labels = some_batch(32)
    chosen = mixup_cutmix.MixupCutmix(0.4, 1.0)
    draws = chosen.draw(0, 0, 32)
    eager = mixed(images, labels, draws, mixup=0.4, cutmix=1.0)
    for one, other in zip(eager, in_map(chosen.apply, images, labels, draws), strict=True):
        np.testing.assert_array_equal(one, other)
