"""Input pipeline: streams of batches. Every example is a function of (seed, epoch, index), without any shared state.

The cache mode of a split changes no bit: pixels are gathered from memory, read from disk or decoded every time. A
random resized crop is decoded from the encoded image every time, so nothing can be cached for it.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from train.data import sampling
from train.data.augmentation import random_resized_crop
from train.data.augmentation.mixup_cutmix import MixupCutmix
from train.data.augmentation.policy import Augmentation
from train.data.augmentation.randaugment import RandAugment
from train.data.augmentation.random_resized_crop import RandomResizedCrop
from train.data.batches import PREFETCH, Batch, Batches, ExampleErrors
from train.data.dataset import Split
from train.data.pixel_cache import empty_aligned, make_reader
from train.runtime.setup import cores

Shard = tuple[int, int]  # (index, count): part `index` of every batch, cut into `count` equal parts
SINGLE_SHARD: Shard = (0, 1)  # whole batches
ReadImages = Callable[[np.ndarray], np.ndarray]  # index pairs int64 [B, 2] -> uint8 [B, S, S, C]
LoadImages = Callable[[tf.Tensor], tf.Tensor]  # the same, of tensors
MakeBatch = Callable[[tf.Tensor], Batch]  # index pairs int64 [B, 2] -> a batch
FinishBatch = Callable[[tf.Tensor, tf.Tensor], Batch]  # index pairs int64 [B, 2], images uint8 [B, S, S, C] -> a batch


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Number of full batches in a split. Raises: ValueError if there is none."""
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
    first_batch: int,
    num_classes: int,
    balanced: bool,
    class_weights: bool,
    shard: Shard,
    threads: int | None = None,
) -> Batches:
    """Returns one epoch in the order of (seed, epoch), from batch `first_batch` on, without a last incomplete batch.

    balanced: draws every class equally often instead of every example once. class_weights: adds a third element,
    float32 [B], N / (classes x examples of the label's class). shard: the part of every batch to return. threads: for
    loading (default: all cores); they change no bit.

    Returns: Batches of (images uint8 [B, H, W, C] in 0..255, labels float32 [B, num_classes], one-hot); with mixup or
    CutMix, labels are dense and images float32.
    Batches before `first_batch` are neither read nor decoded, and only the shard of the others is, except with mixup
    or CutMix, which need the whole batch.
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
    # With balanced sampling, draws belong to the position, so that repeats of an example are augmented differently.
    index_pairs = np.stack([indices, np.arange(len(indices)) if balanced else indices], axis=1)
    index_pairs = index_pairs[first_batch * batch_size : steps * batch_size].reshape(-1, batch_size, 2)
    randomness = EpochRandomness(seed, epoch, len(split))
    crop = augmentation.random_resized_crop
    errors = ExampleErrors()
    load_images = _image_loader(split, errors, _make_cropper(split, crop, randomness) if crop else None)
    if augmentation.randaugment:
        load_images = _with_randaugment(load_images, augmentation.randaugment, randomness, split.image_spec.shape)
    finish = _make_finish(split, augmentation, randomness, num_classes, class_weights)
    rows = _shard_slice(shard, batch_size)
    if augmentation.mixup_cutmix:
        make_batch = _make_batch_function(load_images, finish, rows)
        return _make_stream(index_pairs.reshape(-1, 2), batch_size, make_batch, errors, threads)
    make_batch = _make_batch_function(load_images, finish)
    return _make_stream(index_pairs[:, rows].reshape(-1, 2), rows.stop - rows.start, make_batch, errors, threads)


def eval_batches(
    split: Split, *, batch_size: int, num_classes: int, shard: Shard, threads: int | None = None
) -> Batches:
    """Returns the whole split in order, every example once; elements as in training, the last batch may be smaller.

    shard: the part of every batch's images to return, which may be empty for the last batch; labels are always those
    of the whole batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use batch_size=32")
    threads = threads or cores()
    finish = _make_finish(split, Augmentation(), None, num_classes, class_weights=False)
    errors = ExampleErrors()
    load_images = _image_loader(split, errors)
    rows = _shard_slice(shard, batch_size)
    indices = np.arange(len(split))
    index_pairs = np.stack([indices, indices], axis=1)
    return _make_stream(index_pairs, batch_size, lambda pairs: finish(pairs, load_images(pairs[rows])), errors, threads)


def _shard_slice(shard: Shard, batch_size: int) -> slice:
    """Returns the rows of a batch that belong to the shard. Raises: ValueError if the batch can't be divided."""
    index, count = shard
    if batch_size % count or not 0 <= index < count:
        raise ValueError(
            f"batch_size must be a multiple of the number of shards, got {batch_size} for shard {index} of {count}; "
            "use another batch_size, or another number of processes"
        )
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _make_batch_function(load_images: LoadImages, finish: FinishBatch, rows: slice = slice(None)) -> MakeBatch:
    """Returns a function from a batch's index pairs to `rows` of its elements."""
    return lambda pairs: tuple(element[rows] for element in finish(pairs, load_images(pairs)))


def _make_stream(
    index_pairs: np.ndarray, batch_size: int, make_batch: MakeBatch, errors: ExampleErrors, threads: int
) -> Batches:
    """Makes batches in parallel, one per thread: collecting a batch's examples from several threads would copy them."""
    index_batches = tf.data.Dataset.from_tensor_slices(_cpu_constant(index_pairs)).batch(batch_size)
    stream = index_batches.map(make_batch, threads, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return Batches(stream.with_options(options).prefetch(PREFETCH), index_batches, errors)


class EpochRandomness:
    """Lazily generated draws of one epoch, one row per example."""

    def __init__(self, seed: int, epoch: int, num_examples: int):
        self._seed = seed
        self._epoch = epoch
        self._num_examples = num_examples

    def uniform_array(self, purpose: str, columns: int) -> np.ndarray:
        return sampling.uniform_rows(self._seed, purpose, self._epoch, self._num_examples, columns)

    def uniform_tensor(self, purpose: str, columns: int) -> tf.Tensor:
        return _cpu_constant(self.uniform_array(purpose, columns))

    def mixup_cutmix_tensor(self, mix: MixupCutmix) -> tf.Tensor:
        return _cpu_constant(mix.draw(self._seed, self._epoch, self._num_examples))


# ------------------------------------------------------------------------------------------------- images of a split
# An index pair is int64 [2]: the index of an example, and the row of its draws.


def _image_loader(split: Split, errors: ExampleErrors, cropper: ReadImages | None = None) -> LoadImages:
    """Returns a loader of the cropper's images, or of whole images according to the split's image spec."""
    make_images = errors.recorded(cropper or _whole_image_reader(split))
    return lambda pairs: _numpy_function(make_images, pairs, shape=split.image_spec.shape)


def _whole_image_reader(split: Split) -> ReadImages:
    read = make_reader(split)
    return lambda pairs: read(pairs[:, 0])


def _make_cropper(split: Split, random_crop: RandomResizedCrop, randomness: EpochRandomness) -> ReadImages:
    """Returns a function from index pairs int64 [N, 2] to crops of the encoded images, uint8 [N, S, S, C]."""
    spec = split.image_spec
    epoch_draws = randomness.uniform_array(random_resized_crop.PURPOSE, random_resized_crop.DRAWS)

    def crop_images(index_pairs: np.ndarray) -> np.ndarray:
        indices = index_pairs[:, 0]
        draws = epoch_draws[index_pairs[:, 1]]
        images = empty_aligned((len(index_pairs), *spec.shape))
        encoded = split.read(indices)
        decoded: list[np.ndarray | None] = []  # None for a fast JPEG: it is decoded below, at the scale of its crop
        sizes: list[tuple[int, int]] = []
        for index, data in zip(indices, encoded, strict=True):
            full = None if split.is_fast_jpeg(index) else split.decode_full(index, data)
            decoded.append(full)
            sizes.append(split.stored_size(index) if full is None else (full.shape[0], full.shape[1]))
        boxes = random_crop.sample_boxes(np.array(sizes), draws)
        mirrored = random_crop.mirror_mask(draws)
        colors = random_crop.color_matrices(draws, spec.channels)
        for row, (index, data, full) in enumerate(zip(indices, encoded, decoded, strict=True)):
            scale_denom = random_resized_crop.jpeg_scale(boxes[row], spec.image_size)
            if full is None:
                pixels = split.decode_jpeg_scaled(index, data, scale_denom)
            else:
                pixels = random_resized_crop.downscale(full, scale_denom)
            crop = random_resized_crop.crop_box(pixels, boxes[row], scale_denom)
            random_crop.render_into(crop, mirrored[row], colors[row], images[row])
        return images

    return crop_images


def _with_randaugment(
    load_images: LoadImages, randaugment: RandAugment, randomness: EpochRandomness, shape: tuple[int, ...]
) -> LoadImages:
    draws = randomness.uniform_tensor("paint", randaugment.num_draws)

    def apply(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.stack([randaugment.apply(pixels, row) for pixels, row in zip(images, draws, strict=True)])

    return lambda pairs: _numpy_function(apply, load_images(pairs), tf.gather(draws, pairs[:, 1]), shape=shape)


def _numpy_function(function: Callable[..., np.ndarray], *inputs: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
    # stateful=False: otherwise op determinism would serialise the calls.
    return tf.ensure_shape(tf.numpy_function(function, inputs, tf.uint8, stateful=False), (None, *shape))


# ------------------------------------------------------------------------------------- elements of the finished batch


def _make_finish(
    split: Split, augmentation: Augmentation, randomness: EpochRandomness | None, num_classes: int, class_weights: bool
) -> FinishBatch:
    """Returns a function from (index pairs, images) to a finished batch. randomness: None for evaluation."""
    labels = _cpu_constant(split.labels)
    weights = _cpu_constant(example_weights(split.labels)) if class_weights else None
    batch_ops = []
    mix = mix_draws = None
    if randomness:
        batch_ops = [(op.apply, randomness.uniform_tensor(op.purpose, op.num_draws)) for op in augmentation.batch_ops]
        mix = augmentation.mixup_cutmix
        mix_draws = randomness.mixup_cutmix_tensor(mix) if mix else None

    def finish(index_pairs: tf.Tensor, images: tf.Tensor) -> Batch:
        index = index_pairs[:, 0]
        draws_row = index_pairs[:, 1]
        for apply, draws in batch_ops:
            images = apply(images, tf.gather(draws, draws_row))
        targets = tf.one_hot(tf.gather(labels, index), num_classes)
        if weights is not None:  # as one more column, because the weights are mixed like the labels
            targets = tf.concat([targets, tf.gather(weights, index)[:, None]], 1)
        if mix:
            images, targets = mix.apply(images, targets, tf.gather(mix_draws, draws_row))
        return (images, targets) if weights is None else (images, targets[:, :-1], targets[:, -1])

    return finish


def example_weights(labels: np.ndarray) -> np.ndarray:
    """Weights that give all classes the same total and have mean 1: float32 [N]."""
    counts = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)


def _cpu_constant(values: np.ndarray) -> tf.Tensor:
    with tf.device("CPU:0"):
        return tf.constant(values)
