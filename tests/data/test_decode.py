"""Encoded bytes to pixels: formats, orientation, transparency, limits, scaling."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from support.commands import message
from support.images import MAX_PIXELS, WHITE, decode_image, image_spec
from train.data import decode
from train.data.decode import Header

FORMATS = "not an image in a supported format (JPEG, PNG, GIF, BMP, WEBP)"
BACKGROUND = (10, 200, 70)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def luma(pixels):
    weights = np.array([19595, 38470, 7471])
    return ((pixels.astype(np.int64) @ weights + 2**15) >> 16).astype(np.uint8)[..., None]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_color_and_grey_images_are_decoded_exactly(kind):
    pixels = noise(5, 7, 3)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(pixels), kind, **options)
    np.testing.assert_array_equal(decode_image(data, 3), pixels)
    np.testing.assert_array_equal(decode_image(data, 1), luma(pixels))


def test_grey_becomes_colour_by_repetition():
    pixels = noise(5, 7, 1)
    data = encode(Image.fromarray(pixels[..., 0]))
    np.testing.assert_array_equal(decode_image(data, 1), pixels)
    np.testing.assert_array_equal(decode_image(data, 3), pixels.repeat(3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),  # shown after a quarter turn clockwise
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = turned(orientation)
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=100, subsampling=0, exif=exif)
    pixels = decode_image(data, 3).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels - upright).max() <= 3


def test_broken_exif_counts_as_upright():
    data = encode(Image.fromarray(noise(8, 8, 3)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data, 3).shape == (8, 8, 3)


@pytest.mark.parametrize("background", [WHITE, BACKGROUND])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composed_onto_the_background(mode, background):
    pixels = noise(6, 6, len(mode))
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    data = encode(Image.fromarray(pixels))
    decoded = decode_image(data, 3, background).astype(int)
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + np.array(background) * (1 - alpha), (6, 6, 3))
    np.testing.assert_array_equal(decoded[0], np.broadcast_to(background, (6, 3)))
    np.testing.assert_array_equal(decoded[1], np.broadcast_to(pixels[1, :, :-1], (6, 3)))
    assert np.abs(decoded - expected).max() <= 1
    grey = decode_image(data, 1, background)
    np.testing.assert_array_equal(grey[0], np.broadcast_to(luma(np.array([background], np.uint8)), (6, 1)))
    np.testing.assert_array_equal(grey, luma(decoded))
    if background == WHITE:
        np.testing.assert_array_equal(decode_image(data, 3), decoded)  # unless told otherwise


def test_palette_images_are_decoded_with_and_without_transparency():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.frombytes("P", (2, 2), indices.tobytes())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]])
    for background in (WHITE, BACKGROUND):
        np.testing.assert_array_equal(decode_image(encode(image), 3, background), expected)
        np.testing.assert_array_equal(decode_image(encode(image, "GIF"), 3, background), expected)
    for background in (WHITE, BACKGROUND):
        expected[0, 1] = expected[1, 1] = background
        for kind in ("PNG", "GIF"):
            clear = encode(image, kind, transparency=1)
            np.testing.assert_array_equal(decode_image(clear, 3, background), expected)


def test_image_spec_sets_the_background():
    data = encode(Image.new("RGBA", (4, 4), (1, 2, 3, 0)))
    seen = decode.decode_and_resize(data, image_spec(2, 3, background=BACKGROUND))
    np.testing.assert_array_equal(seen, np.broadcast_to(BACKGROUND, (2, 2, 3)))
    np.testing.assert_array_equal(decode.decode_and_resize(data, image_spec(2, 3)), np.full((2, 2, 3), 255))


def test_cmyk_is_converted_exactly():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0] = 255  # full cyan above, full black below
    ink[8:, :, 3] = 255
    data = encode(Image.frombytes("CMYK", (16, 16), ink.tobytes()), "JPEG", quality=100, subsampling=0)
    pixels = decode_image(data, 3).astype(int)
    assert np.abs(pixels[:8] - [0, 255, 255]).max() <= 2
    assert np.abs(pixels[8:]).max() <= 2


def png16(samples, colour_type, *more, size=None):
    """A 16-bit PNG, which Pillow writes for grey only; size: (width, height) in its header."""
    width, height = size or samples.shape[1::-1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return png([(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows))])


def png(chunks):
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_16_bit_samples_keep_their_high_byte():
    grey = np.array([[0, 255, 256], [257 * 100, 65279, 65535]], np.uint16)
    expected = (grey >> 8).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode_image(png16(grey, 0), 1), expected)
    np.testing.assert_array_equal(decode_image(png16(grey, 0), 3), expected.repeat(3, axis=2))
    colour = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3), dtype=np.uint16)
    np.testing.assert_array_equal(decode_image(png16(colour, 2), 3), colour >> 8)
    clear = png16(grey, 0, (b"tRNS", struct.pack(">H", 256)))  # the sample 256 is transparent, 255 is not
    np.testing.assert_array_equal(decode_image(clear, 1)[0, :, 0], [0, 0, 255])
    np.testing.assert_array_equal(decode_image(clear, 3, BACKGROUND)[0], [[0, 0, 0], [0, 0, 0], BACKGROUND])


def test_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data, 3), np.broadcast_to([255, 0, 0], (4, 4, 3)))


def test_broken_bytes_are_rejected_with_a_reason():
    whole = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    assert message(decode_image, whole[: len(whole) // 2], 3).startswith("image file is truncated")
    for read in (lambda data: decode.read_header(data, MAX_PIXELS), lambda data: decode_image(data, 3)):
        assert message(read, b"") == FORMATS
        assert message(read, b"no image") == FORMATS
        assert message(read, encode(Image.new("RGB", (2, 2)), "TIFF")) == FORMATS


# ----------------------------------------------------------------------------------------------- headers and limits


def turned(orientation):
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("JPEG", ["L", "RGB", "CMYK"]),
        ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
        ("GIF", ["P"]),
        ("BMP", ["1", "L", "P", "RGB"]),
        ("WEBP", ["RGB", "RGBA"]),
    ],
)
def test_header_has_the_format_and_size(kind, modes):
    for mode in modes:
        through = {"LA": "RGBA", "RGBA": "RGBA", "I;16": "L"}.get(mode, "RGB")
        data = encode(Image.fromarray(noise(5, 7, 4)).convert(through).convert(mode), kind)
        assert decode.read_header(data, MAX_PIXELS) == Header(kind, 7, 5, mode)


@pytest.mark.parametrize("orientation", [1, 3, 6, 9])
def test_header_has_the_stored_size(orientation):
    data = encode(Image.new("RGB", (7, 5)), "JPEG", exif=turned(orientation))
    assert decode.read_header(data, MAX_PIXELS) == Header("JPEG", 7, 5, "RGB")
    assert decode_image(data, 3).shape == ((7, 5, 3) if orientation == 6 else (5, 7, 3))
    assert decode.is_upright(data) == (orientation in (1, 9))  # there is no 9


def test_more_pixels_than_the_limit_are_rejected():
    data = encode(Image.fromarray(noise(5, 7, 3)))
    expected = "7x5 pixels are more than the limit of 34"
    assert message(decode.read_header, data, 34) == expected
    assert message(decode_image, data, 3, max_pixels=34) == expected
    assert decode.read_header(data, 35).width == 7
    assert decode_image(data, 3, max_pixels=35).shape == (5, 7, 3)


def bomb(width, height, rows=b"\0\0"):
    """A PNG with a large size in its header."""
    return png([(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 1))])


@pytest.mark.parametrize(("width", "height"), [(8_000, 7_000), (100_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_rejected_by_its_header(width, height):
    data = bomb(width, height)
    assert len(data) < 70
    expected = f"{width}x{height} pixels are more than the limit of 50,000,000"
    assert message(decode.read_header, data, MAX_PIXELS) == expected
    assert message(decode_image, data, 3) == expected


def test_higher_pixel_limit_is_respected():
    assert decode.read_header(bomb(20_000, 10_000), 200_000_000) == Header("PNG", 20_000, 10_000, "L")
    expected = "20000x10000 pixels are more than the limit of 199,999,999"
    assert message(decode.read_header, bomb(20_000, 10_000), 199_999_999) == expected


@pytest.mark.parametrize(("limit", "least", "most"), [(50_000_000, 0, 5), (56_000_000, 50, 500)])
def test_rejected_bomb_uses_little_memory(limit, least, most, tmp_path):
    """Negative control: with a limit that accepts them, the same bytes do use the memory."""
    (tmp_path / "bomb.png").write_bytes(bomb(8_000, 7_000, bytes(8_001 * 7_000)))
    assert (tmp_path / "bomb.png").stat().st_size < 300_000
    code = (
        "import re, sys; from pathlib import Path; from train.data import decode;"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024;"
        "data, limit, found = Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), ''; before = peak()\n"
        "try: found = decode.decode(data, 1, (0, 0, 0), limit).shape\n"
        "except ValueError as error: found = error\n"
        "print(peak() - before, found)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.png"), str(limit)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, actual = output.split(maxsplit=1)
    assert least <= float(grown) < most  # MiB
    expected = "(7000, 8000, 1)" if least else "8000x7000 pixels are more than the limit of 50,000,000"
    assert actual.strip() == expected


# ------------------------------------------------------------------------------------------------------------ scaling


def triangle(length, size):
    """Weights [size, length] of the antialiased bilinear filter, in float64, written down from its definition."""
    scale = length / size
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(1 - np.abs((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (28, 32), (100, 32), (33, 7), (5, 1)])
def test_resize_rounds_the_filter_once(side, size):
    pixels = noise(side, side, 1, seed=side)
    exact = triangle(side, size) @ pixels[..., 0].astype(float) @ triangle(side, size).T
    assert np.abs(decode.resize(pixels, size, crop_fraction=1)[..., 0] - exact).max() <= 0.5 + 1e-3


def test_resize_scales_the_short_side_and_crops_the_centre():
    pixels = noise(8, 16, 1)
    whole = triangle(8, 4) @ pixels[..., 0].astype(float) @ triangle(16, 8).T
    assert np.abs(decode.resize(pixels, 4, crop_fraction=1)[..., 0] - whole[:, 2:6]).max() <= 0.5 + 1e-3
    turned = decode.resize(pixels.swapaxes(0, 1), 4, crop_fraction=1)[..., 0]
    assert np.abs(turned - whole.T[2:6]).max() <= 0.5 + 1e-3
    square = noise(6, 6, 3)
    assert decode.resize(square, 6, crop_fraction=1) is square


def test_crop_fraction_crops_the_centre():
    pixels = noise(8, 8, 3)
    np.testing.assert_array_equal(decode.resize(pixels, 4, crop_fraction=0.5), pixels[2:6, 2:6])
    np.testing.assert_array_equal(decode.resize(pixels, 6, crop_fraction=0.75), pixels[1:7, 1:7])
    wide = noise(8, 16, 1)
    np.testing.assert_array_equal(decode.resize(wide, 4, crop_fraction=0.5), wide[2:6, 6:10])
    np.testing.assert_array_equal(
        decode.resize(wide.swapaxes(0, 1), 4, crop_fraction=0.5), wide.swapaxes(0, 1)[6:10, 2:6]
    )
    np.testing.assert_array_equal(decode.resize(wide, 8, crop_fraction=1), wide[:, 4:12])


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 8), (8, 12, 8), (20, 16, 4)])
def test_crop_fraction_scales_the_image_and_crops_the_centre(height, width, size):
    pixels, whole = noise(height, width, 1), 2 * size / min(height, width)
    tall, wide = round(height * whole), round(width * whole)
    exact = triangle(height, tall) @ pixels[..., 0].astype(float) @ triangle(width, wide).T
    top, left = (tall - size) // 2, (wide - size) // 2
    seen = decode.resize(pixels, size, crop_fraction=0.5)[..., 0]
    assert np.abs(seen - exact[top : top + size, left : left + size]).max() <= 0.5 + 1e-3
    assert np.abs(decode.resize(pixels, size, crop_fraction=1)[..., 0] - seen.astype(float)).max() > 10


@pytest.mark.parametrize("channels", [1, 3])
def test_image_spec_is_decoded_cropped_and_scaled(channels):
    pixels = noise(8, 12, 3)
    data, view = encode(Image.fromarray(pixels)), image_spec(4, channels, crop_fraction=0.5)
    seen = decode.decode_and_resize(data, view)
    assert seen.shape == view.shape == (4, 4, channels)
    np.testing.assert_array_equal(seen, decode_image(data, channels)[2:6, 4:8])
    whole = decode.decode_and_resize(data, image_spec(4, channels))
    np.testing.assert_array_equal(whole, decode.resize(decode_image(data, channels), 4, crop_fraction=1))
    assert (whole != seen).any()
