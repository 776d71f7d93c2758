"""Augmentations, each against its definition: what is drawn, what is done with it, and what is left alone."""

import io
import math

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from support.commands import message
from train.data import decode, sampling
from train.data.augmentation import mixup_cutmix, policy, randaugment, random_resized_crop

CENTRE = 0.5
LEAST, MOST = 0.0, 0.999


def noise(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height, width, channels=3, seed=0):
    """Large smooth blobs of colour."""
    blobs = Image.fromarray(noise(2 + height // 80, 2 + width // 80, 3, seed))
    large = blobs.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels)


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", **({"quality": 95} | options))
    return file.getvalue()


def in_map(apply, *inputs):
    """The same, of the whole batch, inside Dataset.map."""
    found = next(iter(tf.data.Dataset.from_tensors(inputs).map(apply)))
    return [part.numpy() for part in found] if isinstance(found, tuple) else found.numpy()


# ------------------------------------------------------------------------------------------------------------ by name


def test_an_unknown_name_is_refused():
    assert message(policy.build, "flipcrop") == (
        "augment must be one of none, crop, flip_crop, inception, randaugment, got flipcrop; use augment=crop"
    )


def test_every_name_has_its_stages():
    def stages(name, **options):
        built = policy.build(name, **options)
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


def test_options_reach_what_they_are_of():
    assert policy.build(
        "inception", least_area=0.3, most_stretch=2.0, color=0.5, mirror=False
    ).random_resized_crop == random_resized_crop.RandomResizedCrop(0.3, 2.0, 0.5, False)
    built = policy.build("randaugment", ops=3, magnitude=15.0, pad=0.25, mirror=False)
    assert built.randaugment == randaugment.RandAugment(3, 15.0)
    assert built.batch_ops[0].apply.keywords == {"pad": 0.25, "mirror": False}
    assert policy.build("flip_crop", pad=0.0).batch_ops[0].apply.keywords == {"pad": 0.0, "mirror": True}
    assert policy.build("none", erase=0.3).batch_ops[0].apply.keywords == {"probability": 0.3}
    with pytest.raises(TypeError, match="magnitude"):
        policy.build("crop", magnitude=3)


# ------------------------------------------------------------------------------------------------------------- shifts


def shift(images, draws, name="crop", **options):
    [move] = policy.build(name, **options).batch_ops
    return move.apply(images, draws)


def shifted(image, down, right, mirror):
    """The definition, for one image: `down` and `right` are what the picture moves by."""
    border = 2
    padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="reflect")
    if mirror:
        padded = padded[:, ::-1]
    top, left = border - down, border - right
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


@pytest.mark.parametrize(
    ("draw", "moved"),
    [
        ((CENTRE, CENTRE, MOST), (0, 0, False)),
        ((LEAST, CENTRE, MOST), (2, 0, False)),
        ((MOST, CENTRE, MOST), (-2, 0, False)),
        ((CENTRE, LEAST, MOST), (0, 2, False)),
        ((MOST, LEAST, MOST), (-2, 2, False)),
        ((CENTRE, CENTRE, LEAST), (0, 0, True)),
    ],
)
def test_flip_crop_moves_pixels(draw, moved):
    image = noise(16, 16, 3)
    draws = np.array([draw], np.float32)
    np.testing.assert_array_equal(shift(image[None], draws, "flip_crop")[0], shifted(image, *moved))
    without = shifted(image, moved[0], moved[1], False)
    np.testing.assert_array_equal(shift(image[None], draws)[0], without)
    assert (shifted(image, *moved) != image).any() == (moved != (0, 0, False))


MOVES = {
    "crop": policy.build("crop").batch_ops[0],
    "flip_crop": policy.build("flip_crop").batch_ops[0],
    "randaugment": policy.build("randaugment").batch_ops[0],
    "erase": policy.build("none", erase=0.5).batch_ops[0],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(MOVES))
def test_moves_are_the_same_eagerly_and_in_a_map(name, channels):
    move = MOVES[name]
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


def test_shifts_and_flips_are_even():
    images = np.zeros((4000, 16, 16, 1), np.uint8)
    images[:, 8, 8] = 255  # where it lands tells the shift
    draws = sampling.uniform_rows(0, "augment", 0, 4000, policy.SHIFT_DRAWS)
    moved = shift(images, draws).numpy()[..., 0]
    counts = (moved == 255).sum(axis=0)
    assert (counts[6:11, 6:11] > 100).all()
    assert counts[6:11, 6:11].sum() == counts.sum() == 4000
    mirrored = shift(images, draws, "flip_crop", pad=0).numpy()[:, 8, 7, 0] == 255
    assert 0.47 < mirrored.mean() < 0.53


def test_pad_message():
    for wrong in (0.6, -0.1):
        assert message(shift, np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 3), np.float32), pad=wrong) == (
            f"pad must be a fraction of the side in 0..0.5, got {wrong}; use augment.pad=0.125"
        )


# ------------------------------------------------------------------------------------------------------------ erasing

COVER = 251  # nothing in the images below is of this value


def erase(images, draws, probability=1.0):
    return policy.random_erasing(images, draws, probability=probability).numpy()


def erase_draws(count, seed=0):
    return sampling.uniform_rows(seed, "erase", 0, count, policy.ERASE_DRAWS)


def grounds(count, side, channels=1):
    return np.random.default_rng(1).integers(0, COVER, (count, side, side, channels), dtype=np.uint8)


def covering(draws, channels=1):
    """The same draws, with COVER as the colour."""
    draws = draws.copy()
    draws[:, 5 : 5 + channels] = (COVER + 0.5) / 256
    return draws


def test_one_rectangle_of_the_right_size_and_nothing_else_is_covered():
    side, images = 128, grounds(500, 128)
    found = erase(images, covering(erase_draws(500)))
    covered = (found == COVER)[..., 0]
    np.testing.assert_array_equal(found[~covered], images[~covered])
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


def test_rectangles_come_everywhere():
    often = (erase(grounds(4000, 16), covering(erase_draws(4000))) == COVER)[..., 0].mean(axis=0)
    for turned in (often[::-1], often[:, ::-1], often.T):
        np.testing.assert_allclose(often, turned, atol=0.05)
    assert often.min() > 0.003  # few reach into a corner


@pytest.mark.parametrize("channels", [1, 3])
def test_a_rectangle_has_one_colour(channels):
    images, draws = grounds(200, 32, channels), erase_draws(200)
    found = erase(images, draws)
    changed = (erase(images, covering(draws, channels)) == COVER).all(axis=3)
    colors = np.floor(draws[:, 5 : 5 + channels] * 256)
    expected = np.broadcast_to(colors[:, None, None], images.shape)
    np.testing.assert_array_equal(found[changed], expected[changed])
    np.testing.assert_array_equal(found[~changed], images[~changed])
    assert colors.min() < 3
    assert colors.max() > 252
    if channels == 3:
        assert len({tuple(color) for color in colors}) == 200


def test_the_share_of_erased_images_is_the_probability():
    images, draws = grounds(4000, 16), covering(erase_draws(4000))

    def share(probability):
        return (erase(images, draws, probability) != images).any(axis=(1, 2, 3)).mean()

    assert share(0.0) == 0
    assert 0.47 < share(0.5) < 0.53
    assert share(1.0) == 1
    few, many = (erase(images, draws, probability) != images for probability in (0.5, 1.0))
    np.testing.assert_array_equal(few, many & (draws[:, 0] < 0.5)[:, None, None, None])


def test_without_erasing_there_is_no_such_move():
    assert policy.build("none", erase=0.0).batch_ops == ()


# ---------------------------------------------------------------------------------------------------------- painting

NAMES = tuple(randaugment.OPERATIONS)
WITHOUT_STRENGTH = ("identity", "autocontrast", "equalize")
ONE_DIRECTION = ("solarize", "posterize")
BOTH_DIRECTIONS = tuple(name for name in NAMES if name not in WITHOUT_STRENGTH + ONE_DIRECTION)
FORTH, BACK = 0.0, 0.999


def painted(pixels, *names, magnitude=30.0, direction=FORTH):
    draws = np.array([((NAMES.index(name) + 0.5) / len(NAMES), direction) for name in names], np.float32)
    return randaugment.RandAugment(len(names), magnitude).apply(pixels, draws.ravel())


def test_there_are_fourteen_changes():
    assert len(NAMES) == 14
    assert len(BOTH_DIRECTIONS) == 9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_change_keeps_shape_and_type_and_leaves_its_input_alone(name, channels):
    pixels = photo(24, 24, channels) // 2 + 30
    before = pixels.copy()
    for magnitude in (0.0, 9.0, 30.0):
        for direction in (FORTH, BACK):
            found = painted(pixels, name, magnitude=magnitude, direction=direction)
            assert found.shape == (24, 24, channels)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, painted(pixels, name, magnitude=magnitude, direction=direction))
    np.testing.assert_array_equal(pixels, before)
    idle = name == "identity" or (name == "color" and channels == 1)
    assert (painted(pixels, name) != pixels).any() == (not idle)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ONE_DIRECTION + BOTH_DIRECTIONS)
def test_without_strength_nothing_changes(name, channels):
    pixels = noise(24, 24, channels)
    for direction in (FORTH, BACK):
        np.testing.assert_array_equal(painted(pixels, name, magnitude=0.0, direction=direction), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_directions_differ_where_there_are_two(name):
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
def test_translations_move_the_picture_and_bring_in_grey(channels):
    pixels = noise(20, 20, channels)
    expected = np.full_like(pixels, 128)
    expected[:, :11] = pixels[:, 9:]  # 0.45 of 20 pixels
    np.testing.assert_array_equal(painted(pixels, "translate_x"), expected)
    expected = np.full_like(pixels, 128)
    expected[9:] = pixels[:11]
    np.testing.assert_array_equal(painted(pixels, "translate_y", direction=BACK), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_shears_leave_the_middle_and_move_the_edges(channels):
    pixels = np.zeros((41, 41, channels), np.uint8)
    pixels[:, 20] = 255
    found = painted(pixels, "shear_x")
    for row in (0, 10, 20, 30, 40):
        middle = (found[row, :, 0] == 255).nonzero()[0]
        brightest = found[row, :, 0].astype(int).argmax() if not len(middle) else middle.mean()
        assert abs(brightest - (20 - 0.3 * (row - 20))) <= 1
    turned = painted(pixels.swapaxes(0, 1), "shear_y")
    np.testing.assert_array_equal(turned.swapaxes(0, 1), found)


def test_rotation_goes_thirty_degrees_both_ways_about_the_middle():
    pixels = np.zeros((61, 61, 1), np.uint8)
    pixels[29:32, 48:53] = 255  # 20 pixels right of the middle
    for direction, way in ((FORTH, -1), (BACK, 1)):
        found = painted(pixels, "rotate", direction=direction)[..., 0]
        place = np.average(np.argwhere(found == 255), axis=0) - 30
        assert math.degrees(math.atan2(place[0], place[1])) == pytest.approx(30 * way, abs=1.5)
        assert np.hypot(*place) == pytest.approx(20, abs=0.7)
        assert found[0, 0] == 128


@pytest.mark.parametrize("channels", [1, 3])
def test_posterize_keeps_the_high_bits(channels):
    pixels = noise(24, 24, channels)
    for magnitude, bits in ((30.0, 4), (15.0, 6), (7.5, 7), (0.0, 8)):
        np.testing.assert_array_equal(
            painted(pixels, "posterize", magnitude=magnitude), pixels >> (8 - bits) << (8 - bits)
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_inverts_what_is_bright(channels):
    pixels = noise(24, 24, channels)
    for magnitude, threshold in ((30.0, 0), (15.0, 128), (7.5, 192), (0.0, 256)):
        np.testing.assert_array_equal(
            painted(pixels, "solarize", magnitude=magnitude), np.where(pixels >= threshold, 255 - pixels, pixels)
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast_go_from_a_tenth_to_nearly_twice(channels):
    pixels = noise(24, 24, channels)
    luma = np.asarray(Image.fromarray(pixels.squeeze()).convert("L"))
    middle = int(luma.mean() + 0.5)
    for name, fixed in (("brightness", 0), ("contrast", middle)):
        for direction, factor in ((FORTH, 1.9), (BACK, 0.1)):
            expected = np.clip(fixed + factor * (pixels.astype(float) - fixed), 0, 255)
            found = painted(pixels, name, direction=direction)
            assert np.abs(found - expected).max() <= 1


def test_color_goes_towards_grey_and_away_from_it():
    pixels = noise(24, 24, 3)
    luma = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)[..., None]
    for direction, factor in ((FORTH, 1.9), (BACK, 0.1)):
        expected = np.clip(luma + factor * (pixels - luma), 0, 255)
        assert np.abs(painted(pixels, "color", direction=direction) - expected).max() <= 1


def test_sharpness_goes_towards_blur_and_away_from_it():
    pixels = noise(24, 24, 1)
    spread = [painted(pixels, "sharpness", direction=direction).std() for direction in (BACK, FORTH)]
    assert spread[0] < 0.7 * pixels.std()
    assert spread[1] > 1.05 * pixels.std()


@pytest.mark.parametrize("channels", [1, 3])
def test_autocontrast_and_equalize_use_all_values(channels):
    pixels = photo(64, 64, channels) // 4 + 60
    for name in ("autocontrast", "equalize"):
        found = painted(pixels, name)
        for channel in range(channels):
            assert (found[..., channel].min(), found[..., channel].max()) == (0, 255)
            places = np.argsort(pixels[..., channel].ravel(), kind="stable")
            assert (np.diff(found[..., channel].ravel()[places].astype(int)) >= 0).all()  # no two change places
    ramp = np.arange(0, 256, 4, dtype=np.uint8).repeat(64).reshape(64, 64, 1)
    flat = np.bincount(painted(ramp // 3, "equalize").ravel() // 64, minlength=4)
    assert flat.max() < 1.3 * flat.min()


def test_changes_come_one_after_the_other():
    pixels = noise(24, 24, 3)
    both = painted(pixels, "translate_x", "solarize")
    np.testing.assert_array_equal(both, painted(painted(pixels, "translate_x"), "solarize"))
    assert (both != painted(pixels, "solarize", "translate_x")).any()


def test_there_are_as_many_changes_as_ops():
    pixels = np.full((40, 40, 1), 7, np.uint8)
    pixels[:, 20] = 255
    one = np.array([(NAMES.index("translate_x") + 0.5) / 14, FORTH], np.float32)
    for ops in (1, 2, 3, 4):
        chosen = randaugment.RandAugment(ops, 5.0)  # 3 pixels each time
        assert chosen.num_draws == 2 * ops
        found = chosen.apply(pixels, np.tile(one, ops))
        assert found[0, :, 0].tolist().index(255) == 20 - 3 * ops


def test_the_draw_picks_evenly_among_the_fourteen(monkeypatch):
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


def test_painting_is_the_same_eagerly_and_in_a_map():
    images = np.stack([noise(16, 16, 3, seed) for seed in range(16)])
    chosen = randaugment.RandAugment(2, 9.0)
    draws = sampling.uniform_rows(0, "paint", 0, 16, chosen.num_draws)
    eager = np.stack([chosen.apply(*pair) for pair in zip(images, draws, strict=True)])
    stream = tf.data.Dataset.from_tensor_slices((images, draws))
    mapped = stream.map(lambda image, draw: tf.numpy_function(chosen.apply, [image, draw], tf.uint8))
    np.testing.assert_array_equal(eager, np.stack([image.numpy() for image in mapped]))
    assert (eager != images).any()


# ----------------------------------------------------------------------------------------------- colours of a crop

CROP = policy.inception().random_resized_crop
COLUMNS = ("area", "stretch", "y", "x", "mirror", "brightness", "contrast", "saturation", "hue")
LAST = np.float32(1) - np.float32(2**-24)  # the largest draw


def drawn(**values):
    """One row of draws: 0.5 everywhere, which changes no colour, but for what is named."""
    assert set(values) <= set(COLUMNS)
    return np.array([[values.get(name, 0.5) for name in COLUMNS]], np.float32)


def distorted_by_hand(pixels, draws, color=1.0, every=8):
    """Brightness, then saturation, then hue in YIQ, then contrast about the mean of the rows that are looked at."""
    brightness, contrast, saturation, hue = (2 * draws[5:].astype(float) - 1) * color
    found = pixels + 32 * brightness
    if pixels.shape[-1] == 3:
        luma = found @ [0.299, 0.587, 0.114]
        found = luma[..., None] + (1 + 0.5 * saturation) * (found - luma[..., None])
        to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        y, i, q = np.moveaxis(found @ to_yiq.T, -1, 0)
        plane = (i + 1j * q) * np.exp(2j * np.pi * 0.2 * hue)
        found = np.stack([y, plane.real, plane.imag], axis=-1) @ np.linalg.inv(to_yiq).T
    mean = found[::every].mean(axis=(0, 1))
    return mean + (1 + 0.5 * contrast) * (found - mean)


def distort(pixels, draws, color=1.0):
    """What the map says, neither clipped nor rounded."""
    channels = pixels.shape[-1]
    [colors] = policy.inception(color=color).random_resized_crop.color_matrices(draws, channels)
    mean = pixels[::8].mean(axis=(0, 1))
    return pixels @ colors[:, :channels].T + colors[:, channels:-1] @ mean + colors[:, -1]


def finish(pixels, draws, side=None, mirrored=False, **options):
    """`pixels` as a crop of its own size, or of another."""
    chosen = policy.inception(**options).random_resized_crop
    [colors] = chosen.color_matrices(draws, pixels.shape[-1])
    return filled(chosen, pixels, mirrored, colors, side or len(pixels))


def filled(chosen, pixels, mirrored, colors, side):
    """What `finish` puts into memory that held something else."""
    image = np.full((side, side, pixels.shape[-1]), 77, np.uint8)
    assert chosen.finish(pixels, mirrored, colors, image) is None
    return image


def far(found, expected):
    """How far bytes are at most from real numbers, clipped: 0.5 where they are rounded in the best way."""
    return np.abs(found - np.clip(expected, 0, 255)).max()


ROUNDED = 0.5 + 2e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("color", [1.0, 0.3])
def test_colours_are_distorted_by_the_definition(channels, color):
    pixels = noise(40, 40, channels)
    pixels[::8] //= 2  # their mean is another than that of all rows
    for row in sampling.uniform_rows(0, "crop", 0, 50, random_resized_crop.DRAWS):
        expected, wrong = (distorted_by_hand(pixels.astype(float), row, color, every) for every in (8, 1))
        np.testing.assert_allclose(distort(pixels.astype(float), row[None], color), expected, atol=2e-3)
        found = finish(pixels, row[None], color=color)
        assert far(found, expected) < ROUNDED
        assert far(found, wrong) > ROUNDED


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLUMNS)
def test_every_colour_draw_does_its_own(name, channels):
    pixels = noise(40, 40, channels)
    for value in (0.0, 0.25, 0.999):
        draws = drawn(**{name: value})
        exact, found = distort(pixels.astype(float), draws), finish(pixels, draws)
        np.testing.assert_allclose(exact, distorted_by_hand(pixels.astype(float), draws[0]), atol=2e-3)
        assert far(found, exact) < ROUNDED
        colour = name in ("saturation", "hue")
        changed = name in ("brightness", "contrast") or (colour and channels == 3)
        assert (np.abs(exact - pixels).max() > 1) == changed
        assert (found != pixels).any() == changed
        if colour:  # the luma stays
            luma = [[0.299], [0.587], [0.114]] if channels == 3 else [[1.0]]
            np.testing.assert_allclose(exact @ luma, pixels @ luma, atol=2e-3)


def test_the_ends_of_the_colour_draws():
    pixels = noise(8, 8, 3)
    mean = pixels[:1].mean(axis=(0, 1))
    luma = pixels @ [[0.299], [0.587], [0.114]]
    for name, low, high in (
        ("brightness", pixels - 32.0, pixels + 32.0),
        ("contrast", mean + 0.5 * (pixels - mean), mean + 1.5 * (pixels - mean)),
        ("saturation", luma + 0.5 * (pixels - luma), luma + 1.5 * (pixels - luma)),
    ):
        for value, expected in enumerate((low, high)):
            draws = drawn(**{name: value})
            np.testing.assert_allclose(distort(pixels.astype(float), draws), expected, atol=1e-3)
            assert far(finish(pixels, draws), expected) < ROUNDED
    forth, back = drawn(hue=0.75), drawn(hue=0.25)
    np.testing.assert_allclose(distort(distort(pixels.astype(float), forth), back), pixels, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_strength_colours_stay(channels):
    pixels, extreme = noise(40, 40, channels), drawn(brightness=0, contrast=1, hue=0)
    np.testing.assert_allclose(distort(pixels.astype(float), drawn()), pixels, atol=1e-4)
    np.testing.assert_allclose(distort(pixels.astype(float), extreme, color=0.0), pixels, atol=1e-4)
    np.testing.assert_array_equal(finish(pixels, drawn()), pixels)
    np.testing.assert_array_equal(finish(pixels, extreme, color=0.0), pixels)
    for maps in (
        CROP.color_matrices(drawn(), channels),
        policy.inception(color=0.0).random_resized_crop.color_matrices(extreme, channels),
    ):
        np.testing.assert_allclose(maps, [np.eye(channels, 2 * channels + 1)], atol=1e-7)


def test_grey_stays_grey_whatever_hue_and_saturation():
    pixels = np.repeat(noise(16, 16, 1), 3, axis=2)
    for row in sampling.uniform_rows(0, "crop", 0, 20, random_resized_crop.DRAWS):
        exact, found = distort(pixels.astype(float), row[None]), finish(pixels, row[None])
        np.testing.assert_allclose(exact, exact[..., :1].repeat(3, axis=2), atol=2e-3)
        assert far(found, exact) < ROUNDED
        assert np.ptp(found.astype(int), axis=2).max() <= 1  # where a channel is next to a half


def test_maps_of_many_examples_are_those_of_each():
    draws = sampling.uniform_rows(0, "crop", 0, 10, random_resized_crop.DRAWS)
    for channels in (1, 3):
        maps = CROP.color_matrices(draws, channels)
        assert maps.shape == (10, channels, 2 * channels + 1)
        assert maps.dtype == np.float32
        for row, found in zip(draws, maps, strict=True):
            np.testing.assert_array_equal(found, CROP.color_matrices(row[None], channels)[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 50), (20, 17), (64, 64), (32, 32)])
def test_pixels_are_rounded_once_half_to_even(shape, channels):
    """Were they rounded after they are resized, too, many would be others."""
    pixels, differ = noise(*shape, channels), 0
    resized = cv2.resize(pixels.astype(np.float32), (32, 32), interpolation=cv2.INTER_LINEAR).reshape(32, 32, channels)
    np.testing.assert_allclose(resized, tf.image.resize(pixels, (32, 32)), atol=0.01)
    still = finish(pixels, drawn(contrast=1), 32, color=0.0)
    np.testing.assert_array_equal(still, np.rint(resized))
    if shape == (64, 64):  # means of four: a quarter of them end in a half
        assert (still != np.floor(resized + 0.5)).mean() > 0.1
    for row in sampling.uniform_rows(0, "crop", 0, 5, random_resized_crop.DRAWS):
        [colors] = CROP.color_matrices(row[None], channels)
        expected, twice = (
            np.clip(np.rint(distort(values.astype(float), row[None])), 0, 255) for values in (resized, np.rint(resized))
        )
        found = filled(CROP, pixels, False, colors, 32)
        np.testing.assert_array_equal(found, expected)
        differ += (found != twice).sum()
    assert (differ > 0) == (shape != (32, 32))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_above_255_is_255_and_what_is_below_0_is_0(channels):
    """Not its absolute value, and not what is left of it in a byte."""
    for level, brightness, expected in ((10, 0, 0), (31, 0, 0), (0, 0, 0), (250, 1, 255), (224, 1, 255), (255, 1, 255)):
        pixels = np.full((8, 8, channels), level, np.uint8)
        np.testing.assert_array_equal(finish(pixels, drawn(brightness=brightness)), np.full_like(pixels, expected))
    pixels = np.zeros((8, 8, channels), np.uint8)
    pixels[:, ::2] = 255  # their mean is 127.5
    np.testing.assert_array_equal(finish(pixels, drawn(contrast=1)), pixels)  # 318.75 and -63.75
    np.testing.assert_array_equal(finish(pixels, drawn(contrast=1, brightness=0))[:, 1], 0)
    np.testing.assert_array_equal(finish(pixels, drawn(contrast=1, brightness=1))[:, 0], 255)


# --------------------------------------------------------------------------------------------------- boxes of a crop


def boxes(size, count=2000, **options):
    chosen = policy.inception(**options).random_resized_crop
    draws = sampling.uniform_rows(5, "crop", 0, count, random_resized_crop.DRAWS)
    return chosen.sample_boxes(np.tile(np.array(size, np.int32), (count, 1)), draws)


def box(size, chosen=CROP, **values):
    [found] = chosen.sample_boxes(np.array([size], np.int32), drawn(**values))
    return found


SIZES = [(90, 120), (120, 90), (300, 100), (64, 64)]
ODD = [(1000, 50), (50, 1000), (300, 100), (7, 400), (3, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_large_enough(size):
    _, _, height, width = boxes(size).T.astype(int)
    share = height * width / (size[0] * size[1])
    assert share.min() >= 0.08
    assert share.min() < 0.1
    assert share.max() <= 1


@pytest.mark.parametrize(("size", "least_area"), [((600, 50), 0.08), ((50, 550), 0.08), ((400, 400), 0.9)])
def test_boxes_are_large_enough_wherever_the_shape_of_the_image_allows_it(size, least_area):
    largest = min(size[0], size[1] * 4 / 3) * min(size[1], size[0] * 4 / 3)
    assert largest > least_area * size[0] * size[1]
    _, _, height, width = boxes(size, least_area=least_area).T.astype(int)
    assert ((height + 0.5) * (width + 0.5)).min() >= least_area * size[0] * size[1]  # in whole pixels


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_not_too_much_stretched(size):
    _, _, height, width = boxes(size).T
    assert (width <= height * 4 / 3 + 1).all()  # in whole pixels
    assert (height <= width * 4 / 3 + 1).all()
    assert (width > 1.25 * height).any()
    assert (height > 1.25 * width).any()


@pytest.mark.parametrize("size", ODD)
def test_of_an_odd_shaped_image_no_box_is_longer_than_it_may_be_nor_the_whole(size):
    found = boxes(size)
    assert found[:, 2:].min() >= 1
    longer, shorter = found[:, 2:].max(axis=1), found[:, 2:].min(axis=1)
    assert (longer <= shorter * 4 / 3 + 1).all()
    assert (found[:, 2:] < size).any(axis=1).all()
    assert len(set(found[:, np.argmax(size)].tolist())) > max(size) / 2  # all along it


@pytest.mark.parametrize("size", [*SIZES, *ODD, (1, 1), (2, 3), (7, 5)])
def test_boxes_are_inside_the_image(size):
    ends = np.array(np.meshgrid(*[[0, LAST]] * 4), np.float32).reshape(4, -1).T
    extreme = CROP.sample_boxes(
        np.tile(size, (len(ends), 1)), np.pad(ends, ((0, 0), (0, random_resized_crop.DRAWS - 4)))
    )
    for found in (boxes(size), extreme):
        assert found.dtype == np.int32
        assert found.min() >= 0
        assert found[:, 2:].min() >= 1
        assert (found[:, :2] + found[:, 2:] <= size).all()


def test_all_places_are_reached_the_last_row_and_column_too():
    for area in (0, 0.3, 0.5, 0.8):
        draws = drawn(area=area).repeat(3000, axis=0)
        draws[:, 2:4] = sampling.uniform_rows(5, "crop", 0, 3000, 2)
        found = CROP.sample_boxes(np.tile([7, 9], (3000, 1)), draws)
        [(height, width)] = {tuple(extent) for extent in found[:, 2:].tolist()}
        places = {(y, x) for y in range(8 - height) for x in range(10 - width)}
        assert {tuple(place) for place in found[:, :2].tolist()} == places
    for values, corner in (({"y": 0, "x": 0}, (0, 0)), ({"y": LAST, "x": LAST}, (900, 1200))):
        top, left, height, width = box((900, 1200), area=0.1, **values)
        assert (top, left) == (corner if not values["y"] else (corner[0] - height, corner[1] - width))


def test_boxes_by_given_draws():
    """Half of the area of 400x300 is 60000; as wide as the image it is 200 high, a stretch of 1.5."""
    whole = policy.inception(least_area=0.0, most_stretch=2.0).random_resized_crop
    height, width = math.sqrt(60000 / math.sqrt(0.5 * 1.5)), math.sqrt(60000 * math.sqrt(0.5 * 1.5))
    assert (round(height), round(width)) == (263, 228)
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5), [69, 36, 263, 228])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5, stretch=0, y=0, x=0), [0, 0, 346, 173])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5, stretch=1, y=0, x=0), [0, 0, 200, 300])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.125, stretch=1, y=LAST, x=0.25), [313, 32, 87, 173])
    np.testing.assert_array_equal(
        box((400, 300), policy.inception(least_area=1.0).random_resized_crop, stretch=0), [0, 0, 400, 300]
    )
    np.testing.assert_array_equal(box((1000, 50), area=1, y=0.5), [467, 0, 67, 50])


def test_draws_of_boxes_are_even():
    """The area always; the stretch where every one of them fits."""
    draws = sampling.uniform_rows(5, "crop", 0, 4000, random_resized_crop.DRAWS)
    _, _, height, width = CROP.sample_boxes(np.tile([3000, 3000], (4000, 1)), draws).T.astype(float)
    area = height * width / 9e6
    np.testing.assert_allclose(area, 0.08 + 0.92 * draws[:, 0], atol=1e-3)
    free = area < 0.74
    assert free.sum() > 2500
    stretch = np.log(width / height)[free] / math.log(4 / 3)
    np.testing.assert_allclose(stretch, 2 * draws[free, 1] - 1, atol=5e-3)


def test_options_change_the_boxes():
    top, left, height, width = boxes((100, 100), least_area=0.5, most_stretch=1.0).T
    assert (height == width).all()
    assert (height * width).min() >= 5000
    assert len(set(zip(top.tolist(), left.tolist(), height.tolist(), strict=True))) > 500


def test_boxes_cover_the_image_evenly():
    size = (270, 360)
    often = np.zeros(size)
    found = boxes(size, 4000)
    for top, left, height, width in found:
        often[top : top + height, left : left + width] += 1 / 4000
    np.testing.assert_allclose(often, often[::-1], atol=0.05)
    np.testing.assert_allclose(often, often[:, ::-1], atol=0.05)
    for axis in (0, 1):
        room = size[axis] - found[:, 2 + axis]
        place = found[room > 5, axis] / room[room > 5]
        assert 0.48 < place.mean() < 0.52
        assert (np.abs(np.histogram(place, 4, (0, 1))[0] / len(place) - 0.25) < 0.05).all()


def test_a_box_is_a_function_of_its_draws():
    np.testing.assert_array_equal(boxes((90, 120), 200), boxes((90, 120), 200))
    assert len({tuple(box) for box in boxes((900, 1200), 200).tolist()}) == 200
    draws = sampling.uniform_rows(5, "crop", 0, 20, random_resized_crop.DRAWS)
    sizes = np.random.default_rng(0).integers(1, 500, (20, 2), dtype=np.int32)
    together = CROP.sample_boxes(sizes, draws)
    for number, found in enumerate(together):
        np.testing.assert_array_equal(
            CROP.sample_boxes(sizes[number : number + 1], draws[number : number + 1])[0], found
        )


def test_an_image_of_one_pixel_is_a_box():
    np.testing.assert_array_equal(boxes((1, 1), 5), [[0, 0, 1, 1]] * 5)


# ------------------------------------------------------------------------------------------------- pixels of a crop


def cut(image, box, side=32):
    """As it is cut in a stream: `image` is a JPEG, or pixels."""
    box = np.array(box, np.int32)
    part = random_resized_crop.jpeg_scale(box, side)
    small = decode.decode_jpeg(image, part) if isinstance(image, bytes) else random_resized_crop.downscale(image, part)
    found = random_resized_crop.crop_box(small, box, part)
    assert found.dtype == np.uint8
    return found


def test_a_crop_is_halved_while_it_is_no_smaller_than_it_is_to_become():
    parts = {1: 1, 31: 1, 32: 1, 63: 1, 64: 2, 127: 2, 128: 4, 255: 4, 256: 8, 511: 8, 512: 8, 5000: 8}
    for length, part in parts.items():
        assert random_resized_crop.jpeg_scale(np.array([3, 4, length, 9999]), 32) == part
        assert random_resized_crop.jpeg_scale(np.array([3, 4, 9999, length]), 32) == part


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
def test_a_jpeg_of_its_own_size_is_what_pillow_makes_of_it(options):
    for size in ((90, 120), (91, 133), (2, 3), (17, 8)):
        data = jpeg(noise(*size, 3), quality=70, **options)
        np.testing.assert_array_equal(decode.decode_jpeg(data), decode.decode(data, 3))
        for part in (2, 4, 8):
            assert decode.decode_jpeg(data, part).shape == (-(-size[0] // part), -(-size[1] // part), 3)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    assert decode.decode_jpeg(jpeg(photo(90, 120), exif=turned)).shape == (90, 120, 3)
    with pytest.raises(ValueError):
        decode.decode_jpeg(b"gone")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plain", [True, False])
def test_a_mirrored_crop_is_exactly_the_mirror_image(plain, channels):
    pixels = photo(90, 120, channels)
    found = cut(jpeg(pixels) if plain else pixels, (10, 20, 50, 60))[..., :channels]
    for options in ({}, {"color": 0.0}):
        straight, mirrored = (
            finish(found, drawn(brightness=0.7, hue=0.1), 32, turned, **options) for turned in (False, True)
        )
        assert straight.shape == mirrored.shape == (32, 32, channels)
        assert straight.dtype == mirrored.dtype == np.uint8
        np.testing.assert_array_equal(mirrored, straight[:, ::-1])
        assert (mirrored != straight).any()


def test_every_second_one_is_mirrored():
    draws = sampling.uniform_rows(0, "crop", 0, 4000, random_resized_crop.DRAWS)
    np.testing.assert_array_equal(CROP.mirror_mask(draws), draws[:, COLUMNS.index("mirror")] < 0.5)
    assert 0.47 < CROP.mirror_mask(draws).mean() < 0.53
    assert not policy.inception(mirror=False).random_resized_crop.mirror_mask(draws).any()


def test_pixels_are_cut_resized_coloured_clipped_and_rounded_once():
    pixels = noise(90, 120, 3)
    top, left, height, width = inside = (13, 29, 50, 60)
    exact = tf.image.resize(pixels[top : top + height, left : left + width].astype(np.float32), (32, 32)).numpy()
    draws = drawn(brightness=1, contrast=1, saturation=0.9, hue=0.8)
    expected = distorted_by_hand(exact.astype(float), draws[0])
    assert expected.min() < -20
    assert expected.max() > 275
    part = cut(pixels, inside)
    np.testing.assert_array_equal(part, pixels[top : top + height, left : left + width])
    assert far(finish(part, draws, 32), expected) < 0.51
    assert far(finish(part, draws, 32, color=0.0), exact) < 0.501


BOXES = [
    (0, 0, 600, 800),
    (40, 48, 400, 420),
    (37, 51, 400, 420),
    (13, 101, 64, 80),
    (7, 9, 130, 140),
    (8, 16, 300, 280),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("side", "kind"), [(32, "area"), (64, "area"), (128, "bilinear")])
def test_a_crop_decoded_at_a_fraction_of_its_size_is_nearly_the_whole_one_made_smaller(box, side, kind, channels):
    data = jpeg(photo(600, 800, channels))
    found = cut(data, box, side)
    ratio = max(ratio for ratio in (1, 2, 4, 8) if ratio == 1 or min(box[2:]) >= side * ratio)
    assert found.shape == (box[2] // ratio, box[3] // ratio, 3)
    decoded = decode.decode(data, 3)
    top, left, height, width = (part // ratio * ratio for part in box)  # off by less than a pixel of the result
    whole = decoded[top : top + height, left : left + width].astype(np.float32)
    expected = tf.image.resize(whole, found.shape[:2], "area").numpy()
    assert np.abs(found - expected).mean() < 1.5
    assert np.abs(found[:, ::-1] - expected).mean() > 5
    resized = [finish(found, drawn(), side, color=0.0), tf.image.resize(expected, (side, side)).numpy()]
    assert np.abs(resized[0] - resized[1]).mean() < 1.5
    if ratio > 1:
        straight = tf.image.resize(whole, (side, side), kind).numpy()
        assert np.abs(resized[0] - straight).mean() < 2.5
    else:
        np.testing.assert_array_equal(found, whole)
    raw = cut(decoded, box, side)
    assert raw.shape == found.shape
    assert np.abs(raw.astype(float) - found).mean() < 1.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", BOXES)
def test_raw_pixels_are_made_smaller_by_averaging(box, channels):
    pixels = noise(600, 800, channels)
    ratio = max(ratio for ratio in (1, 2, 4, 8) if ratio == 1 or min(box[2:]) >= 64 * ratio)
    top, left, height, width = (part // ratio * ratio for part in box)
    whole = pixels[top : top + height, left : left + width]
    found = cut(pixels, box, 64)
    blocks = whole.reshape(height // ratio, ratio, width // ratio, ratio, channels).mean(axis=(1, 3))
    assert found.shape == blocks.shape
    assert far(found, blocks) <= 0.5


@pytest.mark.parametrize("size", [(601, 803), (333, 517)])
def test_raw_pixels_of_any_size_are_made_smaller_as_a_jpeg_is(size):
    data = jpeg(photo(*size))
    for part in (2, 4, 8):
        found = random_resized_crop.downscale(decode.decode(data, 3), part)
        assert found.shape == decode.decode_jpeg(data, part).shape
        assert np.abs(found.astype(float) - decode.decode_jpeg(data, part)).mean() < 1.5


def test_a_crop_is_never_decoded_smaller_than_it_is_to_become():
    data = jpeg(photo(600, 800))
    for side in (16, 32, 100, 224):
        for own in boxes((600, 800), 60):
            found = cut(data, own, side)
            least = min(own[2:])
            assert min(found.shape[:2]) >= min(side, least)
            assert min(found.shape[:2]) < 2 * side or least // 8 == min(found.shape[:2])


@pytest.mark.parametrize("size", [(257, 323), (131, 97), (33, 1029)])
def test_boxes_at_the_ends_of_an_image_are_whole_at_every_fraction(size):
    pixels = photo(*size)
    for image in (jpeg(pixels), pixels):
        for side in (4, 8, 16, 32, 64):
            for value in (0, LAST):
                for area in (0, 0.5, LAST):
                    own = box(size, area=area, y=value, x=value)
                    part = random_resized_crop.jpeg_scale(own, side)
                    assert cut(image, own, side).shape == (own[2] // part, own[3] // part, 3)


# -------------------------------------------------------------------------------------------------------------- mixing


def mixed(images, labels, draws, **alphas):
    chosen = mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas))
    found = chosen.apply(tf.constant(images), tf.constant(labels), tf.constant(draws, tf.float32))
    return tuple(part.numpy() for part in found)


def some_batch(count=8, side=16, channels=3, classes=5):
    images = np.stack([noise(side, side, channels, seed) for seed in range(count)])
    labels = np.eye(classes, dtype=np.float32)[np.arange(count) % classes]
    return images, labels


def test_mixup_is_exact():
    images, labels = some_batch()
    draws = mixup_cutmix.MixupCutmix(0.4, 0.0).draw(0, 0, 8)
    share = draws[:, :1].astype(float)
    found, dense = mixed(images, labels, draws, mixup=0.4)
    partner = np.roll(images, -1, axis=0).astype(float)
    expected = share[..., None, None] * images + (1 - share[..., None, None]) * partner
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(dense, share * labels + (1 - share) * np.roll(labels, -1, axis=0), atol=1e-6)
    assert np.abs(dense - labels).max() > 0.1  # labels that are not mixed would be noticed


def test_mixup_by_given_shares():
    images, labels = some_batch(4)
    draws = np.full((4, mixup_cutmix.DRAWS), 0.5, np.float32)
    draws[:, 0] = (1.0, 0.0, 0.5, 0.25)
    found, dense = mixed(images, labels, draws, mixup=1.0)
    np.testing.assert_array_equal(found[0], images[0])
    np.testing.assert_array_equal(found[1], images[2])
    np.testing.assert_array_equal(found[2], (images[2].astype(float) + images[3]) / 2)
    np.testing.assert_array_equal(found[3], 0.25 * images[3] + 0.75 * images[0])  # the last one's is the first
    np.testing.assert_array_equal(dense, [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0.5, 0.5, 0], [0.75, 0, 0, 0.25, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix_labels_have_the_share_of_the_covered_pixels(channels):
    count, side = 64, 16
    images, _ = some_batch(count, side, channels)
    images = images // 2 + 128 * (np.arange(count) % 2).astype(np.uint8)[:, None, None, None]  # who a pixel is of
    labels = np.eye(count, dtype=np.float32)
    found, dense = mixed(images, labels, mixup_cutmix.MixupCutmix(0.0, 1.0).draw(0, 0, count), cutmix=1.0)
    partner = np.roll(images, -1, axis=0)
    covered = ((found >= 128) != (np.arange(count) % 2)[:, None, None, None]).all(axis=3)
    np.testing.assert_array_equal(found, np.where(covered[..., None], partner, images))
    share = covered.mean(axis=(1, 2))
    np.testing.assert_array_equal(dense[np.arange(count), (np.arange(count) + 1) % count], share)
    np.testing.assert_array_equal(dense[np.arange(count), np.arange(count)], 1 - share)
    rows, columns = covered.any(axis=2), covered.any(axis=1)
    np.testing.assert_array_equal(covered, rows[:, :, None] & columns[:, None, :])  # a rectangle
    assert ((share > 0.05) & (share < 0.9)).sum() > 20


def test_cutmix_by_a_given_rectangle():
    images, labels = some_batch(2, 16)
    draws = np.array([[0.5, 0.75, 0.9, 0.5, 0.25], [0.5, 0.75, 0.0, 0.0, 0.99]], np.float32)  # a quarter of the area
    found, dense = mixed(images, labels, draws, cutmix=1.0)
    expected = images.astype(np.float32)
    expected[0, 4:12, 0:8] = images[1, 4:12, 0:8]
    expected[1, 0:4, 12:16] = images[0, 0:4, 12:16]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(dense[:, :2], [[0.75, 0.25], [1 / 16, 15 / 16]])


def test_cutmix_rectangles_have_the_drawn_area_where_they_fit():
    images = np.stack([np.zeros((64, 64, 1), np.uint8), np.ones((64, 64, 1), np.uint8)])
    for kept in (0.1, 0.5, 0.9):
        draws = np.array([[0.5, kept, 0, 0.5, 0.5]] * 2, np.float32)
        found, _ = mixed(images, np.eye(2, dtype=np.float32), draws, cutmix=1.0)
        assert found[0].mean() == pytest.approx(1 - kept, abs=0.03)


def test_with_both_each_is_for_one_half():
    count = 2000
    images = np.zeros((count, 4, 4, 1), np.uint8)
    images[::2] = 200
    draws = mixup_cutmix.MixupCutmix(1.0, 1.0).draw(0, 0, count)
    found, dense = mixed(images, np.eye(2, dtype=np.float32)[np.arange(count) % 2], draws, mixup=1.0, cutmix=1.0)
    pasted = draws[:, 2] < 0.5
    assert 0.46 < pasted.mean() < 0.54
    assert np.isin(found[pasted], [0, 200]).all()
    spread = np.ptp(found[~pasted], axis=(1, 2, 3))
    assert (spread == 0).all()
    assert not np.isin(found[~pasted], [0, 200]).all()
    own = dense[np.arange(count), np.arange(count) % 2]
    np.testing.assert_allclose(own[~pasted], draws[~pasted, 0], atol=1e-6)


@pytest.mark.parametrize(("alphas", "only"), [({"mixup": 0.3}, "mixup"), ({"cutmix": 0.7}, "cutmix")])
def test_an_alpha_of_zero_leaves_it_out(alphas, only):
    chosen = mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas))
    draws = chosen.draw(0, 0, 200)
    images = np.zeros((200, 8, 8, 1), np.uint8)
    images[::2] = 255
    found, _ = mixed(images, np.eye(2, dtype=np.float32)[np.arange(200) % 2], draws, **alphas)
    uniform = np.ptp(found, axis=(1, 2, 3)) == 0
    whole = np.isin(found, [0, 255]).all(axis=(1, 2, 3))
    assert uniform.all() == (only == "mixup")
    assert whole.all() == (only == "cutmix")


def test_without_alphas_nothing_is_mixed():
    assert policy.build("flip_crop", mixup=0.0, cutmix=0.0).mixup_cutmix is None


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_shares_come_from_their_beta_distribution(alpha):
    draws = mixup_cutmix.MixupCutmix(alpha, 2 * alpha).draw(0, 0, 20_000).astype(float)
    assert draws.shape == (20_000, mixup_cutmix.DRAWS)
    for column, own in ((0, alpha), (1, 2 * alpha)):
        assert draws[:, column].mean() == pytest.approx(0.5, abs=0.015)
        assert draws[:, column].var() == pytest.approx(1 / (4 * (2 * own + 1)), rel=0.05)
    for column in (2, 3, 4):
        assert draws[:, column].mean() == pytest.approx(0.5, abs=0.015)
        assert draws[:, column].var() == pytest.approx(1 / 12, rel=0.05)


def test_shares_are_a_function_of_seed_and_epoch():
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
    found, dense = mixed(
        images, labels, mixup_cutmix.MixupCutmix(**({"mixup": 0.0, "cutmix": 0.0} | alphas)).draw(0, 0, 8), **alphas
    )
    assert (found.shape, found.dtype) == (images.shape, np.float32)
    assert (dense.shape, dense.dtype) == (labels.shape, np.float32)
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-6)
    assert dense.min() >= 0
    assert found.min() >= 0
    assert found.max() <= 255
    assert ((dense > 0).sum(axis=1) == 2).any()


def test_mixing_is_the_same_eagerly_and_in_a_map():
    images, labels = some_batch(32)
    chosen = mixup_cutmix.MixupCutmix(0.4, 1.0)
    draws = chosen.draw(0, 0, 32)
    eager = mixed(images, labels, draws, mixup=0.4, cutmix=1.0)
    for one, other in zip(eager, in_map(chosen.apply, images, labels, draws), strict=True):
        np.testing.assert_array_equal(one, other)
