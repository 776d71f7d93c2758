"""TFRecord files: the same data set as from ArrayRecord, an index of records, and damage."""

import contextlib
import io
import os
import shutil

import numpy as np
import pytest

from support.commands import message
from support.image_folders import DIGITS_FINGERPRINT, example_ids, flipped, load_digits
from train.data.sources import record_readers


@pytest.fixture(scope="module")
def tfrecord_dir(tmp_path_factory):
    """digits as prepared by TFDS itself."""
    import tensorflow_datasets as tfds

    from train.data.digits.digits_dataset_builder import Builder

    base = tmp_path_factory.mktemp("tfrecord")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Builder(data_dir=str(base), file_format="tfrecord").download_and_prepare()
    return base


@pytest.fixture
def tfrecord(tfrecord_dir, tmp_path):
    """The shard of a copy that may be damaged; it has been indexed once."""
    copy = shutil.copytree(tfrecord_dir, tmp_path / "copy")
    load_digits(copy)
    return next((copy / "digits" / "1.0.0").glob("*.tfrecord-*"))


def test_tfrecord_and_array_record_give_the_same_data_set(tfrecord_dir, digits_8):
    assert [path.name for path in (tfrecord_dir / "digits" / "1.0.0").glob("*-train.*")] == [
        "digits-train.tfrecord-00000-of-00001"
    ]
    loaded = load_digits(tfrecord_dir)
    assert loaded.fingerprint == DIGITS_FINGERPRINT
    assert loaded.classes == digits_8.classes
    for one, other in zip(loaded.splits.values(), digits_8.splits.values(), strict=True):
        assert example_ids(one) == example_ids(other)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.sha256, other.sha256)
        everything = range(len(one))
        assert one.read(everything) == other.read(everything)
        assert one.digest == other.digest
        np.testing.assert_array_equal(one.load_example(7), other.load_example(7))


def test_record_index_is_built_once(tfrecord, monkeypatch):
    def refuse(_):
        raise AssertionError("made again")

    data_dir = tfrecord.parents[2]
    [index] = (data_dir / ".index").glob("records-*.npy")
    places = np.load(index)
    assert places.shape == (1797, 3)
    data = tfrecord.read_bytes()
    assert places[:, 2].sum() + 16 * 1797 == len(data)
    monkeypatch.setattr(record_readers, "_verify_checksums", refuse)
    assert load_digits(data_dir).fingerprint == DIGITS_FINGERPRINT
    os.utime(tfrecord, ns=(1, 1))
    with pytest.raises(AssertionError, match="made again"):
        load_digits(data_dir)


def cut_at_a_record(data):
    """Keeps the first 1,000 records, complete and with valid checksums."""
    end = 0
    for _ in range(1000):
        end += int.from_bytes(data[end : end + 8], "little") + 16
    return data[:end]


@pytest.mark.parametrize(
    "damage",
    [lambda data: flipped(data, 70_000), lambda data: data[:-10], cut_at_a_record, lambda _: b"", None],
    ids=["a flipped byte", "cut short", "cut between records", "emptied", "removed"],
)
def test_damaged_tfrecord_shard_is_rejected(tfrecord, damage):
    data_dir = tfrecord.parents[2]
    if damage is None:
        tfrecord.unlink()
    else:
        tfrecord.write_bytes(damage(tfrecord.read_bytes()))
    error = message(load_digits, data_dir)
    assert error.startswith(f"cannot read data=digits in {tfrecord.parent}: ")
    assert str(tfrecord) in error
    assert error.endswith("; remove that folder to prepare it again")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-8], lambda _: b"", lambda data: flipped(data, 128 + 8), lambda data: flipped(data, 128 + 22)],
    ids=["cut short", "emptied", "an offset", "a length"],
)
def test_damaged_record_index_is_rebuilt(tfrecord, damage):
    data_dir = tfrecord.parents[2]
    [index] = (data_dir / ".index").glob("records-*.npy")
    before = index.read_bytes()
    index.write_bytes(damage(before))
    loaded = load_digits(data_dir)
    for split in loaded.splits.values():
        assert len(split.read(range(len(split)))) == len(split)
    assert loaded.fingerprint == DIGITS_FINGERPRINT
    assert index.read_bytes() == before
