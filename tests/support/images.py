"""Images for tests of augmentations."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image

from train.data.decode import ImageSpec, decode
from train.data.ingestion.validation import Limits

WHITE = (255, 255, 255)
MAX_PIXELS = 50_000_000


def decode_image(data, channels, background=WHITE, max_pixels=MAX_PIXELS):
    return decode(data, channels, background, max_pixels)


def image_spec(image_size, channels, background=WHITE, crop_fraction=1.0):
    return ImageSpec(image_size, channels, background, crop_fraction)


def make_limits(**options):
    return Limits(**({"max_bytes": 2**26, "max_pixels": MAX_PIXELS, "on_error": "raise", "max_skipped": 100} | options))


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
