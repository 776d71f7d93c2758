"""Streams of batches. Every batch is a function of (seed, epoch, index): no state, no timing, no shared generator.

A split whose pixels fit into `RAM_LIMIT` is decoded once and gathered from memory; a larger one is read and decoded
example by example, in parallel and in order. Both give the same bits.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from train.data.augment import DRAWS, none
from train.data.dataset import Split
from train.data.order import permutation, uniform_rows
from train.runtime import cores

RAM_LIMIT = 2**30  # bytes of decoded pixels per split
PREFETCH = 2  # batches; fixed, because an automatic depth takes memory as it likes


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
    augment: Callable[[Any, Any], Any] = none,
    first_batch: int = 0,
    num_classes: int,
    threads: int | None = None,
    ram_limit: int = RAM_LIMIT,
) -> Any:
    """One epoch in the order of (seed, epoch), from batch `first_batch` on; the last incomplete batch is dropped.

    augment: one of `augment.AUGMENTS`, its options bound. threads: of loading (default: all cores); they change no bit.

    Returns: tf.data.Dataset of (images uint8 [B, H, W, C] in 0..255, labels float32 one-hot [B, num_classes]).
    Nothing of the batches before `first_batch` is read or decoded.
    """
    steps = steps_per_epoch(split, batch_size)
    if not 0 <= first_batch <= steps:
        raise ValueError(f"first_batch must be in 0..{steps}, got {first_batch}; use the next batch of the epoch")
    order = permutation(seed, epoch, len(split))[first_batch * batch_size : steps * batch_size]
    draws = _constant(uniform_rows(seed, "augment", epoch, len(split), DRAWS))

    def finish(index: Any, images: Any) -> tuple[Any, Any]:
        return augment(images, tf.gather(draws, index)), _one_hot(split, index, num_classes)

    return _batches(split, order, batch_size, finish, threads, ram_limit)


def eval_batches(
    split: Split, *, batch_size: int, num_classes: int, threads: int | None = None, ram_limit: int = RAM_LIMIT
) -> Any:
    """The whole split in order, every example exactly once; the last batch may be smaller. Elements as in training."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use batch_size=32")

    def finish(index: Any, images: Any) -> tuple[Any, Any]:
        return images, _one_hot(split, index, num_classes)

    return _batches(split, np.arange(len(split)), batch_size, finish, threads, ram_limit)


def _batches(
    split: Split,
    order: np.ndarray,
    batch_size: int,
    finish: Callable[[Any, Any], tuple[Any, Any]],
    threads: int | None,
    ram_limit: int,
) -> Any:
    threads = threads or cores()
    read = _from_memory if split.decoded_bytes <= ram_limit else _from_store
    stream = read(split, _constant(order.astype(np.int64)), batch_size, finish, threads)
    return stream.with_options(_options(threads)).prefetch(PREFETCH)


def _from_memory(split: Split, order: Any, batch_size: int, finish: Any, threads: int) -> Any:
    pixels = split.images

    def batch(index: Any) -> Any:
        return finish(index, tf.gather(pixels, index))

    stream = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
    return stream.map(batch, num_parallel_calls=threads, deterministic=True)


def _from_store(split: Split, order: Any, batch_size: int, finish: Any, threads: int) -> Any:
    shape = (split.image_size, split.image_size, split.channels)

    def example(index: Any) -> tuple[Any, Any]:
        # stateful=False: op determinism would otherwise run the calls one after the other.
        pixels = tf.numpy_function(split.example, [index], tf.uint8, stateful=False)
        return index, tf.ensure_shape(pixels, shape)

    stream = tf.data.Dataset.from_tensor_slices(order)
    stream = stream.map(example, num_parallel_calls=threads, deterministic=True).batch(batch_size)
    return stream.map(finish, num_parallel_calls=threads, deterministic=True)


def _one_hot(split: Split, index: Any, num_classes: int) -> Any:
    return tf.one_hot(tf.gather(_constant(split.labels), index), num_classes)


def _constant(values: np.ndarray) -> Any:
    with tf.device("CPU:0"):
        return tf.constant(values)


def _options(threads: int) -> Any:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return options


def example_error(error: Exception) -> str | None:
    """The line that names an unreadable example, out of what TensorFlow raised while iterating; None for other errors.

    TensorFlow wraps what a function of the stream raises into an error of its own, of many lines.
    """
    found = re.search(r"every example must be readable, got .*", str(error))
    return found.group() if found else None
