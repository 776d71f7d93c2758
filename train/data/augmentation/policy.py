"""Augmentation policies by name. Every operation is a function of an example's pixels and of its own draws.

Draws belong to (seed, purpose, epoch, index): an example is augmented in the same way at any position in a batch, and
after a resume. There are four stages, in this order:

    random_resized_crop  encoded image -> uint8 [S, S, C]          fused with decoding (random_resized_crop.py)
    randaugment          uint8 [S, S, C] -> uint8 [S, S, C]        one image at a time, by Pillow (randaugment.py)
    batch_ops            uint8 [B, S, S, C] -> uint8 [B, S, S, C]  whole batches (this file)
    mixup_cutmix         images and labels of a batch -> float32   pairs of examples, after all rounding
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tensorflow as tf

from train.data.augmentation.mixup_cutmix import MixupCutmix
from train.data.augmentation.randaugment import RandAugment
from train.data.augmentation.random_resized_crop import RandomResizedCrop


@dataclass(frozen=True)
class BatchOp:
    """An operation on batches: apply(images uint8 [B, S, S, C], draws float32 [B, num_draws] in [0, 1)) -> images."""

    purpose: str
    num_draws: int
    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Augmentation:
    """The operations applied to the examples of the training split."""

    random_resized_crop: RandomResizedCrop | None = None
    randaugment: RandAugment | None = None
    batch_ops: tuple[BatchOp, ...] = ()
    mixup_cutmix: MixupCutmix | None = None


def build(name: str, *, erase: float, mixup: float, cutmix: float, **options: object) -> Augmentation:
    """Builds the augmentation with this name.

    erase: in [0, 1], probability of erasing a rectangle. mixup, cutmix: alpha of their Beta distributions; 0 disables.
    options: arguments of the function registered under the name.

    Raises: ValueError for an unknown name.
    """
    if name not in AUGMENTS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, got {name}; use augment=crop")
    policy = AUGMENTS[name](**options)
    erasing = (BatchOp("erase", ERASE_DRAWS, partial(random_erasing, probability=erase)),) if erase else ()
    mixing = MixupCutmix(mixup, cutmix) if mixup or cutmix else None
    return Augmentation(policy.random_resized_crop, policy.randaugment, (*policy.batch_ops, *erasing), mixing)


def none() -> Augmentation:
    """No augmentation."""
    return Augmentation()


def crop(*, pad: float) -> Augmentation:
    """Padded crop."""
    return Augmentation(batch_ops=(BatchOp("augment", SHIFT_DRAWS, partial(random_shift, pad=pad, mirror=False)),))


def flip_crop(*, pad: float) -> Augmentation:
    """Padded crop, and horizontal flip of every second image."""
    return Augmentation(batch_ops=(BatchOp("augment", SHIFT_DRAWS, partial(random_shift, pad=pad, mirror=True)),))


def inception(*, least_area: float, most_stretch: float, color: float, mirror: bool) -> Augmentation:
    """Random resized crop with colour distortion and horizontal flip: see random_resized_crop.py."""
    return Augmentation(random_resized_crop=RandomResizedCrop(least_area, most_stretch, color, mirror))


def randaugment(*, ops: int, magnitude: float, pad: float, mirror: bool) -> Augmentation:
    """RandAugment (see randaugment.py), then a padded crop; in this order, so that the crop hides no translation."""
    return Augmentation(
        randaugment=RandAugment(ops, magnitude),
        batch_ops=(BatchOp("augment", SHIFT_DRAWS, partial(random_shift, pad=pad, mirror=mirror)),),
    )


AUGMENTS: dict[str, Callable[..., Augmentation]] = {
    "none": none,
    "crop": crop,
    "flip_crop": flip_crop,
    "inception": inception,
    "randaugment": randaugment,
}

# -------------------------------------------------------------------------------------------------- batch operations

SHIFT_DRAWS = 3  # vertical, horizontal, mirror


def random_shift(images: tf.Tensor, draws: tf.Tensor, *, pad: float, mirror: bool) -> tf.Tensor:
    """Shifts every image by up to `pad` of its side in each direction; the edges are filled by reflection.

    Source: padded crop of He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2, which pads 4
    pixels at 32. Reflected instead of zero-padded, so that no artificial edges appear. Pixels are moved, not
    interpolated: no rounding.
    images: uint8 [B, S, S, C]. draws: float32 [B, SHIFT_DRAWS] in [0, 1). pad: in [0, 0.5]. mirror: flips every second
    image horizontally; for data whose mirror images belong to the same class.
    """
    rows = _shifted_indices(images.shape[1], draws[:, 0], pad)
    columns = _shifted_indices(images.shape[2], draws[:, 1], pad)
    if mirror:
        columns = tf.where(draws[:, 2:3] < 0.5, columns[:, ::-1], columns)
    return tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def _shifted_indices(side: int, draws: tf.Tensor, pad: float) -> tf.Tensor:
    """Source index of each output row, shifted by -border..border and reflected at the edges: int32 [B, side]."""
    if not 0 <= pad <= 0.5:
        raise ValueError(f"augment.pad must be in 0..0.5 (fraction of the side), got {pad}; use augment.pad=0.125")
    border = min(round(pad * side), side - 1)
    choices = 2 * border + 1
    offset = tf.minimum(tf.cast(draws * choices, tf.int32), choices - 1) - border
    index = tf.abs(tf.range(side)[None, :] + offset[:, None])
    return (side - 1) - tf.abs((side - 1) - index)


ERASE_DRAWS = 8  # decision, area, aspect ratio, position (2), colour (3)
ERASED_AREA = (0.02, 0.4)
ERASED_ASPECT_RATIO = (0.3, 1 / 0.3)


def random_erasing(images: tf.Tensor, draws: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Covers a rectangle of each image with a random colour, with the given probability.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2017), section 3.2, with its areas and aspect ratios; one
    random colour per rectangle instead of one per pixel.
    images: uint8 [B, S, S, C]. draws: float32 [B, ERASE_DRAWS] in [0, 1).
    """
    side, channels = images.shape[1], images.shape[3]
    area = ERASED_AREA[0] + draws[:, 1] * (ERASED_AREA[1] - ERASED_AREA[0])
    aspect_ratio = ERASED_ASPECT_RATIO[0] * (ERASED_ASPECT_RATIO[1] / ERASED_ASPECT_RATIO[0]) ** draws[:, 2]
    height = tf.minimum(tf.sqrt(area * aspect_ratio), 1.0) * side
    width = tf.minimum(tf.sqrt(area / aspect_ratio), 1.0) * side
    inside = tf.logical_and(
        _interval_mask(side, draws[:, 3] * (side - height), height)[:, :, None],
        _interval_mask(side, draws[:, 4] * (side - width), width)[:, None, :],
    )
    inside = tf.logical_and(inside, (draws[:, 0] < probability)[:, None, None])[..., None]
    color = tf.cast(draws[:, 5 : 5 + channels] * 256, tf.uint8)[:, None, None, :]
    return tf.where(inside, color, images)


def _interval_mask(side: int, start: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Mask of the pixels whose centre is in start..start+length: bool [B, side]."""
    center = tf.range(side, dtype=tf.float32)[None, :] + 0.5
    return tf.logical_and(center >= start[:, None], center < (start + length)[:, None])
