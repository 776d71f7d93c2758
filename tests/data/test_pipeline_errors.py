"""Examples that cannot be read while a stream runs: the error is an ExampleError with the example's id."""

import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from support.batches import (
    INCEPTION,
    eval_stream,
    make_augmentation,
    make_noise_folder,
    square_noise,
    to_numpy,
    train_stream,
)
from support.commands import message
from support.image_folders import load_dataset
from train.data import dataset, pixel_cache, sampling
from train.data.augmentation import policy
from train.data.example_error import ExampleError

BATCH_SIZE = 4


@pytest.fixture
def folder(tmp_path):
    return make_noise_folder(tmp_path / "root", {"train": (12, 12, 12), "validation": (4, 4, 4), "test": (1, 1, 1)})


def load_noise_folder(root, tmp_path, **options):
    return load_dataset("folder", str(tmp_path / "data"), image_size=8, channels=3, root=str(root), **options)


def error_of(stream):
    """The message about a stream that cannot be read to its end."""
    with pytest.raises(ExampleError) as caught:
        to_numpy(stream)
    return str(caught.value)


def streams_of(split):
    """The three kinds of streams that read encoded bytes."""
    none, files = replace(split, cache_mode="none"), replace(split, cache_mode="files")
    yield eval_stream(none, batch_size=BATCH_SIZE)
    yield train_stream(none, batch_size=BATCH_SIZE, augmentation=make_augmentation("randaugment"))
    yield train_stream(files, batch_size=BATCH_SIZE, augmentation=INCEPTION)


def test_broken_file_is_named(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    (folder / split.example_id(5)).write_bytes(b"gone")
    expected = f"cannot read {folder / split.example_id(5)}: changed since it was indexed; restore the file"
    assert [error_of(stream) for stream in streams_of(split)] == [expected] * 3
    assert message(lambda: pixel_cache.images(replace(split, cache_mode="memory"))) == expected


def test_missing_file_is_named(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    (folder / split.example_id(5)).unlink()
    expected = f"cannot read {folder / split.example_id(5)}: No such file or directory; restore the file"
    assert [error_of(stream) for stream in streams_of(split)] == [expected] * 3


def test_replaced_image_is_named(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    Image.fromarray(square_noise(12, 9999)).save(folder / split.example_id(5))
    for stream in streams_of(split):
        assert f"{folder / split.example_id(5)}: changed since it was indexed" in error_of(stream)


def test_jpeg_that_the_fast_decoder_rejects_is_named(photos, monkeypatch):
    refusal = ValueError("no such marker")
    monkeypatch.setattr(dataset, "decode_jpeg", Mock(side_effect=refusal))
    error = error_of(train_stream(photos, batch_size=4, augmentation=INCEPTION))
    assert error.endswith(".jpg: no such marker; restore the file")


def test_image_above_the_default_limit_is_read_with_a_higher_limit(folder, tmp_path):
    Image.new("1", (7072, 7072), 1).save(folder / "train" / "cat" / "huge.png")
    loaded = load_noise_folder(folder, tmp_path, max_pixels=60_000_000)
    split = replace(loaded.train, cache_mode="none")
    [row] = [index for index in range(len(split)) if split.example_id(index).endswith("huge.png")]
    np.testing.assert_array_equal(split.load_example(row), np.full((8, 8, 3), 255))


# ------------------------------------------------------------------------------------------------- which error it is


class FailingStore:
    """A store that raises the error of a row when it is read; `waits` are events to wait for first, `sets` to set."""

    def __init__(self, store, errors, waits=None, sets=None):
        self.store = store
        self.errors = errors
        self.waits = waits or {}
        self.sets = sets or {}

    def read(self, rows):
        for row in rows:
            if row in self.waits:
                assert self.waits[row].wait(60)
            if row in self.sets:
                self.sets[row].set()
            if row in self.errors:
                raise self.errors[row]
        return self.store.read(rows)


def failing_split(split, errors, **events):
    """The split, with an error for some of its examples."""
    by_row = {
        name: {int(split.indices[index]): event for index, event in given.items()} for name, given in events.items()
    }
    rows = {int(split.indices[index]): error for index, error in errors.items()}
    return replace(split, store=FailingStore(split.store, rows, **by_row), cache_mode="none")


def in_order(split):
    """The indices of a training epoch."""
    return sampling.permutation(1, 0, len(split))


def small_batches(split, **options):
    return train_stream(split, batch_size=BATCH_SIZE, augmentation=policy.none(), **options)


def batches_before(stream, error_type):
    """How many batches a stream yields before its error, and the error."""
    count = 0
    with pytest.raises(error_type) as caught:
        for _ in stream:
            count += 1
    return count, caught.value


def test_error_carries_the_example(folder, tmp_path):
    validation = load_noise_folder(folder, tmp_path).validation
    broken = folder / validation.example_id(6)
    broken.unlink()
    stream = eval_stream(replace(validation, cache_mode="none"), batch_size=BATCH_SIZE)
    count, error = batches_before(stream, ExampleError)
    assert count == 1  # the batch before is delivered
    assert (error.name, error.split, error.example_id) == (str(broken), "validation", "validation/dog/02.png")
    assert (error.reason, error.advice) == ("No such file or directory", "restore the file")
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, tf.errors.OpError)


@pytest.mark.parametrize("missing_first", [False, True])
def test_first_of_two_unreadable_examples_in_a_batch_is_reported(folder, tmp_path, missing_first):
    split = load_noise_folder(folder, tmp_path).train
    first, second = in_order(split)[[BATCH_SIZE + 1, BATCH_SIZE + 3]]
    missing, changed = (first, second) if missing_first else (second, first)
    (folder / split.example_id(missing)).unlink()
    (folder / split.example_id(changed)).write_bytes(b"gone")
    reason = "No such file or directory" if missing_first else "changed since it was indexed"
    count, error = batches_before(small_batches(replace(split, cache_mode="none")), ExampleError)
    assert (count, error.example_id, error.reason) == (1, split.example_id(first), reason)


def test_first_unreadable_batch_is_reported_though_a_later_one_fails_before(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    order = in_order(split)
    early, late = order[2 * BATCH_SIZE + 1], order[3 * BATCH_SIZE]
    late_failed = threading.Event()
    failing = failing_split(
        split, {early: OSError("early"), late: OSError("late")}, waits={early: late_failed}, sets={late: late_failed}
    )
    count, error = batches_before(small_batches(failing, threads=2), ExampleError)
    assert late_failed.is_set()
    assert (count, error.example_id, error.reason) == (2, split.example_id(early), "early")


def test_unreadable_examples_are_reported_in_shards_and_resumed_epochs(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    order = in_order(split)
    broken = order[5 * BATCH_SIZE + 3]  # in the second half of its batch
    failing = failing_split(split, {broken: OSError("broken")})
    assert len(to_numpy(small_batches(failing, shard=(0, 2)))) == 9
    for options, expected in (
        ({"shard": (1, 2)}, 5),
        ({"first_batch": 4}, 1),
        ({"shard": (1, 2), "first_batch": 5}, 0),
    ):
        count, error = batches_before(small_batches(failing, **options), ExampleError)
        assert (count, error.example_id) == (expected, split.example_id(broken))
    evaluated = failing_split(split, {7: OSError("broken")})
    assert len(to_numpy(eval_stream(evaluated, batch_size=BATCH_SIZE, shard=(0, 2)))) == 9
    count, error = batches_before(eval_stream(evaluated, batch_size=BATCH_SIZE, shard=(1, 2)), ExampleError)
    assert (count, error.example_id) == (1, split.example_id(7))


OTHER_ERRORS = (
    KeyboardInterrupt(),
    RuntimeError("cannot read cat/01.png: not our error; restore the file"),
    ValueError("cannot read cat/01.png: not our error; restore the file"),
)


@pytest.mark.parametrize("other", OTHER_ERRORS, ids=lambda error: type(error).__name__)
def test_other_errors_of_a_loader_are_no_example_errors(folder, tmp_path, other):
    """Also where another thread has met an unreadable example, in a later batch."""
    split = load_noise_folder(folder, tmp_path).train
    order = in_order(split)
    early, late = order[0], order[BATCH_SIZE]
    late_failed = threading.Event()
    failing = failing_split(
        split, {early: other, late: OSError("late")}, waits={early: late_failed}, sets={late: late_failed}
    )
    count, error = batches_before(small_batches(failing, threads=2), tf.errors.OpError)
    assert late_failed.is_set()
    assert count == 0
    assert type(other).__name__ in str(error)


def test_interruption_of_the_consumer_passes(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    failing = failing_split(split, {index: OSError("broken") for index in range(BATCH_SIZE, len(split))})
    stream = iter(eval_stream(failing, batch_size=BATCH_SIZE))
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())


def test_a_stream_that_was_repaired_can_be_read_again(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    failing = failing_split(split, {5: OSError("broken")})
    stream = eval_stream(failing, batch_size=BATCH_SIZE)
    assert batches_before(stream, ExampleError)[0] == 1
    failing.store.errors = {int(split.indices[5]): RuntimeError("another")}
    assert batches_before(stream, tf.errors.OpError)[0] == 1  # not the earlier error of the same batch
    failing.store.errors = {}
    assert len(to_numpy(stream)) == 9
