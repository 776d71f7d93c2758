"""Images for tests of augmentations."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image


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
