"""Examples that cannot be read while a stream runs: the error names the file."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import train.data
from support.batches import INCEPTION, make_noise_folder, square_noise, to_numpy
from support.commands import message
from train.data import dataset, pipeline, pixel_cache
from train.data.augmentation import policy


@pytest.fixture
def folder(tmp_path):
    return make_noise_folder(tmp_path / "root", {"train": (12, 12, 12), "validation": (1, 1, 1), "test": (1, 1, 1)})


def load_noise_folder(root, tmp_path, **options):
    return train.data.load("folder", str(tmp_path / "data"), image_size=8, channels=3, root=str(root), **options)


def error_of(stream):
    """The message about a stream that cannot be read to its end."""
    with pytest.raises(Exception, match="cannot read") as caught:
        to_numpy(stream)
    return pipeline.extract_example_error(caught.value)


def streams_of(split):
    """The three kinds of streams that read encoded bytes."""
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "num_classes": 3}
    none, files = replace(split, cache_mode="none"), replace(split, cache_mode="files")
    yield pipeline.eval_batches(none, batch_size=4, num_classes=3)
    yield pipeline.train_batches(none, augmentation=policy.randaugment(), **options)
    yield pipeline.train_batches(files, augmentation=policy.inception(), **options)


def test_broken_file_is_named(folder, tmp_path):
    split = load_noise_folder(folder, tmp_path).train
    (folder / split.example_id(5)).write_bytes(b"gone")
    expected = f"cannot read {folder / split.example_id(5)}: changed since it was indexed; restore the file"
    assert [error_of(stream) for stream in streams_of(split)] == [expected] * 3
    assert message(lambda: pixel_cache.images(replace(split, cache_mode="memory"))) == expected
    assert pipeline.extract_example_error(RuntimeError("something else")) is None


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
    error = error_of(
        pipeline.train_batches(photos, augmentation=INCEPTION, batch_size=4, seed=0, epoch=0, num_classes=3)
    )
    assert error.endswith(".jpg: no such marker; restore the file")


def test_image_above_the_default_limit_is_read_with_a_higher_limit(folder, tmp_path):
    Image.new("1", (7072, 7072), 1).save(folder / "train" / "cat" / "huge.png")
    loaded = load_noise_folder(folder, tmp_path, max_pixels=60_000_000)
    split = replace(loaded.train, cache_mode="none")
    [row] = [index for index in range(len(split)) if split.example_id(index).endswith("huge.png")]
    np.testing.assert_array_equal(split.load_example(row), np.full((8, 8, 3), 255))
