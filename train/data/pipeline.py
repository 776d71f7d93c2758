"""Streams of batches. Every example is a function of (seed, epoch, index): no state, no timing, no shared generator.

Where the pixels of a split are kept changes no bit: gathered from memory, read from disk, or decoded each time. With a
crop out of the encoded image there is nothing to keep, and the crop is decoded each time.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from train.data import sampling
from train.data.augmentation import random_resized_crop
from train.data.augmentation.mixup_cutmix import Mix
from train.data.augmentation.policy import Augmentation
from train.data.augmentation.randaugment import Paint
from train.data.augmentation.random_resized_crop import Crop
from train.data.dataset import Split
from train.data.pixel_cache import aligned, reader
from train.runtime.setup import cores

PREFETCH = 2  # batches; fixed, because an automatic depth takes memory as it likes

Share = tuple[int, int]  # number of a part of every batch, and of how many
WHOLE: Share = (0, 1)
Finish = Callable[[Any, Any], tuple]
Images = Callable[[Any], Any]  # places int64 [B, 2] -> uint8 [B, S, S, C], of tensors


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in a split. Raises: ValueError when there is none."""
    if not 1 <= batch_size <= len(split):
        raise ValueError(
            f"batch_size must be in 1..{len(split)}, the size of the {split.name} split, got {batch_size}; "
            f"use batch_size={min(len(split), 32)}"
        )
    return len(split) // batch_size


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation,
    first_batch: int = 0,
    num_classes: int,
    balanced: bool = False,
    class_weights: bool = False,
    share: Share = WHOLE,
    threads: int | None = None,
) -> Any:
    """One epoch in the order of (seed, epoch), from batch `first_batch` on; the last incomplete batch is dropped.

    balanced: every class equally often, instead of every example once. class_weights: a third element, float32 [B],
    N / (classes x examples of the label's class). share: which part of every batch is wanted. threads: of loading
    (default: all cores); they change no bit.

    Returns: tf.data.Dataset of (images uint8 [B, H, W, C] in 0..255, labels float32 [B, num_classes]); labels are
    one-hot, and where examples are mixed they are not, and the images are float32.
    Nothing of the batches before `first_batch` is read or decoded, and of those behind it only the share, except where
    examples are mixed with others of their batch.
    """
    steps = steps_per_epoch(split, batch_size)
    if not 0 <= first_batch <= steps:
        raise ValueError(f"first_batch must be in 0..{steps}, got {first_batch}; use the next batch of the epoch")
    threads = threads or cores()
    indices = (
        sampling.balanced(seed, epoch, split.labels) if balanced else sampling.permutation(seed, epoch, len(split))
    )
    # An example that comes more than once is changed in another way each time: its draws are those of its place.
    places = np.stack([indices, np.arange(len(indices)) if balanced else indices], axis=1)
    places = places[first_batch * batch_size : steps * batch_size].reshape(-1, batch_size, 2)
    draw = _Draws(seed, epoch, len(split))
    cropper = _cropper(split, augmentation.crop, draw) if augmentation.crop else None
    images = _images(split, cropper)
    if augmentation.paint:
        images = _painted(images, augmentation.paint, draw, split.view.shape)
    finish, own = _finish(split, augmentation, draw, num_classes, class_weights), _rows(share, batch_size)
    if augmentation.mix:
        return _batches(places.reshape(-1, 2), batch_size, _then(images, finish, own), threads)
    return _batches(places[:, own].reshape(-1, 2), own.stop - own.start, _then(images, finish), threads)


def eval_batches(
    split: Split, *, batch_size: int, num_classes: int, share: Share = WHOLE, threads: int | None = None
) -> Any:
    """The whole split in order, every example exactly once; the last batch may be smaller. Elements as in training.

    share: which part of every batch's images is wanted, of the last perhaps none; the labels are those of all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use batch_size=32")
    threads = threads or cores()
    finish, own = _finish(split, Augmentation(), None, num_classes, class_weights=False), _rows(share, batch_size)
    everything, images = np.arange(len(split)), _images(split)
    return _batches(
        np.stack([everything, everything], axis=1), batch_size, lambda place: finish(place, images(place[own])), threads
    )


def _rows(share: Share, batch_size: int) -> slice:
    """The rows of a batch. Raises: ValueError where the batch can't be cut so."""
    index, parts = share
    if batch_size % parts or not 0 <= index < parts:
        raise ValueError(f"share must be a part of a batch of {batch_size}, got {index} of {parts}")
    size = batch_size // parts
    return slice(index * size, (index + 1) * size)


def _then(images: Images, finish: Finish, own: slice = slice(None)) -> Callable[[Any], tuple]:
    """From the places of a batch to its rows."""
    return lambda places: tuple(part[own] for part in finish(places, images(places)))


def on_device(stream: Any, device: str) -> Any:
    """The same batches, already in the memory of `device` (as TensorFlow names it) while the one before is used.

    To be the last that is done to a stream.
    """
    return stream.apply(tf.data.experimental.prefetch_to_device(device, PREFETCH))


def _batches(places: np.ndarray, batch_size: int, make: Callable[[Any], tuple], threads: int) -> Any:
    """Every thread makes a batch of its own: examples that are gathered from several are copied, and wait."""
    stream = tf.data.Dataset.from_tensor_slices(_constant(places)).batch(batch_size)
    stream = stream.map(make, threads, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return stream.with_options(options).prefetch(PREFETCH)


class _Draws:
    """All draws of one epoch, a row for each example, made when a stage asks for them."""

    def __init__(self, seed: int, epoch: int, examples: int):
        self._seed, self._epoch, self._examples = seed, epoch, examples

    def table(self, purpose: str, columns: int) -> np.ndarray:
        return sampling.uniform_rows(self._seed, purpose, self._epoch, self._examples, columns)

    def rows(self, purpose: str, columns: int) -> Any:
        return _constant(self.table(purpose, columns))

    def mixing(self, mix: Mix) -> Any:
        return _constant(mix.draws(self._seed, self._epoch, self._examples))


# ------------------------------------------------------------------------------------------------- images of a split
# A place is int64 [2]: the index of an example, and the row of its draws.


def _images(split: Split, cropper: Callable[[np.ndarray], np.ndarray] | None = None) -> Images:
    """Images cut out by the cropper, or as the split's view wants them."""
    make = cropper or _whole(split)
    return lambda places: _in_numpy(make, places, shape=split.view.shape)


def _whole(split: Split) -> Callable[[np.ndarray], np.ndarray]:
    read = reader(split)
    return lambda places: read(places[:, 0])


def _cropper(split: Split, crop_: Crop, draw: _Draws) -> Callable[[np.ndarray], np.ndarray]:
    """places int64 [N, 2] -> crops of the encoded images, uint8 [N, S, S, C]."""
    view, draws = split.view, draw.table(random_resized_crop.PURPOSE, random_resized_crop.DRAWS)

    def crops(places: np.ndarray) -> np.ndarray:
        indices, own = places[:, 0], draws[places[:, 1]]
        images, pixels, sizes = aligned((len(places), *view.shape)), [], []
        encoded = split.read(indices)
        for index, data in zip(indices, encoded, strict=True):  # what is no plain JPEG is decoded at once
            pixels.append(None if split.is_plain(index) else split.decode_whole(index, data))
            sizes.append(split.size_of(index) if pixels[-1] is None else pixels[-1].shape[:2])
        boxes, mirrored = crop_.boxes(np.array(sizes), own), crop_.mirrored(own)
        colors = crop_.color_maps(own, view.channels)
        for number, (index, data, whole) in enumerate(zip(indices, encoded, pixels, strict=True)):
            part = random_resized_crop.part_of(boxes[number], view.image_size)
            small = split.decode_plain(index, data, part) if whole is None else random_resized_crop.shrunk(whole, part)
            crop_.finish(
                random_resized_crop.cut(small, boxes[number], part), mirrored[number], colors[number], images[number]
            )
        return images

    return crops


def _painted(images: Images, paint: Paint, draw: _Draws, shape: tuple[int, ...]) -> Images:
    draws = draw.rows("paint", paint.columns)

    def apply(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.stack([paint.apply(*pair) for pair in zip(images, draws, strict=True)])

    return lambda places: _in_numpy(apply, images(places), tf.gather(draws, places[:, 1]), shape=shape)


def _in_numpy(make: Callable[..., np.ndarray], *given: Any, shape: tuple[int, ...]) -> Any:
    # stateful=False: op determinism would otherwise run the calls one after the other.
    return tf.ensure_shape(tf.numpy_function(make, given, tf.uint8, stateful=False), (None, *shape))


# --------------------------------------------------------------------------------------------------- what comes of it


def _finish(
    split: Split, augmentation: Augmentation, draw: _Draws | None, num_classes: int, class_weights: bool
) -> Finish:
    """(place, images) -> what the step is called with."""
    labels = _constant(split.labels)
    moves = [(move.apply, draw.rows(move.purpose, move.columns)) for move in augmentation.moves] if draw else []
    mix, shares = augmentation.mix, draw.mixing(augmentation.mix) if draw and augmentation.mix else None
    weights = _constant(weights_of(split.labels)) if class_weights else None

    def finish(place: Any, images: Any) -> tuple:
        index, row = place[:, 0], place[:, 1]
        for apply, draws in moves:
            images = apply(images, tf.gather(draws, row))
        found = tf.one_hot(tf.gather(labels, index), num_classes)
        if weights is not None:  # beside the labels, since it is mixed like them
            found = tf.concat([found, tf.gather(weights, index)[:, None]], 1)
        if mix:
            images, found = mix.apply(images, found, tf.gather(shares, row))
        return (images, found) if weights is None else (images, found[:, :-1], found[:, -1])

    return finish


def weights_of(labels: np.ndarray) -> np.ndarray:
    """float32 [N]: an example's weight, so that every class weighs the same and all weights are 1 in the mean."""
    counts = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)


def _constant(values: np.ndarray) -> Any:
    with tf.device("CPU:0"):
        return tf.constant(values)


def example_error(error: Exception) -> str | None:
    """The line that names an unreadable example, out of what TensorFlow raised while iterating; None for other errors.

    TensorFlow wraps what a function of the stream raises into an error of its own, of many lines.
    """
    found = re.search(r"every example must be readable, got .*", str(error))
    return found.group() if found else None
