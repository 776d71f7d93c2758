"""Real data sets, in the folder that INCEPTION_REAL_DATA names."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.image_folders import load_dataset
from support.images import decode_image
from train.data import decode

REAL = os.environ.get("INCEPTION_REAL_DATA")
needs_real_data = pytest.mark.skipif(
    not (REAL and Path(REAL).is_dir()), reason="INCEPTION_REAL_DATA names no folder with data sets"
)


@pytest.mark.slow
@pytest.mark.real_data
@needs_real_data
def test_fashion_mnist_loads_from_files(tmp_path):
    loaded = load_dataset("fashion_mnist", str(tmp_path), image_size=28, channels=1, manual_dir=f"{REAL}/fashion_mnist")
    assert loaded.split_sizes == {"train": 54155, "validation": 5845, "test": 10000}
    assert loaded.leak_counts == {"shared": 0, "conflicts": 0, "alike": 0}
    assert loaded.classes[9] == "Ankle boot"
    assert loaded.fingerprint == "8b2ca6d57de2f532bb526b57a68556b7d4fedda77cf54de24c697c2e964cb187"
    assert not (set(loaded.train.sha256.tolist()) & set(loaded.validation.sha256.tolist()))
    assert np.bincount(loaded.test.labels).tolist() == [1000] * 10
    assert not (tmp_path / "downloads" / "fashion_mnist" / "extracted").exists()


@pytest.mark.real_data
@needs_real_data
def test_sign_digits_load_with_orientation(tmp_path):
    loaded = load_dataset("folder", str(tmp_path), image_size=32, channels=3, root=f"{REAL}/sign_digits")
    assert sum(loaded.split_sizes.values()) == 2062
    assert loaded.leak_counts == {"shared": 0, "conflicts": 0, "alike": 0}
    assert loaded.classes == tuple("0123456789")
    names = [(split, row) for split in loaded.splits.values() for row in range(len(split))]
    turned = [(split, row) for split, row in names if orientation(split, row) == 6]
    assert len(turned) == 3
    for split, row in turned:
        data = split.read([row])[0]
        stored = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode_image(data, 3), np.rot90(stored, -1))


def orientation(split, row):
    return Image.open(split.store.root / split.example_id(row)).getexif().get(decode.ORIENTATION, 1)
