"""Encoded bytes to pixels: uint8 [H, W, C] in 0..255, C = 1 or 3, upright, opaque.

Pillow decodes everything, because it applies what TensorFlow ignores (EXIF orientation, transparency, CMYK, 16-bit
samples) and refuses truncated files instead of filling them up. What is wanted fast, crops of JPEGs, is decoded by
simplejpeg: the same bits in two thirds of the time, and smaller where that is enough.
"""

import contextlib
import io
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

JPEG_SCALE_DENOMS = (1, 2, 4, 8)  # of its size; a JPEG is quick to decode at one over these

# Damage that still leaves a picture. What leaves none raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE = (255, 255, 255)

# There are several copies of an image in memory while it is converted.
MAX_PIXELS = 50_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would come before ours, and could not be raised
LARGE_PIXELS = 4_000_000
_large_image_lock = threading.Lock()  # two at once may need more memory than there is, and one of them would fail


@dataclass(frozen=True)
class ImageSpec:
    """What every image is brought to: a square of `image_size` pixels with 1 (grey) or 3 channels (RGB).

    background: red, green, blue in 0..255, behind what is transparent. crop_fraction: in (0, 1], share of the short
    side that is looked at, in the centre.
    """

    image_size: int
    channels: int
    background: tuple[int, int, int] = WHITE
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1 pixel, got {self.image_size}; use data.image_size=32")
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels must be 1 or 3, got {self.channels}; use data.channels=1")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.channels


@dataclass(frozen=True)
class Header:
    """What an image says of itself before a pixel is decoded; width and height in pixels as stored, before turning.

    Of the orientation it says nothing: in some formats that stands behind the pixels.
    """

    format: str
    width: int
    height: int
    mode: str


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Raises: ValueError with the reason in one line, also for an image of more than `max_pixels`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return _make_header(image, max_pixels)
    except Exception as error:
        raise ValueError(_reason(error)) from error


def decode(
    data: bytes, channels: int, background: tuple[int, int, int] = WHITE, max_pixels: int | None = MAX_PIXELS
) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or GIF (first frame), told by content.

    EXIF orientation is applied; transparency is composed onto the background; 16-bit samples keep their high byte;
    colour becomes grey by ITU-R 601-2 luma, grey becomes colour by repetition. No resizing. `max_pixels`: None for what
    has been looked at before.

    Returns: uint8 [H, W, channels] in 0..255.
    Raises: ValueError with the reason, in one line and without the file's name (the caller knows that).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        header = _make_header(image, max_pixels)
        with _limit_memory(header.width * header.height):
            image.load()
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            return _to_array(_to_opaque(image, background), channels)
    except Exception as error:  # Pillow raises many kinds on hostile bytes; each of them means "cannot be read"
        raise ValueError(_reason(error)) from error


def decode_jpeg(data: bytes, scale_denom: int = 1) -> np.ndarray:
    """A JPEG at 1/part of its size, rounded up: uint8 [H, W, 3] in 0..255, not turned. part: one of JPEG_PARTS.

    Raises: ValueError, also for damage that still leaves a picture.
    """
    if scale_denom == 1:
        return simplejpeg.decode_jpeg(data, "RGB")
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // scale_denom), min_width=-(-width // scale_denom))


def decode_and_resize(data: bytes, spec: ImageSpec) -> np.ndarray:
    """`decode`, then `resize`: uint8 [image_size, image_size, channels] in 0..255."""
    return resize(decode(data, spec.channels, spec.background, None), spec.image_size, spec.crop_fraction)


def resize(pixels: np.ndarray, image_size: int, crop_fraction: float = 1.0) -> np.ndarray:
    """Scales uint8 [H, W, C] so that `crop_fraction` of its short side is `image_size`, and takes the centred square.

    Bilinear, antialiased when it shrinks, computed in floating point and rounded once.

    Returns: uint8 [image_size, image_size, C].
    """
    height, width, _ = pixels.shape
    if height == width == image_size and crop_fraction == 1:
        return pixels
    side = crop_fraction * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    with _limit_memory(height * width):
        planes = [_resize_plane(plane, image_size, box) for plane in np.moveaxis(pixels, -1, 0)]
    return np.clip(np.rint(np.stack(planes, axis=-1)), 0, 255).astype(np.uint8)


def _resize_plane(plane: np.ndarray, image_size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    # As "F": Pillow's 8-bit path rounds twice, once after each direction.
    image = Image.fromarray(np.ascontiguousarray(plane)).convert("F")
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))


def _limit_memory(num_pixels: int) -> contextlib.AbstractContextManager:
    return _large_image_lock if num_pixels > LARGE_PIXELS else contextlib.nullcontext()


def _make_header(image: Image.Image, max_pixels: int | None) -> Header:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels:,}")
    return Header(str(image.format), image.width, image.height, image.mode)


def is_upright(jpeg: bytes) -> bool:
    """Whether a JPEG's EXIF block says, or does not say, that it must be turned."""
    return _orientation(Image.open(io.BytesIO(jpeg), formats=("JPEG",))) == 1


def _orientation(image: Image.Image) -> int:
    """EXIF: 1 is upright. Of an image that has been loaded: looking for the block may load it, and fail for that."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # an EXIF block that cannot be read says nothing about the pixels: the image counts as upright
        return 1
    return found if found in range(2, 9) else 1


def _to_opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to `L` or `RGB`."""
    if image.mode.startswith("I"):
        image = _to_eight_bit(image)
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, background)
        image.alpha_composite(layer)
    return _convert_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(_convert_mode(image, "L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert copies even when there is nothing to do


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return " ".join(str(error).split()) or type(error).__name__
