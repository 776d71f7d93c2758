"""RandAugment: every operation against its definition, and how operations are drawn."""

import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from support.images import noise, photo
from train.data import sampling
from train.data.augmentation import randaugment

NAMES = tuple(randaugment.OPERATIONS)
WITHOUT_STRENGTH = ("identity", "autocontrast", "equalize")
ONE_DIRECTION = ("solarize", "posterize")
BOTH_DIRECTIONS = tuple(name for name in NAMES if name not in WITHOUT_STRENGTH + ONE_DIRECTION)
FORTH, BACK = 0.0, 0.999


def painted(pixels, *names, magnitude=30.0, direction=FORTH):
    draws = np.array([((NAMES.index(name) + 0.5) / len(NAMES), direction) for name in names], np.float32)
    return randaugment.RandAugment(len(names), magnitude).apply(pixels, draws.ravel())


def test_there_are_fourteen_operations():
    assert len(NAMES) == 14
    assert len(BOTH_DIRECTIONS) == 9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_operation_keeps_shape_and_type_and_does_not_change_its_input(name, channels):
    pixels = photo(24, 24, channels) // 2 + 30
    before = pixels.copy()
    for magnitude in (0.0, 9.0, 30.0):
        for direction in (FORTH, BACK):
            actual = painted(pixels, name, magnitude=magnitude, direction=direction)
            assert actual.shape == (24, 24, channels)
            assert actual.dtype == np.uint8
            np.testing.assert_array_equal(actual, painted(pixels, name, magnitude=magnitude, direction=direction))
    np.testing.assert_array_equal(pixels, before)
    idle = name == "identity" or (name == "color" and channels == 1)
    assert (painted(pixels, name) != pixels).any() == (not idle)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ONE_DIRECTION + BOTH_DIRECTIONS)
def test_magnitude_of_zero_changes_nothing(name, channels):
    pixels = noise(24, 24, channels)
    for direction in (FORTH, BACK):
        np.testing.assert_array_equal(painted(pixels, name, magnitude=0.0, direction=direction), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_directions_differ_for_operations_with_two(name):
    pixels = photo(24, 24)
    for magnitude in (9.0, 30.0):
        forth, back = (painted(pixels, name, magnitude=magnitude, direction=way) for way in (FORTH, BACK))
        assert (forth != back).any() == (name in BOTH_DIRECTIONS)


@pytest.mark.parametrize("name", ONE_DIRECTION + BOTH_DIRECTIONS)
def test_more_magnitude_changes_more(name):
    pixels = (noise(64, 64, 3) if name == "sharpness" else photo(64, 64)).astype(float)
    far = [np.abs(painted(pixels.astype(np.uint8), name, magnitude=m) - pixels).mean() for m in (0.0, 10.0, 20.0, 30.0)]
    assert far == sorted(far)
    assert far[0] == 0
    assert far[3] > far[1] > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_translation_moves_the_image_and_fills_with_grey(channels):
    pixels = noise(20, 20, channels)
    expected = np.full_like(pixels, 128)
    expected[:, :11] = pixels[:, 9:]  # 0.45 of 20 pixels
    np.testing.assert_array_equal(painted(pixels, "translate_x"), expected)
    expected = np.full_like(pixels, 128)
    expected[9:] = pixels[:11]
    np.testing.assert_array_equal(painted(pixels, "translate_y", direction=BACK), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_shear_moves_the_edges_and_not_the_middle(channels):
    pixels = np.zeros((41, 41, channels), np.uint8)
    pixels[:, 20] = 255
    actual = painted(pixels, "shear_x")
    for row in (0, 10, 20, 30, 40):
        middle = (actual[row, :, 0] == 255).nonzero()[0]
        brightest = actual[row, :, 0].astype(int).argmax() if not len(middle) else middle.mean()
        assert abs(brightest - (20 - 0.3 * (row - 20))) <= 1
    turned = painted(pixels.swapaxes(0, 1), "shear_y")
    np.testing.assert_array_equal(turned.swapaxes(0, 1), actual)


def test_rotation_is_thirty_degrees_in_both_directions():
    pixels = np.zeros((61, 61, 1), np.uint8)
    pixels[29:32, 48:53] = 255  # 20 pixels right of the middle
    for direction, way in ((FORTH, -1), (BACK, 1)):
        actual = painted(pixels, "rotate", direction=direction)[..., 0]
        position = np.average(np.argwhere(actual == 255), axis=0) - 30
        assert math.degrees(math.atan2(position[0], position[1])) == pytest.approx(30 * way, abs=1.5)
        assert np.hypot(*position) == pytest.approx(20, abs=0.7)
        assert actual[0, 0] == 128


@pytest.mark.parametrize("channels", [1, 3])
def test_posterize_keeps_the_high_bits(channels):
    pixels = noise(24, 24, channels)
    for magnitude, bits in ((30.0, 4), (15.0, 6), (7.5, 7), (0.0, 8)):
        np.testing.assert_array_equal(
            painted(pixels, "posterize", magnitude=magnitude), pixels >> (8 - bits) << (8 - bits)
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_inverts_bright_pixels(channels):
    pixels = noise(24, 24, channels)
    for magnitude, threshold in ((30.0, 0), (15.0, 128), (7.5, 192), (0.0, 256)):
        np.testing.assert_array_equal(
            painted(pixels, "solarize", magnitude=magnitude), np.where(pixels >= threshold, 255 - pixels, pixels)
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_scale_from_a_tenth_to_nearly_two(channels):
    pixels = noise(24, 24, channels)
    luma = np.asarray(Image.fromarray(pixels.squeeze()).convert("L"))
    middle = int(luma.mean() + 0.5)
    for name, fixed in (("brightness", 0), ("contrast", middle)):
        for direction, factor in ((FORTH, 1.9), (BACK, 0.1)):
            expected = np.clip(fixed + factor * (pixels.astype(float) - fixed), 0, 255)
            actual = painted(pixels, name, direction=direction)
            assert np.abs(actual - expected).max() <= 1


def test_color_blends_with_grey_in_both_directions():
    pixels = noise(24, 24, 3)
    luma = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)[..., None]
    for direction, factor in ((FORTH, 1.9), (BACK, 0.1)):
        expected = np.clip(luma + factor * (pixels - luma), 0, 255)
        assert np.abs(painted(pixels, "color", direction=direction) - expected).max() <= 1


def test_sharpness_blends_with_blur_in_both_directions():
    pixels = noise(24, 24, 1)
    spread = [painted(pixels, "sharpness", direction=direction).std() for direction in (BACK, FORTH)]
    assert spread[0] < 0.7 * pixels.std()
    assert spread[1] > 1.05 * pixels.std()


@pytest.mark.parametrize("channels", [1, 3])
def test_autocontrast_and_equalize_use_all_values(channels):
    pixels = photo(64, 64, channels) // 4 + 60
    for name in ("autocontrast", "equalize"):
        actual = painted(pixels, name)
        for channel in range(channels):
            assert (actual[..., channel].min(), actual[..., channel].max()) == (0, 255)
            places = np.argsort(pixels[..., channel].ravel(), kind="stable")
            assert (np.diff(actual[..., channel].ravel()[places].astype(int)) >= 0).all()  # no two change places
    ramp = np.arange(0, 256, 4, dtype=np.uint8).repeat(64).reshape(64, 64, 1)
    flat = np.bincount(painted(ramp // 3, "equalize").ravel() // 64, minlength=4)
    assert flat.max() < 1.3 * flat.min()


def test_operations_are_applied_in_sequence():
    pixels = noise(24, 24, 3)
    both = painted(pixels, "translate_x", "solarize")
    np.testing.assert_array_equal(both, painted(painted(pixels, "translate_x"), "solarize"))
    assert (both != painted(pixels, "solarize", "translate_x")).any()


def test_number_of_operations_is_ops():
    pixels = np.full((40, 40, 1), 7, np.uint8)
    pixels[:, 20] = 255
    one = np.array([(NAMES.index("translate_x") + 0.5) / 14, FORTH], np.float32)
    for ops in (1, 2, 3, 4):
        chosen = randaugment.RandAugment(ops, 5.0)  # 3 pixels each time
        assert chosen.num_draws == 2 * ops
        actual = chosen.apply(pixels, np.tile(one, ops))
        assert actual[0, :, 0].tolist().index(255) == 20 - 3 * ops


def test_operations_are_drawn_uniformly(monkeypatch):
    picked = dict.fromkeys(NAMES, 0)
    forth = 0

    def counting(name):
        def change(image, strength):
            nonlocal forth
            picked[name] += 1
            forth += strength > 0
            return image

        return change

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: counting(name) for name in NAMES})
    chosen, pixels = randaugment.RandAugment(2, 9.0), np.zeros((1, 1, 1), np.uint8)
    for row in sampling.uniform_rows(0, "paint", 0, 14_000, chosen.num_draws):
        chosen.apply(pixels, row)
    assert sum(picked.values()) == 28_000
    assert min(picked.values()) > 1850  # 2000 each, and their standard deviation is 43
    assert max(picked.values()) < 2150
    assert 13_700 < forth < 14_300
    for last in (np.float32(1) - np.float32(2**-24), 1.0):
        picked[NAMES[-1]] = 0
        chosen.apply(pixels, np.full(4, last, np.float32))
        assert picked[NAMES[-1]] == 2


def test_randaugment_is_the_same_eagerly_and_in_a_map():
    images = np.stack([noise(16, 16, 3, seed) for seed in range(16)])
    chosen = randaugment.RandAugment(2, 9.0)
    draws = sampling.uniform_rows(0, "paint", 0, 16, chosen.num_draws)
    eager = np.stack([chosen.apply(*pair) for pair in zip(images, draws, strict=True)])
    stream = tf.data.Dataset.from_tensor_slices((images, draws))
    mapped = stream.map(lambda image, draw: tf.numpy_function(chosen.apply, [image, draw], tf.uint8))
    np.testing.assert_array_equal(eager, np.stack([image.numpy() for image in mapped]))
    assert (eager != images).any()
