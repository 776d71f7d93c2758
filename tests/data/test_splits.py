"""Splits: by content, stable under new files, and with examples of every class."""

import shutil

import numpy as np
import pytest

from support.commands import message
from support.image_folders import load_digits, load_folder, make_folder, splits_by_id, write_image
from train.data import splits


def test_smaller_train_per_class_is_a_subset_of_a_larger_one(data_dir, digits_8):
    names = {}
    for few in (3, 10):
        data = load_digits(data_dir, train_per_class=few)
        assert np.bincount(data.train.labels).tolist() == [few] * 10
        assert (data.validation.digest, data.test.digest) == (digits_8.validation.digest, digits_8.test.digest)
        assert data.fingerprint != digits_8.fingerprint
        names[few] = {data.train.example_id(index) for index in range(len(data.train))}
    assert names[3] < names[10] < {digits_8.train.example_id(index) for index in range(len(digits_8.train))}
    with pytest.raises(
        ValueError,
        match=r"^class \d has only \d+ examples in train, fewer than data.train_per_class=1000; use \d+ or null",
    ):
        load_digits(data_dir, train_per_class=1000)


def test_splits_are_disjoint_by_content(digits_8):
    contents = [set(split.sha256.tolist()) for split in digits_8.splits.values()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not contents[one] & contents[other]


def splits_by_number(_, rows):
    """A wrong rule, as a negative control: the split follows the number of the example."""
    return (np.arange(len(rows)) * 0.618) % 1


@pytest.mark.parametrize(("rule", "stays"), [(splits.content_hash_uniform, True), (splits_by_number, False)])
def test_adding_a_file_leaves_other_files_in_their_splits(folder, tmp_path, monkeypatch, rule, stays):
    monkeypatch.setattr(splits, "content_hash_uniform", rule)
    before = load_folder(folder, tmp_path)
    write_image(folder / "cat" / "00_first.png", value=77)
    after = load_folder(folder, tmp_path)
    assert sum(after.split_sizes.values()) == 41
    assert (splits_by_id(before).items() <= splits_by_id(after).items()) == stays
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(("rule", "together"), [(splits.content_hash_uniform, True), (splits_by_number, False)])
def test_copies_are_in_the_same_split(folder, tmp_path, monkeypatch, rule, together):
    monkeypatch.setattr(splits, "content_hash_uniform", rule)
    for number in range(20):
        shutil.copy(folder / "cat" / f"{number}.png", folder / "cat" / f"copy_of_{number}.png")
    found = splits_by_id(load_folder(folder, tmp_path))
    apart = [number for number in range(20) if found[f"cat/{number}.png"] != found[f"cat/copy_of_{number}.png"]]
    assert (not apart) == together


def test_given_split_without_readable_images_is_rejected(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "test", 2, start=100)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    assert message(load_folder, root, tmp_path, on_error="skip").startswith("the test split is empty (0 of ")


def test_class_imbalance_is_reported(tmp_path):
    root = tmp_path / "root"
    for number, part in enumerate(("train", "validation", "test")):
        make_folder(root / part, 9, start=100 * number)
    for name in ("0", "1", "2", "3", "4", "5"):
        (root / "train" / "dog" / f"{name}.png").unlink()
    assert load_folder(root, tmp_path).notes == (
        "class imbalance in train: 3 (dog) to 9 (cat) examples; consider data.class_weights=true or data.balanced=true",
    )
    (root / "train" / "cat" / "0.png").unlink()
    loaded = load_folder(root, tmp_path)
    assert loaded.notes == ()
    assert loaded.class_counts == {"train": [8, 3], "validation": [9, 9], "test": [9, 9]}


def test_empty_split_is_rejected(tmp_path):
    root = make_folder(tmp_path / "root", 2)
    assert message(load_folder, root, tmp_path, validation_fraction=0.01) == (
        "the validation split is empty (0 of 4 examples); add images, use a larger fraction for it, "
        "or add a folder validation/ with class folders"
    )
