"""Encoded bytes to pixels: uint8 [H, W, C] in 0..255, C = 1 or 3, upright, opaque.

Everything is decoded by Pillow, because it applies what TensorFlow ignores (EXIF orientation, transparency, CMYK,
16-bit samples) and refuses truncated files instead of filling them up.
"""

import io

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow warns of a decompression bomb above this; here it is an error
ORIENTATION = 0x0112  # the EXIF tag
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def decode(data: bytes, channels: int) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or GIF (first frame), told by content.

    EXIF orientation is applied; transparency is composed onto white; 16-bit samples keep their high byte; colour
    becomes grey by ITU-R 601-2 luma, grey becomes colour by repetition. No resizing.

    Returns: uint8 [H, W, channels] in 0..255.
    Raises: ValueError with the reason, in one line and without the file's name (the caller knows that).
    """
    try:
        return _pixels(_opaque(_open(data)), channels)
    except Exception as error:  # Pillow raises many kinds on hostile bytes; each of them means "cannot be read"
        raise ValueError(_reason(error)) from error


def decode_resized(data: bytes, image_size: int, channels: int) -> np.ndarray:
    """`decode`, then `resize`: uint8 [image_size, image_size, channels] in 0..255."""
    return resize(decode(data, channels), image_size)


def resize(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Scales uint8 [H, W, C] so that its short side is `image_size` and takes the centred square.

    Bilinear, antialiased when it shrinks, computed in floating point and rounded once.

    Returns: uint8 [image_size, image_size, C].
    """
    height, width, _ = pixels.shape
    if height == width == image_size:
        return pixels
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    planes = [_resize_plane(plane, image_size, box) for plane in np.moveaxis(pixels, -1, 0)]
    return np.clip(np.rint(np.stack(planes, axis=-1)), 0, 255).astype(np.uint8)


def _resize_plane(plane: np.ndarray, image_size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    # As "F": Pillow's 8-bit path rounds twice, once after each direction.
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS}")
    image.load()
    if _orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # an EXIF block that cannot be read says nothing about the pixels: the image counts as upright
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """Any mode to `L` or `RGB`."""
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return _as_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return grey


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(_as_mode(image, "L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert copies even when there is nothing to do


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    return " ".join(str(error).split()) or type(error).__name__
