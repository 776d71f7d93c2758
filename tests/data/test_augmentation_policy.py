"""Augmentations by name; shifts, flips and erasing, each against its definition."""

import numpy as np
import pytest
import tensorflow as tf

from support.batches import make_augmentation
from support.commands import message
from support.images import in_map, noise
from train.data import sampling
from train.data.augmentation import mixup_cutmix, policy, randaugment, random_resized_crop

CENTRE = 0.5
LOWEST, HIGHEST = 0.0, 0.999


# ------------------------------------------------------------------------------------------------------------ by name


def test_unknown_augmentation_is_rejected():
    assert message(policy.build, "flipcrop", erase=0.0, mixup=0.0, cutmix=0.0) == (
        "augment must be one of none, crop, flip_crop, inception, randaugment, got flipcrop; use augment=crop"
    )


def test_every_name_has_its_stages():
    def stages(name, **options):
        built = make_augmentation(name, **options)
        return (
            built.random_resized_crop,
            built.randaugment,
            [move.purpose for move in built.batch_ops],
            built.mixup_cutmix,
        )

    assert stages("none") == (None, None, [], None)
    assert stages("crop") == stages("flip_crop") == (None, None, ["augment"], None)
    assert stages("inception") == (random_resized_crop.RandomResizedCrop(0.08, 4 / 3, 1.0, True), None, [], None)
    assert stages("randaugment") == (None, randaugment.RandAugment(2, 9.0), ["augment"], None)
    mixed = (None, None, ["augment", "erase"], mixup_cutmix.MixupCutmix(0.2, 1.0))
    assert stages("crop", erase=0.25, mixup=0.2, cutmix=1.0) == mixed
    assert stages("none", cutmix=0.5)[3] == mixup_cutmix.MixupCutmix(0.0, 0.5)


def test_options_reach_their_stage():
    assert make_augmentation(
        "inception", least_area=0.3, most_stretch=2.0, color=0.5, mirror=False
    ).random_resized_crop == random_resized_crop.RandomResizedCrop(0.3, 2.0, 0.5, False)
    built = make_augmentation("randaugment", ops=3, magnitude=15.0, pad=0.25, mirror=False)
    assert built.randaugment == randaugment.RandAugment(3, 15.0)
    assert built.batch_ops[0].apply.keywords == {"pad": 0.25, "mirror": False}
    assert make_augmentation("flip_crop", pad=0.0).batch_ops[0].apply.keywords == {"pad": 0.0, "mirror": True}
    assert make_augmentation("none", erase=0.3).batch_ops[0].apply.keywords == {"probability": 0.3}
    with pytest.raises(TypeError, match="magnitude"):
        make_augmentation("crop", magnitude=3)


# ------------------------------------------------------------------------------------------------------------- shifts


def shift(images, draws, name="crop", **options):
    [move] = make_augmentation(name, **options).batch_ops
    return move.apply(images, draws)


def shifted(image, down, right, mirror):
    """The definition, for one image that moves by `down` and `right` pixels."""
    border = 2
    padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="reflect")
    if mirror:
        padded = padded[:, ::-1]
    top, left = border - down, border - right
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


@pytest.mark.parametrize(
    ("draw", "moved"),
    [
        ((CENTRE, CENTRE, HIGHEST), (0, 0, False)),
        ((LOWEST, CENTRE, HIGHEST), (2, 0, False)),
        ((HIGHEST, CENTRE, HIGHEST), (-2, 0, False)),
        ((CENTRE, LOWEST, HIGHEST), (0, 2, False)),
        ((HIGHEST, LOWEST, HIGHEST), (-2, 2, False)),
        ((CENTRE, CENTRE, LOWEST), (0, 0, True)),
    ],
)
def test_flip_crop_moves_pixels(draw, moved):
    image = noise(16, 16, 3)
    draws = np.array([draw], np.float32)
    np.testing.assert_array_equal(shift(image[None], draws, "flip_crop")[0], shifted(image, *moved))
    without = shifted(image, moved[0], moved[1], False)
    np.testing.assert_array_equal(shift(image[None], draws)[0], without)
    assert (shifted(image, *moved) != image).any() == (moved != (0, 0, False))


BATCH_OPS = {
    "crop": make_augmentation("crop").batch_ops[0],
    "flip_crop": make_augmentation("flip_crop").batch_ops[0],
    "randaugment": make_augmentation("randaugment").batch_ops[0],
    "erase": make_augmentation("none", erase=0.5).batch_ops[0],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(BATCH_OPS))
def test_batch_ops_are_the_same_eagerly_and_in_a_map(name, channels):
    move = BATCH_OPS[name]
    images = np.stack([noise(16, 16, channels, seed) for seed in range(32)])
    draws = sampling.uniform_rows(0, move.purpose, 0, 32, move.num_draws)
    eager = move.apply(tf.constant(images), tf.constant(draws))
    np.testing.assert_array_equal(eager, in_map(move.apply, images, draws))
    assert eager.dtype == tf.uint8
    assert eager.shape == images.shape
    alone = [move.apply(images[i : i + 1], draws[i : i + 1])[0] for i in range(32)]
    np.testing.assert_array_equal(eager, np.stack(alone))  # whatever else is in the batch
    assert (eager.numpy() != images).any()
    assert (eager.numpy() != move.apply(images, draws[::-1]).numpy()).any()


def test_shifts_and_flips_are_uniform():
    images = np.zeros((4000, 16, 16, 1), np.uint8)
    images[:, 8, 8] = 255  # where it lands tells the shift
    draws = sampling.uniform_rows(0, "augment", 0, 4000, policy.SHIFT_DRAWS)
    moved = shift(images, draws).numpy()[..., 0]
    counts = (moved == 255).sum(axis=0)
    assert (counts[6:11, 6:11] > 100).all()
    assert counts[6:11, 6:11].sum() == counts.sum() == 4000
    mirrored = shift(images, draws, "flip_crop", pad=0).numpy()[:, 8, 7, 0] == 255
    assert 0.47 < mirrored.mean() < 0.53


def test_pad_out_of_range_is_rejected():
    for wrong in (0.6, -0.1):
        assert message(shift, np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 3), np.float32), pad=wrong) == (
            f"augment.pad must be in 0..0.5 (fraction of the side), got {wrong}; use augment.pad=0.125"
        )


# ------------------------------------------------------------------------------------------------------------ erasing


COVER = 251  # nothing in the images below is of this value


def erased(images, draws, probability=1.0):
    return policy.random_erasing(images, draws, probability=probability).numpy()


def erase_draws(count, seed=0):
    return sampling.uniform_rows(seed, "erase", 0, count, policy.ERASE_DRAWS)


def backgrounds(count, side, channels=1):
    return np.random.default_rng(1).integers(0, COVER, (count, side, side, channels), dtype=np.uint8)


def covering(draws, channels=1):
    """The same draws, with COVER as the colour."""
    draws = draws.copy()
    draws[:, 5 : 5 + channels] = (COVER + 0.5) / 256
    return draws


def test_erasing_covers_one_rectangle_of_the_right_size():
    side, images = 128, backgrounds(500, 128)
    actual = erased(images, covering(erase_draws(500)))
    covered = (actual == COVER)[..., 0]
    np.testing.assert_array_equal(actual[~covered], images[~covered])
    rows, columns = covered.any(axis=2), covered.any(axis=1)
    np.testing.assert_array_equal(covered, rows[:, :, None] & columns[:, None, :])
    for marked in (rows, columns):  # in one piece
        assert (np.abs(np.diff(np.pad(marked, ((0, 0), (1, 1))).astype(int), axis=1)).sum(axis=1) == 2).all()
    height, width = rows.sum(axis=1), columns.sum(axis=1)
    assert (height * width >= 0.02 * side**2 - (height + width) / 2).all()  # whole pixels: half of one at each edge
    assert (height * width <= 0.4 * side**2 + (height + width) / 2).all()
    assert (height / width >= 0.3 * 0.9).all()
    assert (height / width <= 1 / 0.3 * 1.1).all()
    share = height * width / side**2
    assert 0.19 < share.mean() < 0.22  # 0.21, less what would be higher than the image
    assert share.max() > 0.38
    assert share.min() < 0.03


def test_erased_rectangles_reach_every_place():
    often = (erased(backgrounds(4000, 16), covering(erase_draws(4000))) == COVER)[..., 0].mean(axis=0)
    for turned in (often[::-1], often[:, ::-1], often.T):
        np.testing.assert_allclose(often, turned, atol=0.05)
    assert often.min() > 0.003  # few reach into a corner


@pytest.mark.parametrize("channels", [1, 3])
def test_erased_rectangle_has_one_colour(channels):
    images, draws = backgrounds(200, 32, channels), erase_draws(200)
    actual = erased(images, draws)
    changed = (erased(images, covering(draws, channels)) == COVER).all(axis=3)
    colors = np.floor(draws[:, 5 : 5 + channels] * 256)
    expected = np.broadcast_to(colors[:, None, None], images.shape)
    np.testing.assert_array_equal(actual[changed], expected[changed])
    np.testing.assert_array_equal(actual[~changed], images[~changed])
    assert colors.min() < 3
    assert colors.max() > 252
    if channels == 3:
        assert len({tuple(color) for color in colors}) == 200


def test_fraction_of_erased_images_is_the_probability():
    images, draws = backgrounds(4000, 16), covering(erase_draws(4000))

    def share(probability):
        return (erased(images, draws, probability) != images).any(axis=(1, 2, 3)).mean()

    assert share(0.0) == 0
    assert 0.47 < share(0.5) < 0.53
    assert share(1.0) == 1
    few, many = (erased(images, draws, probability) != images for probability in (0.5, 1.0))
    np.testing.assert_array_equal(few, many & (draws[:, 0] < 0.5)[:, None, None, None])


def test_erase_probability_of_zero_adds_no_batch_op():
    assert make_augmentation("none", erase=0.0).batch_ops == ()
