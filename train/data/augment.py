"""Augmentations of whole batches: plain functions (images, draws, options) -> images.

images: uint8 [B, H, W, C] in 0..255, H and W static. draws: float32 [B, DRAWS] in [0, 1), one row per example, made
outside; so the result is a function of its arguments, the same eagerly and inside Dataset.map.
Pixels are only moved, never mixed: no rounding.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

DRAWS = 3  # columns of `draws`: vertical shift, horizontal shift, mirror


def none(images: Any, draws: Any) -> Any:
    """The images as they are."""
    del draws
    return images


def crop(images: Any, draws: Any, *, pad: float = 1 / 8) -> Any:
    """Shifts every image by up to `pad` of its side in each direction; what comes in at an edge is its reflection.

    Source: padded crop of He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2, which pads 4
    pixels at 32. Reflected instead of filled, so that no data set gets edges that it does not have.
    pad: in [0, 0.5].
    """
    return _move(images, _shift(images.shape[1], draws[:, 0], pad), _shift(images.shape[2], draws[:, 1], pad))


def flip_crop(images: Any, draws: Any, *, pad: float = 1 / 8) -> Any:
    """`crop`, and every second image mirrored left to right. For images whose mirror image is one of the same class."""
    columns = _shift(images.shape[2], draws[:, 1], pad)
    columns = tf.where(draws[:, 2:3] < 0.5, columns[:, ::-1], columns)
    return _move(images, _shift(images.shape[1], draws[:, 0], pad), columns)


AUGMENTS: dict[str, Callable[..., Any]] = {"none": none, "crop": crop, "flip_crop": flip_crop}


def _shift(side: int, draws: Any, pad: float) -> Any:
    """Source index of every output row: int32 [B, side], shifted by -border..border, reflected at the edges."""
    if not 0 <= pad <= 0.5:
        raise ValueError(f"pad must be a fraction of the side in 0..0.5, got {pad}; use augment.pad=0.125")
    border = min(round(pad * side), side - 1)
    choices = 2 * border + 1
    offset = tf.minimum(tf.cast(draws * choices, tf.int32), choices - 1) - border
    index = tf.abs(tf.range(side)[None, :] + offset[:, None])
    return (side - 1) - tf.abs((side - 1) - index)


def _move(images: Any, rows: Any, columns: Any) -> Any:
    return tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
