"""What there is and how it is cut: checking, preparing, looking at it once, splits, fingerprints, messages."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train.data
from support.commands import message
from train.data import dataset, decode, fingerprint, pixel_cache
from train.data.ingestion import validation
from train.data.sources import folder as folder_source
from train.data.sources import record_readers, tfds
from train.runtime.setup import cores

REAL = os.environ.get("INCEPTION_REAL_DATA")
needs_real_data = pytest.mark.skipif(
    not (REAL and Path(REAL).is_dir()), reason="INCEPTION_REAL_DATA names no folder with data sets"
)

DIGITS_FINGERPRINT = "9394412a559e0ae377593c7ee5a5b60fc6b95adae6de4a362d77f1d781d23e12"
FORMATS = "no image of a known format (JPEG, PNG, GIF, BMP, WEBP)"


# ------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder in which two processes prepared digits at the same time, over a killed one's leftovers."""
    place = tmp_path_factory.mktemp("data")
    (place / "digits" / "incomplete.abc_1.0.0").mkdir(parents=True)
    code = (
        "import sys, train.data as d; s = d.load('digits', sys.argv[1], image_size=8, channels=1);"
        "print(s.fingerprint, s.counts)"
    )
    command = [sys.executable, "-c", code, str(place)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (place / "said.json").write_text(json.dumps([out for out, _ in said]))
    return place


@pytest.fixture(scope="module")
def digits_8(data_dir):
    return load_digits(data_dir)


def load_digits(data_dir, **options):
    return train.data.load("digits", str(data_dir), **({"image_size": 8, "channels": 1} | options))


def test_few_examples_of_every_class_are_among_more_of_them(data_dir, digits_8):
    names = {}
    for few in (3, 10):
        data = load_digits(data_dir, train_per_class=few)
        assert np.bincount(data.train.labels).tolist() == [few] * 10
        assert (data.validation.digest, data.test.digest) == (digits_8.validation.digest, digits_8.test.digest)
        assert data.fingerprint != digits_8.fingerprint
        names[few] = {data.train.example_id(index) for index in range(len(data.train))}
    assert names[3] < names[10] < {digits_8.train.example_id(index) for index in range(len(digits_8.train))}
    with pytest.raises(
        ValueError, match=r"data.train_per_class must be at most what every class has in train, \d+ of \d"
    ):
        load_digits(data_dir, train_per_class=1000)


def write_image(path, value=0, side=6, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def make_folder(root, count=20, classes=("cat", "dog"), start=0):
    for label, name in enumerate(classes):
        for number in range(count):
            write_image(root / name / f"{number}.png", value=1000 * label + start + number)
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "root")


def load_folder(root, tmp_path, **options):
    return train.data.load("folder", str(tmp_path / "data"), image_size=4, channels=3, root=str(root), **options)


def ids(split):
    return [split.example_id(index) for index in range(len(split))]


def where(loaded):
    """id -> split."""
    return {name: split.name for split in loaded.splits.values() for name in ids(split)}


def broken(count, total, named, advice=None):
    """The one sentence about examples that can't be used."""
    advice = advice or f"use data.on_error=skip data.max_skipped={count} to leave them out"
    return (
        f"the data must be readable images, got {count} of {total} that are not: {named}; mend or remove them, or "
        f"{advice}"
    )


@pytest.fixture
def looked(monkeypatch):
    """Whatever is looked at from here on, by content."""
    seen, look = [], validation.inspect
    monkeypatch.setattr(validation, "inspect", lambda data, *others: seen.append(data) or look(data, *others))
    return seen


# ------------------------------------------------------------------------------------------- importing and checking


def test_importing_and_checking_is_cheap(folder):
    code = (
        "import sys; before = set(sys.modules); import train.data as d;"
        "d.check('folder', root=sys.argv[1]); d.check('digits');"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(loaded - sys.stdlib_module_names))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    assert said == "['train']\n"  # neither TensorFlow nor NumPy nor Pillow


EXPECTED_ROOT = "data.root must be a folder with one sub-folder of images per class"
FILES = (
    "data.manual_dir must be a folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
    "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
)


def test_unknown_name():
    assert message(train.data.check, "digit") == (
        "data must be one of digits, mnist, fashion_mnist, cifar10, imagenette, tf_flowers, imagenet2012, folder, "
        "manifest, got digit; use data=digits"
    )


def test_root_messages(tmp_path, folder):
    check, use = train.data.check, "use data.root=PATH"
    assert message(check, "folder") == f"{EXPECTED_ROOT}, got none; {use}"
    assert message(check, "folder", root="/nowhere") == f"{EXPECTED_ROOT}, got /nowhere, which is no folder; {use}"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(check, "folder", root=str(empty)) == f"{EXPECTED_ROOT}, got {empty}, which has no sub-folders; {use}"
    (empty / "cat").mkdir()
    one = f"{EXPECTED_ROOT}, at least two, got only cat in {empty}; {use}"
    assert message(check, "folder", root=str(empty)) == one
    (empty / "dog").mkdir()
    assert message(check, "folder", root=str(empty)) == f"{EXPECTED_ROOT}, got {empty / 'cat'} with no images; {use}"
    (empty / "cat" / "notes.jpg").write_text("no image, whatever it is called")
    assert message(check, "folder", root=str(empty)) == f"{EXPECTED_ROOT}, got {empty / 'cat'} with no images; {use}"
    assert message(check, "digits", root=str(folder)) == (
        f"data.root must be left out for data=digits, got {folder}; use data=folder data.root={folder}"
    )
    check("folder", root=str(folder))


def test_manual_dir_messages(tmp_path):
    check = train.data.check
    assert message(check, "mnist", manual_dir="/nowhere") == (
        f"{FILES} for data=mnist, got /nowhere, which is no folder; use data.manual_dir=PATH"
    )
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    assert message(check, "mnist", manual_dir=str(tmp_path), data_dir=str(tmp_path)) == (
        f"{FILES} for data=mnist, got {tmp_path} without train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        "t10k-labels-idx1-ubyte.gz; use a folder that holds them all"
    )
    assert message(check, "imagenet2012", data_dir=str(tmp_path)) == (
        "data.manual_dir must be a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar for data=imagenet2012, "
        "got none; use data.manual_dir=PATH, the files need an account at their origin"
    )
    assert message(check, "digits", manual_dir=str(tmp_path)) == (
        f"data.manual_dir must be left out for data=digits, got {tmp_path}; use data.manual_dir=null"
    )
    done = tmp_path / "mnist" / "3.0.1"
    done.mkdir(parents=True)
    (done / "dataset_info.json").touch()
    check("mnist", manual_dir=str(tmp_path), data_dir=str(tmp_path))  # prepared: the files are not needed any more


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 2}, "data.channels must be 1 or 3, got 2; use data.channels=1"),
        ({"image_size": 0}, "data.image_size must be at least 1 pixel, got 0; use data.image_size=32"),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "validation and test fraction must be above 0 and below 1 together, got 0.5 and 0.5; use 0.1 and 0.2",
        ),
    ],
)
def test_number_messages(data_dir, options, said):
    assert message(load_digits, data_dir, **options) == said


# --------------------------------------------------------------------------------------------------- prepared sets


def test_two_processes_prepare_at_once_and_sweep_up(data_dir):
    first, second = json.loads((data_dir / "said.json").read_text())
    assert first == second
    assert first.split()[0] == DIGITS_FINGERPRINT
    assert sorted(path.name for path in (data_dir / "digits").iterdir()) == ["1.0.0"]


def test_digits(digits_8):
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
        place = int(split.example_id(5).removeprefix("train/"))
        assert split.labels.dtype == np.int32
        assert split.labels[5] == bundled.target[place]
        expected = np.rint(bundled.images[place] * 255 / 16)
        np.testing.assert_array_equal(split.load_example(5)[..., 0], expected)
        assert digits_8.class_counts[split.name] == np.bincount(split.labels).tolist()
    assert np.sum(list(digits_8.class_counts.values()), axis=0).tolist() == np.bincount(bundled.target).tolist()


def test_splits_are_disjoint_by_content(digits_8):
    contents = [set(split.sha256.tolist()) for split in digits_8.splits.values()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not contents[one] & contents[other]


def test_second_load_of_a_prepared_set_looks_at_no_example(data_dir, digits_8, looked):
    again = load_digits(data_dir)
    assert again.fingerprint == digits_8.fingerprint
    assert looked == []
    shard = next((data_dir / "digits" / "1.0.0").glob("*array_record*"))
    os.utime(shard, ns=(1, 1))
    assert load_digits(data_dir).fingerprint == digits_8.fingerprint
    assert len(looked) == 1797


def test_a_damaged_array_record_shard_is_named(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = next((copy / "digits" / "1.0.0").glob("*array_record*"))
    damaged = bytearray(shard.read_bytes())
    damaged[70_000] ^= 255
    shard.write_bytes(damaged)
    said = message(load_digits, copy)
    assert said.startswith("the data must be readable images, got 1 of 1797 that are not: digits train/310 (Corrupted ")
    assert said.endswith("; mend or remove them, or use data.on_error=skip data.max_skipped=1 to leave them out")
    skipping = load_digits(copy, on_error="skip")
    assert sum(skipping.split_sizes.values()) == 1796
    assert [name for name, _ in skipping.skipped] == ["train/310"]


def test_limits_hold_for_prepared_sets(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    assert message(load_digits, copy, max_pixels=63).startswith(
        "the data must be readable images, got 1797 of 1797 that are not: digits train/0 (8x8 pixels are more than the "
        "limit of 63); digits train/1 ("
    )
    assert load_digits(copy, max_pixels=64).fingerprint == DIGITS_FINGERPRINT


def test_no_network(tmp_path, monkeypatch):
    def unreachable(request, timeout):
        raise OSError(f"asked {request.get_method()} with {timeout} s")

    monkeypatch.setattr(tfds.urllib.request, "urlopen", unreachable)
    assert message(train.data.load, "mnist", str(tmp_path), image_size=28, channels=1) == (
        f"{FILES} where data=mnist can't be downloaded, got none "
        "(storage.googleapis.com is out of reach: asked HEAD with 5 s); "
        "use data.manual_dir=PATH with the files fetched from https://storage.googleapis.com/cvdf-datasets/mnist"
    )
    assert not list(tmp_path.glob("mnist*"))


def test_wrong_files_by_hand(tmp_path):
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    for name in train.data.SOURCES["mnist"].manual_files:
        (by_hand / name).write_bytes(b"something else")
    said = message(train.data.load, "mnist", str(tmp_path), image_size=28, channels=1, manual_dir=str(by_hand))
    assert said.startswith(f"{FILES} where data=mnist can't be downloaded, got {by_hand} (Artifact ")
    assert said.endswith("has wrong checksum); use the original files")
    assert not list((tmp_path / "mnist").iterdir())


def test_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    said = message(train.data.load, "mnist", str(tmp_path), image_size=28, channels=1)
    assert said == (
        f"data=mnist must have about 45 MiB of free space in {tmp_path}, got 5 MiB; "
        "use a disk with more room or free some"
    )


def test_disk_fills_up_while_preparing(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tfds, "_download_and_prepare", fill)
    said = message(load_digits, tmp_path)
    assert said.startswith(f"data=digits must have about 1 MiB of free space in {tmp_path}, got ")


def test_png_of_the_builder_is_read_by_others():
    from train.data.digits.digits_dataset_builder import png

    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


# -------------------------------------------------------------------------------------- prepared by others: TFRecord


@pytest.fixture(scope="module")
def tfrecord_dir(tmp_path_factory):
    """digits as TFDS prepares them by itself."""
    import tensorflow_datasets as tfds

    from train.data.digits.digits_dataset_builder import Builder

    place = tmp_path_factory.mktemp("tfrecord")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Builder(data_dir=str(place), file_format="tfrecord").download_and_prepare()
    return place


@pytest.fixture
def tfrecord(tfrecord_dir, tmp_path):
    """A copy that may be damaged: its shard, looked at once."""
    copy = shutil.copytree(tfrecord_dir, tmp_path / "copy")
    load_digits(copy)
    return next((copy / "digits" / "1.0.0").glob("*.tfrecord-*"))


def test_tfrecord_and_array_record_are_the_same_set(tfrecord_dir, digits_8):
    assert [path.name for path in (tfrecord_dir / "digits" / "1.0.0").glob("*-train.*")] == [
        "digits-train.tfrecord-00000-of-00001"
    ]
    loaded = load_digits(tfrecord_dir)
    assert loaded.fingerprint == DIGITS_FINGERPRINT
    assert loaded.classes == digits_8.classes
    for one, other in zip(loaded.splits.values(), digits_8.splits.values(), strict=True):
        assert ids(one) == ids(other)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.sha256, other.sha256)
        everything = range(len(one))
        assert one.read(everything) == other.read(everything)
        assert one.digest == other.digest
        np.testing.assert_array_equal(one.load_example(7), other.load_example(7))


def test_the_index_of_records_is_made_once(tfrecord, monkeypatch):
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


def flipped(data, place):
    """With all bits of one byte turned."""
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def cut_at_a_record(data):
    """The first 1,000 records, whole and with right checksums."""
    end = 0
    for _ in range(1000):
        end += int.from_bytes(data[end : end + 8], "little") + 16
    return data[:end]


@pytest.mark.parametrize(
    "damage",
    [lambda data: flipped(data, 70_000), lambda data: data[:-10], cut_at_a_record, lambda _: b"", None],
    ids=["a flipped byte", "cut short", "cut between records", "emptied", "removed"],
)
def test_a_damaged_tfrecord_shard_is_refused(tfrecord, damage):
    data_dir = tfrecord.parents[2]
    if damage is None:
        tfrecord.unlink()
    else:
        tfrecord.write_bytes(damage(tfrecord.read_bytes()))
    said = message(load_digits, data_dir)
    assert said.startswith(f"data=digits must be readable in {tfrecord.parent}, got: ")
    assert str(tfrecord) in said
    assert said.endswith("; use a new copy: remove that folder and it is prepared again")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-8], lambda _: b"", lambda data: flipped(data, 128 + 8), lambda data: flipped(data, 128 + 22)],
    ids=["cut short", "emptied", "an offset", "a length"],
)
def test_a_damaged_index_of_records_is_made_again(tfrecord, damage):
    data_dir = tfrecord.parents[2]
    [index] = (data_dir / ".index").glob("records-*.npy")
    before = index.read_bytes()
    index.write_bytes(damage(before))
    loaded = load_digits(data_dir)
    for split in loaded.splits.values():
        assert len(split.read(range(len(split)))) == len(split)
    assert loaded.fingerprint == DIGITS_FINGERPRINT
    assert index.read_bytes() == before


# ------------------------------------------------------------------------------------------------------ own folders


def test_folder(folder, tmp_path):
    loaded = load_folder(folder, tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert sum(loaded.split_sizes.values()) == 40
    assert set(where(loaded)) == {f"{name}/{number}.png" for name in ("cat", "dog") for number in range(20)}
    for split in loaded.splits.values():
        assert [loaded.classes[label] for label in split.labels] == [name.split("/")[0] for name in ids(split)]
        data = (folder / split.example_id(0)).read_bytes()
        assert split.sha256[0] == hashlib.sha256(data).hexdigest().encode()
        assert split.read([0]) == [data]


def by_index(_, rows):
    """The rule that must not be: an example's place by its number."""
    return (np.arange(len(rows)) * 0.618) % 1


@pytest.mark.parametrize(("rule", "stays"), [(dataset.content_hash_uniform, True), (by_index, False)])
def test_adding_a_file_moves_no_other(folder, tmp_path, monkeypatch, rule, stays):
    monkeypatch.setattr(dataset, "content_hash_uniform", rule)
    before = load_folder(folder, tmp_path)
    write_image(folder / "cat" / "00_first.png", value=77)
    after = load_folder(folder, tmp_path)
    assert sum(after.split_sizes.values()) == 41
    assert (where(before).items() <= where(after).items()) == stays
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(("rule", "together"), [(dataset.content_hash_uniform, True), (by_index, False)])
def test_copies_stay_together(folder, tmp_path, monkeypatch, rule, together):
    monkeypatch.setattr(dataset, "content_hash_uniform", rule)
    for number in range(20):
        shutil.copy(folder / "cat" / f"{number}.png", folder / "cat" / f"copy_of_{number}.png")
    found = where(load_folder(folder, tmp_path))
    apart = [number for number in range(20) if found[f"cat/{number}.png"] != found[f"cat/copy_of_{number}.png"]]
    assert (not apart) == together


def test_fingerprint_tells_label_name_and_content(folder, tmp_path):
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


def test_the_fingerprint_is_what_it_says(folder, tmp_path):
    loaded = load_folder(folder, tmp_path)
    digests = {}
    for name, split in sorted(loaded.splits.items()):
        total = 0
        for place in ids(split):
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
    splits = {"train": "1", "test": "2"}
    assert fingerprint.fingerprint(splits) == fingerprint.fingerprint(dict(reversed(splits.items())))
    assert fingerprint.fingerprint(splits) != fingerprint.fingerprint({"train": "2", "test": "1"})


def test_fingerprint_tells_the_split(folder, tmp_path):
    first, other = load_folder(folder, tmp_path), load_folder(folder, tmp_path, validation_fraction=0.3)
    assert where(first).keys() == where(other).keys()
    assert where(first) != where(other)
    assert first.test.digest == other.test.digest
    assert first.fingerprint != other.fingerprint


def test_parts_above_the_classes(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "val", 4, start=100)
    loaded = load_folder(root, tmp_path)
    found = where(loaded)
    assert {name.split("/")[0] for name, split in found.items() if split == "validation"} == {"val"}
    assert loaded.split_sizes["validation"] == 8
    assert loaded.split_sizes["train"] + loaded.split_sizes["test"] == 40
    make_folder(root / "test", 2, start=200)
    assert load_folder(root, tmp_path).split_sizes == {"train": 40, "validation": 8, "test": 4}
    write_image(root / "test" / "bird" / "1.png")
    assert message(load_folder, root, tmp_path) == (
        f"data.root must have the classes of train in every part, got {root / 'test' / 'bird'}; use those"
    )


def test_a_class_may_be_called_train(tmp_path):
    root = make_folder(tmp_path / "root", classes=("bus", "train"))
    assert load_folder(root, tmp_path).classes == ("bus", "train")


def test_content_decides_and_hidden_files_are_left_out(folder, tmp_path):
    for name, kind in (("a.JPG", "JPEG"), ("b.jpeg", "PNG"), ("c.GIF", "GIF"), ("d.bmp", "BMP"), ("e f.WebP", "WEBP")):
        write_image(folder / "cat" / name, value=len(name), format=kind)
    for name in (".DS_Store", "Thumbs.db"):
        (folder / "cat" / name).write_bytes(b"left by a file manager")
    found = where(load_folder(folder, tmp_path))
    assert len(found) == 45
    assert {"cat/a.JPG", "cat/b.jpeg", "cat/c.GIF", "cat/d.bmp", "cat/e f.WebP"} <= set(found)


def test_what_is_no_image_is_named(folder, tmp_path):
    (folder / "cat" / "labels.csv").write_text("no image")
    assert message(load_folder, folder, tmp_path) == broken(1, 41, f"{folder}/cat/labels.csv ({FORMATS})")
    half = (folder / "cat" / "3.png").read_bytes()[:-40]
    (folder / "cat" / "3.png").write_bytes(half)
    (folder / "dog" / "empty.png").touch()
    said = message(load_folder, folder, tmp_path)
    assert said.startswith(f"the data must be readable images, got 3 of 42 that are not: {folder}/cat/3.png (")
    assert f"{folder}/dog/empty.png ({FORMATS})" in said
    for number in range(12):
        (folder / "dog" / f"z{number}").touch()
    said = message(load_folder, folder, tmp_path)
    assert said.startswith("the data must be readable images, got 15 of 54 that are not: ")
    assert said.count(" (") - said.count(" (JPEG") == 10
    assert said.endswith(
        " and 5 more; mend or remove them, or use data.on_error=skip data.max_skipped=15 to leave them out"
    )


def test_stray_files_folders_and_pipes_are_named(folder, tmp_path):
    (folder / "README").touch()
    assert message(load_folder, folder, tmp_path) == (
        f"data.root must hold only folders beside each other, got the file {folder / 'README'}; use a class folder"
    )
    (folder / "README").unlink()
    os.mkfifo(folder / "cat" / "pipe.jpg")
    assert message(load_folder, folder, tmp_path) == broken(1, 41, f"{folder}/cat/pipe.jpg (no regular file)")
    (folder / "cat" / "x.jpg").mkdir()
    assert message(load_folder, folder, tmp_path) == broken(
        2, 42, f"{folder}/cat/pipe.jpg (no regular file); {folder}/cat/x.jpg (a folder)"
    )
    (folder / "cat" / "pipe.jpg").unlink()
    (folder / "cat" / "x.jpg").rmdir()
    assert sum(load_folder(folder, tmp_path).split_sizes.values()) == 40


def test_a_link_may_not_leave_the_root(folder, tmp_path):
    before = load_folder(folder, tmp_path)
    write_image(tmp_path / "elsewhere.png", value=5)
    link = folder / "cat" / "link.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    said = f"{link} (leads out of {folder})"
    assert message(load_folder, folder, tmp_path) == broken(1, 41, said)
    link.unlink()
    link.symlink_to("../../elsewhere.png")
    assert message(load_folder, folder, tmp_path) == broken(1, 41, said)
    link.unlink()
    link.symlink_to("../dog/3.png")
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    gone = f"{folder}/cat/gone.png (No such file or directory)"
    assert message(load_folder, folder, tmp_path) == broken(1, 42, gone)
    (folder / "cat" / "gone.png").unlink()
    after = load_folder(folder, tmp_path)
    assert where(after) == where(before) | {"cat/link.png": where(before)["dog/3.png"]}


def test_links_are_followed_once_for_each_folder(folder, tmp_path, monkeypatch):
    """Not once for each file, which would take longer than all else where there are a million."""
    inside = folder_source._RootMembership
    asked, holds = [], inside.contains
    monkeypatch.setattr(inside, "contains", lambda root, path: asked.append(path) or holds(root, path))
    (folder / "cat" / "link.png").symlink_to("../dog/3.png")
    load_folder(folder, tmp_path)
    assert asked == [f"{folder}/cat", f"{folder}/cat/link.png", f"{folder}/dog"]


def test_a_class_folder_may_not_lie_elsewhere(folder, tmp_path):
    (folder / "cat").rename(tmp_path / "cats")
    (folder / "cat").symlink_to(tmp_path / "cats")
    said = message(load_folder, folder, tmp_path)
    first = f"{folder}/cat/0.png (leads out of {folder})"
    assert said.startswith(f"the data must be readable images, got 20 of 40 that are not: {first}; ")
    root = tmp_path / "another name"
    root.symlink_to(folder)
    (folder / "cat").unlink()
    (tmp_path / "cats").rename(folder / "cat")
    assert load_folder(root, tmp_path).fingerprint == load_folder(folder, tmp_path).fingerprint


def test_a_link_to_itself_beside_the_classes_is_named(folder, tmp_path):
    (folder / "loop").symlink_to("loop")
    said = f"data.root must hold only folders beside each other, got the file {folder}/loop; use a class folder"
    assert message(load_folder, folder, tmp_path) == said


def test_a_link_to_itself_is_named(folder, tmp_path):
    (folder / "cat" / "loop.png").symlink_to("loop.png")
    said = message(load_folder, folder, tmp_path)
    assert said.startswith(f"the data must be readable images, got 1 of 41 that are not: {folder}/cat/loop.png (")


def test_a_name_that_is_no_utf8_is_named(folder, tmp_path):
    write_image(folder / "cat" / "café \u4e00.png", value=5)  # UTF-8
    assert "cat/café \u4e00.png" in where(load_folder(folder, tmp_path))
    shutil.copy(folder / "cat" / "3.png", os.fsencode(folder) + b"/cat/caf\xe9.png")
    named = f"{folder}/cat/caf\\udce9.png (the name is no UTF-8)"
    assert message(load_folder, folder, tmp_path) == broken(1, 42, named)
    loaded = load_folder(folder, tmp_path, on_error="skip")
    assert loaded.skipped == (("cat/caf\\udce9.png", "the name is no UTF-8"),)
    assert sum(loaded.split_sizes.values()) == 41


# ------------------------------------------------------------------------------------------------ looked at only once


def index_of(tmp_path):
    [place] = (tmp_path / "data" / ".index").glob("folder-*.arrow")
    return place


def test_the_table_of_what_was_found(folder, tmp_path):
    import pyarrow.feather

    write_image(folder / "cat" / "photo.jpg", value=1, side=70, quality=95)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    write_image(folder / "cat" / "turned.jpg", value=2, side=70, exif=turned)
    (folder / "dog" / "notes.txt").write_text("no image")
    load_folder(folder, tmp_path, on_error="skip")
    place = index_of(tmp_path)
    assert place.with_name(place.name + ".sha256").read_text() == hashlib.sha256(place.read_bytes()).hexdigest()
    rows = {row["path"]: row for row in pyarrow.feather.read_table(place).to_pylist()}
    assert len(rows) == 43
    path = folder / "dog" / "3.png"
    assert rows["dog/3.png"] == {
        "path": "dog/3.png", "split": "", "label": 1, "size": path.stat().st_size, "time": path.stat().st_mtime_ns,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest().encode(), "format": "PNG", "width": 6, "height": 6,
        "plain": False, "likeness": 0, "thumbnail": bytes(64), "problem": "",
    }  # fmt: skip
    photo, turned, notes = rows["cat/photo.jpg"], rows["cat/turned.jpg"], rows["dog/notes.txt"]
    assert (photo["format"], photo["width"], photo["plain"], photo["likeness"] > 0) == ("JPEG", 70, True, True)
    assert (turned["format"], turned["plain"]) == ("JPEG", False)
    assert (notes["label"], notes["size"], notes["format"], notes["problem"]) == (1, 8, "", FORMATS)


def test_only_changed_files_are_looked_at(folder, tmp_path, looked):
    load_folder(folder, tmp_path)
    assert len(looked) == 40
    looked.clear()
    load_folder(folder, tmp_path)
    assert looked == []
    changed = folder / "cat" / "3.png"
    write_image(changed, value=99, side=7)
    load_folder(folder, tmp_path)
    assert looked == [changed.read_bytes()]
    looked.clear()
    write_image(folder / "dog" / "new.png", value=98)
    assert sum(load_folder(folder, tmp_path).split_sizes.values()) == 41
    assert looked == [(folder / "dog" / "new.png").read_bytes()]
    looked.clear()
    (folder / "cat" / "0.png").unlink()
    assert "cat/0.png" not in where(load_folder(folder, tmp_path))
    assert looked == []


def test_what_was_broken_is_looked_at_with_every_change(folder, tmp_path, looked):
    (folder / "cat" / "notes.txt").write_text("no image")
    load_folder(folder, tmp_path, on_error="skip")
    looked.clear()
    (folder / "dog" / "0.png").unlink()
    load_folder(folder, tmp_path, on_error="skip")
    assert looked == [b"no image"]


def test_size_and_time_tell_a_change(folder, tmp_path, looked):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1)
    first = load_folder(folder, tmp_path)
    time = path.stat().st_mtime_ns
    looked.clear()
    os.utime(path, ns=(time, time + 1))
    assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
    assert looked == [path.read_bytes()]
    looked.clear()
    write_image(path, value=1, side=7)
    os.utime(path, ns=(time, time + 1))
    assert load_folder(folder, tmp_path).fingerprint != first.fingerprint
    assert looked == [path.read_bytes()]


def test_a_change_that_size_and_time_hide_is_found_when_it_is_read(folder, tmp_path, looked):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1)
    time = path.stat().st_mtime_ns
    load_folder(folder, tmp_path)
    looked.clear()
    write_image(path, value=2)
    os.utime(path, ns=(time, time))
    loaded = load_folder(folder, tmp_path)
    assert looked == []
    split = loaded.splits[where(loaded)["cat/3.bmp"]]
    assert message(split.load_example, ids(split).index("cat/3.bmp")) == (
        f"every example must be readable, got {path} (changed since the data set was opened); use the data as it was"
    )


def test_another_limit_means_another_look(folder, tmp_path, looked):
    load_folder(folder, tmp_path)
    looked.clear()
    load_folder(folder, tmp_path, on_error="skip", max_skipped=3, on_leak="drop", background=(0, 0, 0))
    assert looked == []
    load_folder(folder, tmp_path, max_bytes=2**20)
    assert len(looked) == 40


@pytest.mark.parametrize(
    "damage",
    [
        lambda table, _: table.write_bytes(flipped(table.read_bytes(), 1000)),
        lambda table, _: table.write_bytes(table.read_bytes()[:-100]),
        lambda table, _: table.write_bytes(b""),
        lambda _, digest: digest.unlink(),
        lambda _, digest: digest.write_text("0" * 64),
        lambda _, digest: digest.write_bytes(b"\xff" + digest.read_bytes()[1:]),
    ],
    ids=["a flipped byte", "cut short", "emptied", "no digest", "another digest", "a damaged digest"],
)
def test_a_damaged_table_is_made_again(folder, tmp_path, looked, damage):
    first = load_folder(folder, tmp_path)
    place = index_of(tmp_path)
    before = place.read_bytes()
    damage(place, place.with_name(place.name + ".sha256"))
    looked.clear()
    assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
    assert len(looked) == 40
    assert place.read_bytes() == before
    looked.clear()
    load_folder(folder, tmp_path)
    assert looked == []


def test_a_table_that_cannot_be_kept_stops_nobody(folder, tmp_path, looked):
    first = load_folder(folder, tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".index").write_text("no folder")
    for _ in range(2):
        looked.clear()
        assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
        assert len(looked) == 40


@contextlib.contextmanager
def without_privileges():
    """As somebody who may not read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_could_not_be_read_is_looked_at_again():
    with tempfile.TemporaryDirectory() as place:
        tmp_path = Path(place)
        root = make_folder(tmp_path / "root")
        load_folder(root, tmp_path)  # what is imported late, before the rights are gone
        for path in (tmp_path, *tmp_path.rglob("*")):
            path.chmod(0o777)
        closed = root / "cat" / "3.png"
        os.utime(closed, ns=(1, 1))
        closed.chmod(0)
        with without_privileges():
            assert message(load_folder, root, tmp_path) == broken(1, 40, f"{closed} (Permission denied)")
        closed.chmod(0o644)
        with without_privileges():
            assert sum(load_folder(root, tmp_path).split_sizes.values()) == 40


# ------------------------------------------------------------------------------------------------- limits and skipping


def test_too_many_bytes_are_refused(folder, tmp_path):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1, side=40)
    size = path.stat().st_size
    assert f"{size:,}" == "4,854"
    named = f"{path} (4,854 bytes are more than the limit of 4,853)"
    assert message(load_folder, folder, tmp_path, max_bytes=size - 1) == broken(1, 41, named)
    assert sum(load_folder(folder, tmp_path, max_bytes=size).split_sizes.values()) == 41


def test_a_file_with_too_many_bytes_is_not_even_read(folder, tmp_path):
    path = folder / "cat" / "0.png"
    path.touch()
    os.truncate(path, 2**28)
    tracemalloc.start()
    try:
        said = message(load_folder, folder, tmp_path, max_bytes=2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said == broken(1, 40, f"{path} (268,435,456 bytes are more than the limit of 1,048,576)")
    assert peak < 2**26


def test_too_many_pixels_are_refused(folder, tmp_path):
    path = folder / "cat" / "3.png"
    write_image(path, value=1, side=7)
    named = f"{path} (7x7 pixels are more than the limit of 48)"
    assert message(load_folder, folder, tmp_path, max_pixels=48) == broken(1, 40, named)
    assert sum(load_folder(folder, tmp_path, max_pixels=49).split_sizes.values()) == 40


def test_broken_examples_can_be_left_out(folder, tmp_path):
    whole = load_folder(folder, tmp_path)
    for number in range(4):
        (folder / "cat" / f"x{number}.png").write_text("no image")
    loaded = load_folder(folder, tmp_path, on_error="skip", max_skipped=4)
    assert loaded.fingerprint == whole.fingerprint  # of what is used
    assert where(loaded) == where(whole)
    assert loaded.skipped == tuple((f"cat/x{number}.png", FORMATS) for number in range(4))
    named = "; ".join(f"cat/x{number}.png ({FORMATS})" for number in range(3))
    assert loaded.notes == (f"warning: 4 broken examples are left out: {named}; ...",)
    (folder / "cat" / "x3.png").unlink()
    assert load_folder(folder, tmp_path, on_error="skip").notes == (
        f"warning: 3 broken examples are left out: {named}",
    )


def test_only_so_many_may_be_left_out(folder, tmp_path):
    for number in range(3):
        (folder / "cat" / f"x{number}.png").write_text("no image")
    named = "; ".join(f"{folder}/cat/x{number}.png ({FORMATS})" for number in range(3))
    assert message(load_folder, folder, tmp_path, on_error="skip", max_skipped=2) == broken(
        3, 43, named, "data.max_skipped=3 would leave them all out"
    )
    assert sum(load_folder(folder, tmp_path, on_error="skip", max_skipped=3).split_sizes.values()) == 40
    assert message(load_folder, folder, tmp_path) == broken(3, 43, named)


def test_an_own_part_that_is_all_broken_is_not_cut_from_another(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "test", 2, start=100)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    assert message(load_folder, root, tmp_path, on_error="skip").startswith(
        "data.test must have at least one example, got none of "
    )


def test_uneven_classes_are_told(tmp_path):
    root = tmp_path / "root"
    for number, part in enumerate(("train", "validation", "test")):
        make_folder(root / part, 9, start=100 * number)
    for name in ("0", "1", "2", "3", "4", "5"):
        (root / "train" / "dog" / f"{name}.png").unlink()
    assert load_folder(root, tmp_path).notes == (
        "classes are uneven: 3 of dog to 9 of cat in train; data.class_weights=true weighs the loss, "
        "data.balanced=true draws them equally often",
    )
    (root / "train" / "cat" / "0.png").unlink()
    loaded = load_folder(root, tmp_path)
    assert loaded.notes == ()
    assert loaded.class_counts == {"train": [8, 3], "validation": [9, 9], "test": [9, 9]}


def test_a_file_changed_after_opening_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    path = folder / split.example_id(2)
    write_image(path, value=4321)
    said = "({}); use the data as it was"
    assert message(split.load_example, 2) == (
        f"every example must be readable, got {path} " + said.format("changed since the data set was opened")
    )
    path.unlink()
    assert message(lambda: pixel_cache.images(split)) == (
        f"every example must be readable, got {path} " + said.format("No such file or directory")
    )


def test_an_empty_split_is_refused(tmp_path):
    root = make_folder(tmp_path / "root", 2)
    assert message(load_folder, root, tmp_path, validation_fraction=0.01) == (
        "data.validation must have at least one example, got none of 4; use more images, a larger fraction, "
        "or a folder validation/ of your own above the classes"
    )


def test_cores():
    assert 1 <= cores() <= (os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
@needs_real_data
def test_fashion_mnist_from_files(tmp_path):
    loaded = train.data.load(
        "fashion_mnist", str(tmp_path), image_size=28, channels=1, manual_dir=f"{REAL}/fashion_mnist"
    )
    assert loaded.split_sizes == {"train": 54155, "validation": 5845, "test": 10000}
    assert loaded.leak_counts == {"shared": 0, "conflicts": 0, "alike": 0}
    assert loaded.classes[9] == "Ankle boot"
    assert loaded.fingerprint == "8b2ca6d57de2f532bb526b57a68556b7d4fedda77cf54de24c697c2e964cb187"
    assert not (set(loaded.train.sha256.tolist()) & set(loaded.validation.sha256.tolist()))
    assert np.bincount(loaded.test.labels).tolist() == [1000] * 10
    assert not (tmp_path / "downloads" / "fashion_mnist" / "extracted").exists()


@pytest.mark.real_data
@needs_real_data
def test_sign_digits(tmp_path):
    loaded = train.data.load("folder", str(tmp_path), image_size=32, channels=3, root=f"{REAL}/sign_digits")
    assert sum(loaded.split_sizes.values()) == 2062
    assert loaded.leak_counts == {"shared": 0, "conflicts": 0, "alike": 0}
    assert loaded.classes == tuple("0123456789")
    names = [(split, row) for split in loaded.splits.values() for row in range(len(split))]
    turned = [(split, row) for split, row in names if orientation(split, row) == 6]
    assert len(turned) == 3
    for split, row in turned:
        data = split.read([row])[0]
        stored = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode.decode(data, 3), np.rot90(stored, -1))


def orientation(split, row):
    return Image.open(split.store.root / split.example_id(row)).getexif().get(decode.ORIENTATION, 1)
