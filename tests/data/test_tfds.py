"""Prepared data sets: digits, two processes preparing at once, damaged shards, downloads that fail."""

import errno
import fcntl
import io
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
from PIL import Image

import train.data
from support.commands import message
from support.image_folders import DIGITS_FINGERPRINT, MNIST_FILES, load_dataset, load_digits
from train.data.sources import tfds


def test_two_processes_can_prepare_at_once(data_dir):
    first, second = json.loads((data_dir / "said.json").read_text())
    assert first == second
    assert first.split()[0] == DIGITS_FINGERPRINT
    assert sorted(path.name for path in (data_dir / "digits").iterdir()) == ["1.0.0"]


def test_digits_match_scikit_learn(digits_8):
    from sklearn.datasets import load_digits as bundled_digits

    assert digits_8.name == "digits"
    assert digits_8.classes == tuple("0123456789")
    assert digits_8.split_sizes == {"train": 1281, "validation": 176, "test": 340}
    assert sum(digits_8.split_sizes.values()) == 1797
    assert digits_8.fingerprint == DIGITS_FINGERPRINT
    assert digits_8.notes == digits_8.skipped == ()
    assert digits_8.leak_counts == {"shared": 0, "conflicts": 0, "alike": 0}
    bundled = bundled_digits()
    for split in digits_8.splits.values():
        number = int(split.example_id(5).removeprefix("train/"))
        assert split.labels.dtype == np.int32
        assert split.labels[5] == bundled.target[number]
        expected = np.rint(bundled.images[number] * 255 / 16)
        np.testing.assert_array_equal(split.load_example(5)[..., 0], expected)
        assert digits_8.class_counts[split.name] == np.bincount(split.labels).tolist()
    assert np.sum(list(digits_8.class_counts.values()), axis=0).tolist() == np.bincount(bundled.target).tolist()


def test_second_load_of_a_prepared_set_inspects_no_example(data_dir, digits_8, inspected):
    again = load_digits(data_dir)
    assert again.fingerprint == digits_8.fingerprint
    assert inspected == []
    shard = next((data_dir / "digits" / "1.0.0").glob("*array_record*"))
    os.utime(shard, ns=(1, 1))
    assert load_digits(data_dir).fingerprint == digits_8.fingerprint
    assert len(inspected) == 1797


def test_damaged_array_record_shard_is_named(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = next((copy / "digits" / "1.0.0").glob("*array_record*"))
    damaged = bytearray(shard.read_bytes())
    damaged[70_000] ^= 255
    shard.write_bytes(damaged)
    error = message(load_digits, copy)
    assert error.startswith("1 of 1797 images cannot be read: digits train/310 (Corrupted ")
    assert error.endswith("; fix or remove them, or set data.on_error=skip data.max_skipped=1 to leave them out")
    skipping = load_digits(copy, on_error="skip")
    assert sum(skipping.split_sizes.values()) == 1796
    assert [name for name, _ in skipping.skipped] == ["train/310"]


def test_limits_hold_for_prepared_sets(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    assert message(load_digits, copy, max_pixels=63).startswith(
        "1797 of 1797 images cannot be read: digits train/0 (8x8 pixels are more than the "
        "limit of 63); digits train/1 ("
    )
    assert load_digits(copy, max_pixels=64).fingerprint == DIGITS_FINGERPRINT


def test_missing_network_is_reported(tmp_path, monkeypatch):
    def unreachable(request, timeout):
        raise OSError(f"asked {request.get_method()} with {timeout} s")

    monkeypatch.setattr(tfds.urllib.request, "urlopen", unreachable)
    assert message(load_dataset, "mnist", tmp_path, image_size=28, channels=1) == (
        "cannot download data=mnist (storage.googleapis.com is unreachable: asked HEAD with 5 s); "
        f"download {MNIST_FILES} from https://storage.googleapis.com/cvdf-datasets/mnist on another machine, "
        "then use data.manual_dir=PATH"
    )
    assert not list(tmp_path.glob("mnist*"))


def test_wrong_manual_files_are_rejected(tmp_path):
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    for name in train.data.SOURCES["mnist"].manual_files:
        (by_hand / name).write_bytes(b"something else")
    error = message(load_dataset, "mnist", tmp_path, image_size=28, channels=1, manual_dir=str(by_hand))
    assert error.startswith(f"cannot prepare data=mnist from data.manual_dir={by_hand}: Artifact ")
    assert error.endswith(f"has wrong checksum; use the original files {MNIST_FILES}")
    assert not list((tmp_path / "mnist").iterdir())


def test_too_little_disk_space_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    error = message(load_dataset, "mnist", tmp_path, image_size=28, channels=1)
    assert error == (
        f"data=mnist needs about 45 MiB of free space in {tmp_path}, only 5 MiB are free; "
        "free some space or use a larger disk"
    )


def test_disk_that_fills_up_while_preparing_is_reported(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tfds, "_download_and_prepare", fill)
    error = message(load_digits, tmp_path)
    assert error.startswith(f"data=digits needs about 1 MiB of free space in {tmp_path}, only ")


def test_png_of_the_builder_is_readable_by_pillow():
    from train.data.digits.digits_dataset_builder import png

    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_folder_that_cannot_be_locked_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    in_the_way = tmp_path / "file" / "data"
    assert message(lambda: tfds._lock("digits", str(in_the_way)).__enter__()) == (
        f"cannot write to {in_the_way} (Not a directory); make it writable, or use another data.directory"
    )

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert message(lambda: tfds._lock("digits", str(tmp_path)).__enter__()) == (
        f"cannot lock files in {tmp_path} (No locks available); use a data.directory on storage with file locks"
    )
