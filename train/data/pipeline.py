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
from train.data.augmentation.mixup_cutmix import MixupCutmix
from train.data.augmentation.policy import Augmentation
from train.data.augmentation.randaugment import RandAugment
from train.data.augmentation.random_resized_crop import RandomResizedCrop
from train.data.dataset import Split
from train.data.pixel_cache import empty_aligned, make_reader
from train.runtime.setup import cores

PREFETCH = 2  # batches; fixed, because an automatic depth takes memory as it likes

Shard = tuple[int, int]  # number of a part of every batch, and of how many
SINGLE_SHARD: Shard = (0, 1)
FinishBatch = Callable[[Any, Any], tuple]
LoadImages = Callable[[Any], Any]  # places int64 [B, 2] -> uint8 [B, S, S, C], of tensors


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
    shard: Shard = SINGLE_SHARD,
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
        sampling.balanced_order(seed, epoch, split.labels)
        if balanced
        else sampling.permutation(seed, epoch, len(split))
    )
    # An example that comes more than once is changed in another way each time: its draws are those of its place.
    places = np.stack([indices, np.arange(len(indices)) if balanced else indices], axis=1)
    places = places[first_batch * batch_size : steps * batch_size].reshape(-1, batch_size, 2)
    draw = EpochRandomness(seed, epoch, len(split))
    cropper = _make_cropper(split, augmentation.random_resized_crop, draw) if augmentation.random_resized_crop else None
    images = _image_loader(split, cropper)
    if augmentation.randaugment:
        images = _with_randaugment(images, augmentation.randaugment, draw, split.image_spec.shape)
    finish, own = _make_finish(split, augmentation, draw, num_classes, class_weights), _shard_slice(shard, batch_size)
    if augmentation.mixup_cutmix:
        return _make_stream(places.reshape(-1, 2), batch_size, _make_batch_function(images, finish, own), threads)
    return _make_stream(
        places[:, own].reshape(-1, 2), own.stop - own.start, _make_batch_function(images, finish), threads
    )


def eval_batches(
    split: Split, *, batch_size: int, num_classes: int, shard: Shard = SINGLE_SHARD, threads: int | None = None
) -> Any:
    """The whole split in order, every example exactly once; the last batch may be smaller. Elements as in training.

    share: which part of every batch's images is wanted, of the last perhaps none; the labels are those of all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use batch_size=32")
    threads = threads or cores()
    finish, own = (
        _make_finish(split, Augmentation(), None, num_classes, class_weights=False),
        _shard_slice(shard, batch_size),
    )
    everything, images = np.arange(len(split)), _image_loader(split)
    return _make_stream(
        np.stack([everything, everything], axis=1), batch_size, lambda place: finish(place, images(place[own])), threads
    )


def _shard_slice(shard: Shard, batch_size: int) -> slice:
    """The rows of a batch. Raises: ValueError where the batch can't be cut so."""
    index, parts = shard
    if batch_size % parts or not 0 <= index < parts:
        raise ValueError(f"share must be a part of a batch of {batch_size}, got {index} of {parts}")
    size = batch_size // parts
    return slice(index * size, (index + 1) * size)


def _make_batch_function(
    load_images: LoadImages, finish: FinishBatch, rows: slice = slice(None)
) -> Callable[[Any], tuple]:
    """From the places of a batch to its rows."""
    return lambda places: tuple(part[rows] for part in finish(places, load_images(places)))


def prefetch_to_device(stream: Any, device: str) -> Any:
    """The same batches, already in the memory of `device` (as TensorFlow names it) while the one before is used.

    To be the last that is done to a stream.
    """
    return stream.apply(tf.data.experimental.prefetch_to_device(device, PREFETCH))


def _make_stream(index_pairs: np.ndarray, batch_size: int, make_batch: Callable[[Any], tuple], threads: int) -> Any:
    """Every thread makes a batch of its own: examples that are gathered from several are copied, and wait."""
    stream = tf.data.Dataset.from_tensor_slices(_cpu_constant(index_pairs)).batch(batch_size)
    stream = stream.map(make_batch, threads, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return stream.with_options(options).prefetch(PREFETCH)


class EpochRandomness:
    """All draws of one epoch, a row for each example, made when a stage asks for them."""

    def __init__(self, seed: int, epoch: int, num_examples: int):
        self._seed, self._epoch, self._num_examples = seed, epoch, num_examples

    def uniform_array(self, purpose: str, columns: int) -> np.ndarray:
        return sampling.uniform_rows(self._seed, purpose, self._epoch, self._num_examples, columns)

    def uniform_tensor(self, purpose: str, columns: int) -> Any:
        return _cpu_constant(self.uniform_array(purpose, columns))

    def mixup_cutmix_tensor(self, mix: MixupCutmix) -> Any:
        return _cpu_constant(mix.draw(self._seed, self._epoch, self._num_examples))


# ------------------------------------------------------------------------------------------------- images of a split
# A place is int64 [2]: the index of an example, and the row of its draws.


def _image_loader(split: Split, cropper: Callable[[np.ndarray], np.ndarray] | None = None) -> LoadImages:
    """Images cut out by the cropper, or as the split's view wants them."""
    make = cropper or _whole_image_reader(split)
    return lambda places: _numpy_function(make, places, shape=split.image_spec.shape)


def _whole_image_reader(split: Split) -> Callable[[np.ndarray], np.ndarray]:
    read = make_reader(split)
    return lambda places: read(places[:, 0])


def _make_cropper(
    split: Split, random_crop: RandomResizedCrop, randomness: EpochRandomness
) -> Callable[[np.ndarray], np.ndarray]:
    """places int64 [N, 2] -> crops of the encoded images, uint8 [N, S, S, C]."""
    view, draws = split.image_spec, randomness.uniform_array(random_resized_crop.PURPOSE, random_resized_crop.DRAWS)

    def crops(places: np.ndarray) -> np.ndarray:
        indices, own = places[:, 0], draws[places[:, 1]]
        images, pixels, sizes = empty_aligned((len(places), *view.shape)), [], []
        encoded = split.read(indices)
        for index, data in zip(indices, encoded, strict=True):  # what is no plain JPEG is decoded at once
            pixels.append(None if split.is_fast_jpeg(index) else split.decode_full(index, data))
            sizes.append(split.stored_size(index) if pixels[-1] is None else pixels[-1].shape[:2])
        boxes, mirrored = random_crop.sample_boxes(np.array(sizes), own), random_crop.mirror_mask(own)
        colors = random_crop.color_matrices(own, view.channels)
        for number, (index, data, whole) in enumerate(zip(indices, encoded, pixels, strict=True)):
            part = random_resized_crop.jpeg_scale(boxes[number], view.image_size)
            small = (
                split.decode_jpeg_scaled(index, data, part)
                if whole is None
                else random_resized_crop.downscale(whole, part)
            )
            random_crop.render_into(
                random_resized_crop.crop_box(small, boxes[number], part),
                mirrored[number],
                colors[number],
                images[number],
            )
        return images

    return crops


def _with_randaugment(
    load_images: LoadImages, randaugment: RandAugment, randomness: EpochRandomness, shape: tuple[int, ...]
) -> LoadImages:
    draws = randomness.uniform_tensor("paint", randaugment.num_draws)

    def apply(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.stack([randaugment.apply(*pair) for pair in zip(images, draws, strict=True)])

    return lambda places: _numpy_function(apply, load_images(places), tf.gather(draws, places[:, 1]), shape=shape)


def _numpy_function(function: Callable[..., np.ndarray], *inputs: Any, shape: tuple[int, ...]) -> Any:
    # stateful=False: op determinism would otherwise run the calls one after the other.
    return tf.ensure_shape(tf.numpy_function(function, inputs, tf.uint8, stateful=False), (None, *shape))


# --------------------------------------------------------------------------------------------------- what comes of it


def _make_finish(
    split: Split, augmentation: Augmentation, randomness: EpochRandomness | None, num_classes: int, class_weights: bool
) -> FinishBatch:
    """(place, images) -> what the step is called with."""
    labels = _cpu_constant(split.labels)
    moves = (
        [(move.apply, randomness.uniform_tensor(move.purpose, move.num_draws)) for move in augmentation.batch_ops]
        if randomness
        else []
    )
    mix, shares = (
        augmentation.mixup_cutmix,
        randomness.mixup_cutmix_tensor(augmentation.mixup_cutmix) if randomness and augmentation.mixup_cutmix else None,
    )
    weights = _cpu_constant(example_weights(split.labels)) if class_weights else None

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


def example_weights(labels: np.ndarray) -> np.ndarray:
    """float32 [N]: an example's weight, so that every class weighs the same and all weights are 1 in the mean."""
    counts = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)


def _cpu_constant(values: np.ndarray) -> Any:
    with tf.device("CPU:0"):
        return tf.constant(values)


def extract_example_error(error: Exception) -> str | None:
    """The line that names an unreadable example, out of what TensorFlow raised while iterating; None for other errors.

    TensorFlow wraps what a function of the stream raises into an error of its own, of many lines.
    """
    found = re.search(r"every example must be readable, got .*", str(error))
    return found.group() if found else None
