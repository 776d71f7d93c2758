"""Random resized crops: boxes, colours and pixels, each against its definition."""

import math

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from support.batches import make_augmentation
from support.images import decode_image, jpeg, noise, photo
from train.data import decode, sampling
from train.data.augmentation import random_resized_crop

# ----------------------------------------------------------------------------------------------- colours of a crop


CROP = make_augmentation("inception").random_resized_crop
COLUMNS = ("area", "stretch", "y", "x", "mirror", "brightness", "contrast", "saturation", "hue")
LAST = np.float32(1) - np.float32(2**-24)  # the largest draw


def drawn(**values):
    """One row of draws: 0.5, which changes no colour, except for the given ones."""
    assert set(values) <= set(COLUMNS)
    return np.array([[values.get(name, 0.5) for name in COLUMNS]], np.float32)


def distorted_by_hand(pixels, draws, color=1.0, every=8):
    """Brightness, then saturation, then hue in YIQ, then contrast about the mean of the sampled rows."""
    brightness, contrast, saturation, hue = (2 * draws[5:].astype(float) - 1) * color
    actual = pixels + 32 * brightness
    if pixels.shape[-1] == 3:
        luma = actual @ [0.299, 0.587, 0.114]
        actual = luma[..., None] + (1 + 0.5 * saturation) * (actual - luma[..., None])
        to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        y, i, q = np.moveaxis(actual @ to_yiq.T, -1, 0)
        plane = (i + 1j * q) * np.exp(2j * np.pi * 0.2 * hue)
        actual = np.stack([y, plane.real, plane.imag], axis=-1) @ np.linalg.inv(to_yiq).T
    mean = actual[::every].mean(axis=(0, 1))
    return mean + (1 + 0.5 * contrast) * (actual - mean)


def distort(pixels, draws, color=1.0):
    """The result of the color matrix, neither clipped nor rounded."""
    channels = pixels.shape[-1]
    [colors] = make_augmentation("inception", color=color).random_resized_crop.color_matrices(draws, channels)
    mean = pixels[::8].mean(axis=(0, 1))
    return pixels @ colors[:, :channels].T + colors[:, channels:-1] @ mean + colors[:, -1]


def finish(pixels, draws, side=None, mirrored=False, **options):
    """`pixels` as a finished crop, of the same size or of `side`."""
    chosen = make_augmentation("inception", **options).random_resized_crop
    [colors] = chosen.color_matrices(draws, pixels.shape[-1])
    return filled(chosen, pixels, mirrored, colors, side or len(pixels))


def filled(chosen, pixels, mirrored, colors, side):
    """The result of `finish` in memory with other contents."""
    image = np.full((side, side, pixels.shape[-1]), 77, np.uint8)
    assert chosen.render_into(pixels, mirrored, colors, image) is None
    return image


def max_difference(actual, expected):
    """The largest distance of bytes from clipped real numbers: 0.5 for perfect rounding."""
    return np.abs(actual - np.clip(expected, 0, 255)).max()


ROUNDED = 0.5 + 2e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("color", [1.0, 0.3])
def test_color_distortion_matches_the_definition(channels, color):
    pixels = noise(40, 40, channels)
    pixels[::8] //= 2  # their mean is another than that of all rows
    for row in sampling.uniform_rows(0, "crop", 0, 50, random_resized_crop.DRAWS):
        expected, wrong = (distorted_by_hand(pixels.astype(float), row, color, every) for every in (8, 1))
        np.testing.assert_allclose(distort(pixels.astype(float), row[None], color), expected, atol=2e-3)
        actual = finish(pixels, row[None], color=color)
        assert max_difference(actual, expected) < ROUNDED
        assert max_difference(actual, wrong) > ROUNDED


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLUMNS)
def test_each_color_draw_changes_one_property(name, channels):
    pixels = noise(40, 40, channels)
    for value in (0.0, 0.25, 0.999):
        draws = drawn(**{name: value})
        exact, actual = distort(pixels.astype(float), draws), finish(pixels, draws)
        np.testing.assert_allclose(exact, distorted_by_hand(pixels.astype(float), draws[0]), atol=2e-3)
        assert max_difference(actual, exact) < ROUNDED
        colour = name in ("saturation", "hue")
        changed = name in ("brightness", "contrast") or (colour and channels == 3)
        assert (np.abs(exact - pixels).max() > 1) == changed
        assert (actual != pixels).any() == changed
        if colour:  # the luma stays
            luma = [[0.299], [0.587], [0.114]] if channels == 3 else [[1.0]]
            np.testing.assert_allclose(exact @ luma, pixels @ luma, atol=2e-3)


def test_extreme_color_draws_match_the_definition():
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
            assert max_difference(finish(pixels, draws), expected) < ROUNDED
    forth, back = drawn(hue=0.75), drawn(hue=0.25)
    np.testing.assert_allclose(distort(distort(pixels.astype(float), forth), back), pixels, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_strength_of_zero_changes_no_color(channels):
    pixels, extreme = noise(40, 40, channels), drawn(brightness=0, contrast=1, hue=0)
    np.testing.assert_allclose(distort(pixels.astype(float), drawn()), pixels, atol=1e-4)
    np.testing.assert_allclose(distort(pixels.astype(float), extreme, color=0.0), pixels, atol=1e-4)
    np.testing.assert_array_equal(finish(pixels, drawn()), pixels)
    np.testing.assert_array_equal(finish(pixels, extreme, color=0.0), pixels)
    for maps in (
        CROP.color_matrices(drawn(), channels),
        make_augmentation("inception", color=0.0).random_resized_crop.color_matrices(extreme, channels),
    ):
        np.testing.assert_allclose(maps, [np.eye(channels, 2 * channels + 1)], atol=1e-7)


def test_hue_and_saturation_do_not_change_grey():
    pixels = np.repeat(noise(16, 16, 1), 3, axis=2)
    for row in sampling.uniform_rows(0, "crop", 0, 20, random_resized_crop.DRAWS):
        exact, actual = distort(pixels.astype(float), row[None]), finish(pixels, row[None])
        np.testing.assert_allclose(exact, exact[..., :1].repeat(3, axis=2), atol=2e-3)
        assert max_difference(actual, exact) < ROUNDED
        assert np.ptp(actual.astype(int), axis=2).max() <= 1  # where a channel is next to a half


def test_color_matrices_of_a_batch_equal_those_of_each_example():
    draws = sampling.uniform_rows(0, "crop", 0, 10, random_resized_crop.DRAWS)
    for channels in (1, 3):
        maps = CROP.color_matrices(draws, channels)
        assert maps.shape == (10, channels, 2 * channels + 1)
        assert maps.dtype == np.float32
        for row, actual in zip(draws, maps, strict=True):
            np.testing.assert_array_equal(actual, CROP.color_matrices(row[None], channels)[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 50), (20, 17), (64, 64), (32, 32)])
def test_pixels_are_rounded_once_half_to_even(shape, channels):
    """Rounding after resizing as well would change many of them."""
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
        actual = filled(CROP, pixels, False, colors, 32)
        np.testing.assert_array_equal(actual, expected)
        differ += (actual != twice).sum()
    assert (differ > 0) == (shape != (32, 32))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_clipped_to_0_and_255(channels):
    """Neither the absolute value nor the value modulo 256."""
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
    chosen = make_augmentation("inception", **options).random_resized_crop
    draws = sampling.uniform_rows(5, "crop", 0, count, random_resized_crop.DRAWS)
    return chosen.sample_boxes(np.tile(np.array(size, np.int32), (count, 1)), draws)


def box(size, chosen=CROP, **values):
    [actual] = chosen.sample_boxes(np.array([size], np.int32), drawn(**values))
    return actual


SIZES = [(90, 120), (120, 90), (300, 100), (64, 64)]
ODD = [(1000, 50), (50, 1000), (300, 100), (7, 400), (3, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_boxes_have_at_least_the_minimum_area(size):
    _, _, height, width = boxes(size).T.astype(int)
    share = height * width / (size[0] * size[1])
    assert share.min() >= 0.08
    assert share.min() < 0.1
    assert share.max() <= 1


@pytest.mark.parametrize(("size", "least_area"), [((600, 50), 0.08), ((50, 550), 0.08), ((400, 400), 0.9)])
def test_boxes_have_the_minimum_area_if_the_aspect_ratio_allows_it(size, least_area):
    largest = min(size[0], size[1] * 4 / 3) * min(size[1], size[0] * 4 / 3)
    assert largest > least_area * size[0] * size[1]
    _, _, height, width = boxes(size, least_area=least_area).T.astype(int)
    assert ((height + 0.5) * (width + 0.5)).min() >= least_area * size[0] * size[1]  # in whole pixels


@pytest.mark.parametrize("size", SIZES)
def test_boxes_have_an_allowed_aspect_ratio(size):
    _, _, height, width = boxes(size).T
    assert (width <= height * 4 / 3 + 1).all()  # in whole pixels
    assert (height <= width * 4 / 3 + 1).all()
    assert (width > 1.25 * height).any()
    assert (height > 1.25 * width).any()


@pytest.mark.parametrize("size", ODD)
def test_boxes_of_elongated_images_have_an_allowed_aspect_ratio(size):
    actual = boxes(size)
    assert actual[:, 2:].min() >= 1
    longer, shorter = actual[:, 2:].max(axis=1), actual[:, 2:].min(axis=1)
    assert (longer <= shorter * 4 / 3 + 1).all()
    assert (actual[:, 2:] < size).any(axis=1).all()
    assert len(set(actual[:, np.argmax(size)].tolist())) > max(size) / 2  # all along it


@pytest.mark.parametrize("size", [*SIZES, *ODD, (1, 1), (2, 3), (7, 5)])
def test_boxes_are_inside_the_image(size):
    ends = np.array(np.meshgrid(*[[0, LAST]] * 4), np.float32).reshape(4, -1).T
    extreme = CROP.sample_boxes(
        np.tile(size, (len(ends), 1)), np.pad(ends, ((0, 0), (0, random_resized_crop.DRAWS - 4)))
    )
    for actual in (boxes(size), extreme):
        assert actual.dtype == np.int32
        assert actual.min() >= 0
        assert actual[:, 2:].min() >= 1
        assert (actual[:, :2] + actual[:, 2:] <= size).all()


def test_boxes_reach_the_last_row_and_column():
    for area in (0, 0.3, 0.5, 0.8):
        draws = drawn(area=area).repeat(3000, axis=0)
        draws[:, 2:4] = sampling.uniform_rows(5, "crop", 0, 3000, 2)
        actual = CROP.sample_boxes(np.tile([7, 9], (3000, 1)), draws)
        [(height, width)] = {tuple(extent) for extent in actual[:, 2:].tolist()}
        places = {(y, x) for y in range(8 - height) for x in range(10 - width)}
        assert {tuple(place) for place in actual[:, :2].tolist()} == places
    for values, corner in (({"y": 0, "x": 0}, (0, 0)), ({"y": LAST, "x": LAST}, (900, 1200))):
        top, left, height, width = box((900, 1200), area=0.1, **values)
        assert (top, left) == (corner if not values["y"] else (corner[0] - height, corner[1] - width))


def test_boxes_of_given_draws_match_calculations_by_hand():
    """Half of the area of 400x300 is 60000; as wide as the image it is 200 high, a stretch of 1.5."""
    whole = make_augmentation("inception", least_area=0.0, most_stretch=2.0).random_resized_crop
    height, width = math.sqrt(60000 / math.sqrt(0.5 * 1.5)), math.sqrt(60000 * math.sqrt(0.5 * 1.5))
    assert (round(height), round(width)) == (263, 228)
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5), [69, 36, 263, 228])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5, stretch=0, y=0, x=0), [0, 0, 346, 173])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.5, stretch=1, y=0, x=0), [0, 0, 200, 300])
    np.testing.assert_array_equal(box((400, 300), whole, area=0.125, stretch=1, y=LAST, x=0.25), [313, 32, 87, 173])
    np.testing.assert_array_equal(
        box((400, 300), make_augmentation("inception", least_area=1.0).random_resized_crop, stretch=0), [0, 0, 400, 300]
    )
    np.testing.assert_array_equal(box((1000, 50), area=1, y=0.5), [467, 0, 67, 50])


def test_draws_of_boxes_are_uniform():
    """The area always; the aspect ratio for images in which every box fits."""
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
    actual = boxes(size, 4000)
    for top, left, height, width in actual:
        often[top : top + height, left : left + width] += 1 / 4000
    np.testing.assert_allclose(often, often[::-1], atol=0.05)
    np.testing.assert_allclose(often, often[:, ::-1], atol=0.05)
    for axis in (0, 1):
        room = size[axis] - actual[:, 2 + axis]
        place = actual[room > 5, axis] / room[room > 5]
        assert 0.48 < place.mean() < 0.52
        assert (np.abs(np.histogram(place, 4, (0, 1))[0] / len(place) - 0.25) < 0.05).all()


def test_box_depends_on_its_own_draws_only():
    np.testing.assert_array_equal(boxes((90, 120), 200), boxes((90, 120), 200))
    assert len({tuple(box) for box in boxes((900, 1200), 200).tolist()}) == 200
    draws = sampling.uniform_rows(5, "crop", 0, 20, random_resized_crop.DRAWS)
    sizes = np.random.default_rng(0).integers(1, 500, (20, 2), dtype=np.int32)
    together = CROP.sample_boxes(sizes, draws)
    for number, actual in enumerate(together):
        np.testing.assert_array_equal(
            CROP.sample_boxes(sizes[number : number + 1], draws[number : number + 1])[0], actual
        )


def test_box_of_a_one_pixel_image_is_the_image():
    np.testing.assert_array_equal(boxes((1, 1), 5), [[0, 0, 1, 1]] * 5)


# ------------------------------------------------------------------------------------------------- pixels of a crop


def cut(image, box, side=32):
    """The crop as a stream cuts it; image: a JPEG or pixels."""
    box = np.array(box, np.int32)
    part = random_resized_crop.jpeg_scale(box, side)
    small = decode.decode_jpeg(image, part) if isinstance(image, bytes) else random_resized_crop.downscale(image, part)
    actual = random_resized_crop.crop_box(small, box, part)
    assert actual.dtype == np.uint8
    return actual


def test_jpeg_scale_keeps_the_crop_at_least_as_large_as_the_output():
    parts = {1: 1, 31: 1, 32: 1, 63: 1, 64: 2, 127: 2, 128: 4, 255: 4, 256: 8, 511: 8, 512: 8, 5000: 8}
    for length, part in parts.items():
        assert random_resized_crop.jpeg_scale(np.array([3, 4, length, 9999]), 32) == part
        assert random_resized_crop.jpeg_scale(np.array([3, 4, 9999, length]), 32) == part


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
def test_jpeg_decoded_at_full_size_matches_pillow(options):
    for size in ((90, 120), (91, 133), (2, 3), (17, 8)):
        data = jpeg(noise(*size, 3), quality=70, **options)
        np.testing.assert_array_equal(decode.decode_jpeg(data), decode_image(data, 3))
        for part in (2, 4, 8):
            assert decode.decode_jpeg(data, part).shape == (-(-size[0] // part), -(-size[1] // part), 3)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    assert decode.decode_jpeg(jpeg(photo(90, 120), exif=turned)).shape == (90, 120, 3)
    with pytest.raises(ValueError):
        decode.decode_jpeg(b"gone")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plain", [True, False])
def test_mirrored_crop_is_exactly_the_mirror_image(plain, channels):
    pixels = photo(90, 120, channels)
    actual = cut(jpeg(pixels) if plain else pixels, (10, 20, 50, 60))[..., :channels]
    for options in ({}, {"color": 0.0}):
        straight, mirrored = (
            finish(actual, drawn(brightness=0.7, hue=0.1), 32, turned, **options) for turned in (False, True)
        )
        assert straight.shape == mirrored.shape == (32, 32, channels)
        assert straight.dtype == mirrored.dtype == np.uint8
        np.testing.assert_array_equal(mirrored, straight[:, ::-1])
        assert (mirrored != straight).any()


def test_half_of_the_crops_are_mirrored():
    draws = sampling.uniform_rows(0, "crop", 0, 4000, random_resized_crop.DRAWS)
    np.testing.assert_array_equal(CROP.mirror_mask(draws), draws[:, COLUMNS.index("mirror")] < 0.5)
    assert 0.47 < CROP.mirror_mask(draws).mean() < 0.53
    assert not make_augmentation("inception", mirror=False).random_resized_crop.mirror_mask(draws).any()


def test_crop_is_resized_distorted_clipped_and_rounded_once():
    pixels = noise(90, 120, 3)
    top, left, height, width = inside = (13, 29, 50, 60)
    exact = tf.image.resize(pixels[top : top + height, left : left + width].astype(np.float32), (32, 32)).numpy()
    draws = drawn(brightness=1, contrast=1, saturation=0.9, hue=0.8)
    expected = distorted_by_hand(exact.astype(float), draws[0])
    assert expected.min() < -20
    assert expected.max() > 275
    part = cut(pixels, inside)
    np.testing.assert_array_equal(part, pixels[top : top + height, left : left + width])
    assert max_difference(finish(part, draws, 32), expected) < 0.51
    assert max_difference(finish(part, draws, 32, color=0.0), exact) < 0.501


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
def test_crop_decoded_at_a_reduced_scale_is_close_to_the_resized_full_crop(box, side, kind, channels):
    data = jpeg(photo(600, 800, channels))
    actual = cut(data, box, side)
    ratio = max(ratio for ratio in (1, 2, 4, 8) if ratio == 1 or min(box[2:]) >= side * ratio)
    assert actual.shape == (box[2] // ratio, box[3] // ratio, 3)
    decoded = decode_image(data, 3)
    top, left, height, width = (part // ratio * ratio for part in box)  # off by less than a pixel of the result
    whole = decoded[top : top + height, left : left + width].astype(np.float32)
    expected = tf.image.resize(whole, actual.shape[:2], "area").numpy()
    assert np.abs(actual - expected).mean() < 1.5
    assert np.abs(actual[:, ::-1] - expected).mean() > 5
    resized = [finish(actual, drawn(), side, color=0.0), tf.image.resize(expected, (side, side)).numpy()]
    assert np.abs(resized[0] - resized[1]).mean() < 1.5
    if ratio > 1:
        straight = tf.image.resize(whole, (side, side), kind).numpy()
        assert np.abs(resized[0] - straight).mean() < 2.5
    else:
        np.testing.assert_array_equal(actual, whole)
    raw = cut(decoded, box, side)
    assert raw.shape == actual.shape
    assert np.abs(raw.astype(float) - actual).mean() < 1.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", BOXES)
def test_downscaling_averages_pixels(box, channels):
    pixels = noise(600, 800, channels)
    ratio = max(ratio for ratio in (1, 2, 4, 8) if ratio == 1 or min(box[2:]) >= 64 * ratio)
    top, left, height, width = (part // ratio * ratio for part in box)
    whole = pixels[top : top + height, left : left + width]
    actual = cut(pixels, box, 64)
    blocks = whole.reshape(height // ratio, ratio, width // ratio, ratio, channels).mean(axis=(1, 3))
    assert actual.shape == blocks.shape
    assert max_difference(actual, blocks) <= 0.5


@pytest.mark.parametrize("size", [(601, 803), (333, 517)])
def test_downscaling_matches_the_jpeg_decoder_at_any_size(size):
    data = jpeg(photo(*size))
    for part in (2, 4, 8):
        actual = random_resized_crop.downscale(decode_image(data, 3), part)
        assert actual.shape == decode.decode_jpeg(data, part).shape
        assert np.abs(actual.astype(float) - decode.decode_jpeg(data, part)).mean() < 1.5


def test_crop_is_never_decoded_smaller_than_the_output():
    data = jpeg(photo(600, 800))
    for side in (16, 32, 100, 224):
        for own in boxes((600, 800), 60):
            actual = cut(data, own, side)
            least = min(own[2:])
            assert min(actual.shape[:2]) >= min(side, least)
            assert min(actual.shape[:2]) < 2 * side or least // 8 == min(actual.shape[:2])


@pytest.mark.parametrize("size", [(257, 323), (131, 97), (33, 1029)])
def test_boxes_at_the_edges_are_complete_at_every_scale(size):
    pixels = photo(*size)
    for image in (jpeg(pixels), pixels):
        for side in (4, 8, 16, 32, 64):
            for value in (0, LAST):
                for area in (0, 0.5, LAST):
                    own = box(size, area=area, y=value, x=value)
                    part = random_resized_crop.jpeg_scale(own, side)
                    assert cut(image, own, side).shape == (own[2] // part, own[3] // part, 3)
