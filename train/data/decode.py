"""Decodes images to pixels: uint8 [H, W, C] in 0..255, C = 1 or 3, upright, opaque.

Pillow decodes everything, because it applies what TensorFlow ignores (EXIF orientation, transparency, CMYK, 16-bit
samples) and rejects truncated files instead of padding them. simplejpeg decodes the JPEGs that training crops: the same
bits in two thirds of the time, and at a reduced size where that is enough.
"""

import contextlib
import io
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

JPEG_SCALE_DENOMS = (1, 2, 4, 8)  # a JPEG is fast to decode at 1/denominator of its size

# About damage that can be decoded all the same; any other damage raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would apply first and could not be configured
# Converting an image takes several copies of it in memory: two large ones at once may run out of it.
LARGE_PIXELS = 4_000_000
_large_image_lock = threading.Lock()


@dataclass(frozen=True)
class ImageSpec:
    """Target format of every image: a square of `image_size` pixels with 1 (grey) or 3 channels (RGB).

    background: red, green, blue in 0..255, shown through transparent pixels. crop_fraction: in (0, 1], side of the
    central crop as a fraction of the short side.
    """

    image_size: int
    channels: int
    background: tuple[int, int, int]
    crop_fraction: float

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
    """An image's metadata, read without decoding pixels; width and height in pixels as stored, before EXIF rotation.

    Orientation is missing: some formats store it after the pixels.
    """

    format: str
    width: int
    height: int
    mode: str


def read_header(data: bytes, max_pixels: int) -> Header:
    """Reads the header of an image. Raises: ValueError with a one-line reason, also for more than `max_pixels`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return _make_header(image, max_pixels)
    except Exception as error:
        raise ValueError(_reason(error)) from error


def decode(data: bytes, channels: int, background: tuple[int, int, int], max_pixels: int | None) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or GIF (first frame); the content determines the format.

    EXIF orientation is applied; transparency is composed onto the background; 16-bit samples keep their high byte;
    colour becomes grey by ITU-R 601-2 luma, grey becomes colour by repetition. No resizing. max_pixels: None for
    images that have been validated.

    Returns: uint8 [H, W, channels] in 0..255.
    Raises: ValueError with a one-line reason, without the file's name (which the caller knows).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        header = _make_header(image, max_pixels)
        with _limit_memory(header.width * header.height):
            image.load()
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            return _to_array(_to_opaque(image, background), channels)
    except Exception as error:  # Pillow raises many types on malformed bytes; each of them means "cannot be read"
        raise ValueError(_reason(error)) from error


def decode_jpeg(data: bytes, scale_denom: int = 1) -> np.ndarray:
    """Decodes a JPEG at 1/scale_denom of its size, rounded up, without EXIF rotation: uint8 [H, W, 3] in 0..255.

    scale_denom: one of JPEG_SCALE_DENOMS. Raises: ValueError, also for damage that Pillow tolerates.
    """
    if scale_denom == 1:
        return simplejpeg.decode_jpeg(data, "RGB")
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // scale_denom), min_width=-(-width // scale_denom))


def decode_and_resize(data: bytes, spec: ImageSpec) -> np.ndarray:
    """Decodes, then resizes: uint8 [image_size, image_size, channels] in 0..255."""
    return resize(decode(data, spec.channels, spec.background, max_pixels=None), spec.image_size, spec.crop_fraction)


def resize(pixels: np.ndarray, image_size: int, crop_fraction: float) -> np.ndarray:
    """Resizes the central square of uint8 [H, W, C] whose side is `crop_fraction` of the short side to `image_size`.

    Bilinear, antialiased when shrinking, computed in floating point and rounded once.

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
    # Mode "F", because Pillow's 8-bit path rounds twice, once per direction.
    image = Image.fromarray(np.ascontiguousarray(plane)).convert("F")
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))


def _limit_memory(num_pixels: int) -> contextlib.AbstractContextManager[object]:
    return _large_image_lock if num_pixels > LARGE_PIXELS else contextlib.nullcontext()


def _make_header(image: Image.Image, max_pixels: int | None) -> Header:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels:,}")
    return Header(str(image.format), image.width, image.height, image.mode)


def is_upright(jpeg: bytes) -> bool:
    """Whether a JPEG needs no rotation according to its EXIF block."""
    return _orientation(Image.open(io.BytesIO(jpeg), formats=("JPEG",))) == 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 for upright. Expects a loaded image: searching for the block may load it, which can fail."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the pixels can be fine where the EXIF block is not: the image counts as upright
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Converts any mode to `L` or `RGB`."""
    if image.mode.startswith("I"):
        image = _to_eight_bit(image)
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, background)
        image.alpha_composite(foreground)
    return _convert_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    transparent_value = image.info.get("transparency")
    if transparent_value is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(samples == transparent_value, 0, 255).astype(np.uint8)))
    return grey


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(_convert_mode(image, "L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert copies even if the mode stays the same


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image in a supported format ({', '.join(FORMATS)})"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return " ".join(str(error).split()) or type(error).__name__
