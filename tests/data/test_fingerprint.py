"""The fingerprint of a data set: what changes it, and how it is computed."""

import hashlib
import shutil

from support.image_folders import example_ids, load_folder, splits_by_id, write_image
from train.data import fingerprint


def test_fingerprint_depends_on_label_name_and_content(folder, tmp_path):
    first = load_folder(folder, tmp_path).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_folder(copy, tmp_path).fingerprint == first  # wherever it lies
    (copy / "cat" / "3.png").rename(copy / "cat" / "3b.png")
    renamed = load_folder(copy, tmp_path).fingerprint
    (copy / "cat" / "3b.png").rename(copy / "dog" / "3b.png")
    relabelled = load_folder(copy, tmp_path).fingerprint
    write_image(copy / "dog" / "3b.png", value=5)
    changed = load_folder(copy, tmp_path).fingerprint
    assert len({first, renamed, relabelled, changed}) == 4


def test_fingerprint_is_the_documented_hash(folder, tmp_path):
    loaded = load_folder(folder, tmp_path)
    digests = {}
    for name, split in sorted(loaded.splits.items()):
        total = 0
        for place in example_ids(split):
            content = hashlib.sha256((folder / place).read_bytes()).hexdigest()
            label = ("cat", "dog").index(place.split("/")[0])
            total += int(hashlib.sha256(f"{place}\0{content}\0{label}".encode()).hexdigest(), 16)
        digests[name] = f"{total % 2**256:064x}"
        assert split.digest == digests[name]
    lines = "\n".join(f"{name} {digests[name]}" for name in ("test", "train", "validation"))
    assert loaded.fingerprint == hashlib.sha256(lines.encode()).hexdigest()


def test_fingerprint_does_not_depend_on_the_order():
    lines = [("a", b"0", 1), ("b", b"1", 0), ("c", b"2", 1)]
    assert fingerprint.digest(lines) == fingerprint.digest(lines[::-1])
    assert fingerprint.digest(lines) != fingerprint.digest(lines[:2])
    assert fingerprint.digest(lines[:1] * 2) != fingerprint.digest([])  # what is there twice does not cancel out
    assert fingerprint.digest([]) == "0" * 64
    digests = {"train": "1", "test": "2"}
    assert fingerprint.fingerprint(digests) == fingerprint.fingerprint(dict(reversed(digests.items())))
    assert fingerprint.fingerprint(digests) != fingerprint.fingerprint({"train": "2", "test": "1"})


def test_fingerprint_depends_on_the_split(folder, tmp_path):
    first, other = load_folder(folder, tmp_path), load_folder(folder, tmp_path, validation_fraction=0.3)
    assert splits_by_id(first).keys() == splits_by_id(other).keys()
    assert splits_by_id(first) != splits_by_id(other)
    assert first.test.digest == other.test.digest
    assert first.fingerprint != other.fingerprint
