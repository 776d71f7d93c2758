"""A stream of batches that raises the error of an unreadable example as the exception that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from train.data.example_error import ExampleError

PREFETCH = 2  # batches; fixed, because autotuning does not bound the memory

Batch = tuple[tf.Tensor, ...]


class ExampleErrors:
    """The ExampleErrors that the threads of one stream have raised.

    TensorFlow passes on an exception of a Python function as text. The exception itself is kept here, under the first
    index pair of the batch that failed, until the stream's consumer arrives at that batch.
    """

    def __init__(self) -> None:
        self._by_index_pair: dict[tuple[int, ...], ExampleError] = {}

    def clear(self) -> None:
        self._by_index_pair.clear()

    def recorded(self, load: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Returns `load`, a function of a batch's index pairs int64 [N, 2], whose ExampleErrors are kept."""

        def load_and_record(index_pairs: np.ndarray) -> np.ndarray:
            try:
                return load(index_pairs)
            except ExampleError as error:
                self._by_index_pair[tuple(index_pairs[0].tolist())] = error
                raise

        return load_and_record

    def of_batch(self, index_pairs: np.ndarray) -> ExampleError | None:
        """Returns the error of the batch with these index pairs, int64 [N, 2]; None if it has none."""
        errors = (self._by_index_pair.get(tuple(pair)) for pair in index_pairs.tolist())
        return next(filter(None, errors), None)


class Batches:
    """The batches of one epoch, in order, made ahead of time by TensorFlow's threads.

    Iterating yields tuples of tensors.
    Raises: ExampleError of the first batch with an unreadable example; tf.errors.OpError for any other failure.
    """

    def __init__(self, stream: tf.data.Dataset, index_batches: tf.data.Dataset, errors: ExampleErrors):
        """index_batches: every batch's index pairs int64 [B, 2]. errors: those that the stream's loader records."""
        self._stream = stream
        self._index_batches = index_batches
        self._errors = errors

    def __iter__(self) -> Iterator[Batch]:
        self._errors.clear()
        return self._with_typed_errors(iter(self._stream))  # `iter` starts the threads: before the first batch is asked

    def take(self, count: int) -> Batches:
        """Returns the first `count` batches."""
        return self._over(self._stream.take(count))

    def prefetch_to_device(self, device: str) -> Batches:
        """Copies batches to the memory of `device` (TensorFlow's name) while the previous ones are in use.

        Must be the last transformation.
        """
        return self._over(self._stream.apply(tf.data.experimental.prefetch_to_device(device, PREFETCH)))

    def _over(self, stream: tf.data.Dataset) -> Batches:
        return Batches(stream, self._index_batches, self._errors)

    def _with_typed_errors(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        number = 0
        try:
            for batch in batches:
                yield batch
                number += 1
        except tf.errors.OpError as error:
            # Threads may have met other unreadable examples, in later batches: only the one of this batch is its cause.
            failed_batch = next(iter(self._index_batches.skip(number)))
            example_error = self._errors.of_batch(failed_batch.numpy())
            if example_error is None:
                raise
            raise example_error from error
