"""The data room: splits, fingerprints, decoding, streams, messages."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train.data
from train.data import augment, dataset, decode, fingerprint, order, pipeline, prepared
from train.runtime import cores

REAL = os.environ.get("INCEPTION_REAL_DATA")
needs_real_data = pytest.mark.skipif(
    not (REAL and Path(REAL).is_dir()), reason="INCEPTION_REAL_DATA names no folder with data sets"
)

DIGITS_FINGERPRINT = "6a1d4e09a251d9ff83eaa56f42a8ade8ce03f0fd57ed4f120e2c6fb0a8900450"


# ------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder in which two processes prepared digits at the same time, over a killed one's leftovers."""
    place = tmp_path_factory.mktemp("data")
    (place / "digits" / "incomplete.abc_1.0.0").mkdir(parents=True)
    code = "import sys, train.data as d; s = d.load('digits', sys.argv[1], 8, 1); print(s.fingerprint, s.counts)"
    command = [sys.executable, "-c", code, str(place)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (place / "said.json").write_text(json.dumps([out for out, _ in said]))
    return place


@pytest.fixture(scope="module")
def digits_8(data_dir):
    return train.data.load("digits", str(data_dir), 8, 1)


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
    return train.data.load("folder", str(tmp_path / "data"), 4, 3, root=str(root), **options)


def where(loaded):
    """id -> split."""
    return {name: split.name for split in (loaded.train, loaded.validation, loaded.test) for name in split.ids}


def message(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ------------------------------------------------------------------------------------------- importing and checking


def test_importing_and_checking_is_cheap(folder):
    code = (
        "import sys, time; start = time.perf_counter(); import train.data as d; spent = time.perf_counter() - start;"
        "d.check('folder', root=sys.argv[1]); d.check('digits');"
        "print(spent, sorted({'numpy', 'PIL', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    spent, heavy = said.split(maxsplit=1)
    assert float(spent) < 0.25  # 0.01 s on an idle machine
    assert heavy.strip() == "[]"


EXPECTED_ROOT = "data.root must be a folder with one sub-folder of images per class"
FILES = (
    "data.manual_dir must be a folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
    "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
)


def test_unknown_name():
    assert message(train.data.check, "digit") == (
        "data must be one of digits, mnist, fashion_mnist, cifar10, imagenette, tf_flowers, imagenet2012, folder, "
        "got digit; use data=digits"
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
    arguments = {"image_size": 8, "channels": 1} | options
    assert message(train.data.load, "digits", str(data_dir), **arguments) == said


# --------------------------------------------------------------------------------------------------- prepared sets


def test_two_processes_prepare_at_once_and_sweep_up(data_dir):
    first, second = json.loads((data_dir / "said.json").read_text())
    assert first == second
    assert first.split()[0] == DIGITS_FINGERPRINT
    assert sorted(path.name for path in (data_dir / "digits").iterdir()) == ["1.0.0"]


def test_digits(digits_8):
    from sklearn.datasets import load_digits

    assert digits_8.name == "digits"
    assert digits_8.classes == tuple("0123456789")
    assert digits_8.counts == {"train": 1281, "validation": 176, "test": 340}
    assert sum(digits_8.counts.values()) == 1797
    assert digits_8.fingerprint == DIGITS_FINGERPRINT
    bundled = load_digits()
    for split in (digits_8.train, digits_8.validation, digits_8.test):
        place = int(split.ids[5].removeprefix("train/"))
        assert split.labels.dtype == np.int32
        assert split.labels[5] == bundled.target[place]
        expected = np.rint(bundled.images[place] * 255 / 16)
        np.testing.assert_array_equal(split.example(5)[..., 0], expected)


def test_splits_are_disjoint_by_content(digits_8):
    contents = [set(split.sha256.tolist()) for split in (digits_8.train, digits_8.validation, digits_8.test)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not contents[one] & contents[other]


def test_second_load_reads_no_example(data_dir, digits_8, monkeypatch):
    def refuse(_):
        raise AssertionError("read again")

    monkeypatch.setattr(prepared, "_read_all", refuse)
    again = train.data.load("digits", str(data_dir), 8, 1)
    assert again.fingerprint == digits_8.fingerprint
    shard = next((data_dir / "digits" / "1.0.0").glob("*array_record*"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        train.data.load("digits", str(data_dir), 8, 1)


def test_damaged_index_and_damaged_shard(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    train.data.load("digits", str(copy), 8, 1)
    index = max((copy / ".index").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    index.write_bytes(index.read_bytes()[:-100])
    assert train.data.load("digits", str(copy), 8, 1).fingerprint == DIGITS_FINGERPRINT
    shard = next((copy / "digits" / "1.0.0").glob("*array_record*"))
    damaged = bytearray(shard.read_bytes())
    damaged[70_000] ^= 255
    shard.write_bytes(damaged)
    said = message(train.data.load, "digits", str(copy), 8, 1)
    assert said.startswith(f"data=digits must be readable in {copy}/digits/1.0.0, got: Corrupted")
    assert said.endswith("use a new copy: remove that folder and it is prepared again")


def test_no_network(tmp_path, monkeypatch):
    def unreachable(request, timeout):
        raise OSError(f"asked {request.get_method()} with {timeout} s")

    monkeypatch.setattr(prepared.urllib.request, "urlopen", unreachable)
    assert message(train.data.load, "mnist", str(tmp_path), 28, 1) == (
        f"{FILES} where data=mnist can't be downloaded, got none "
        "(storage.googleapis.com is out of reach: asked HEAD with 5 s); "
        "use data.manual_dir=PATH with the files fetched from https://storage.googleapis.com/cvdf-datasets/mnist"
    )
    assert not list(tmp_path.glob("mnist*"))


def test_wrong_files_by_hand(tmp_path):
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    for name in train.data.SOURCES["mnist"].files:
        (by_hand / name).write_bytes(b"something else")
    said = message(train.data.load, "mnist", str(tmp_path), 28, 1, manual_dir=str(by_hand))
    assert said.startswith(f"{FILES} where data=mnist can't be downloaded, got {by_hand} (Artifact ")
    assert said.endswith("has wrong checksum); use the original files")
    assert not list((tmp_path / "mnist").iterdir())


def test_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    said = message(train.data.load, "mnist", str(tmp_path), 28, 1)
    assert said == (
        f"data=mnist must have about 45 MiB of free space in {tmp_path}, got 5 MiB; "
        "use a disk with more room or free some"
    )


def test_disk_fills_up_while_preparing(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepared, "_download_and_prepare", fill)
    said = message(train.data.load, "digits", str(tmp_path), 8, 1)
    assert said.startswith(f"data=digits must have about 1 MiB of free space in {tmp_path}, got ")


def test_png_of_the_builder_is_read_by_others():
    from train.data.digits.digits_dataset_builder import png

    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


# ------------------------------------------------------------------------------------------------------ own folders


def test_folder(folder, tmp_path):
    loaded = load_folder(folder, tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert sum(loaded.counts.values()) == 40
    assert set(where(loaded)) == {f"{name}/{number}.png" for name in ("cat", "dog") for number in range(20)}
    for split in (loaded.train, loaded.validation, loaded.test):
        assert [loaded.classes[label] for label in split.labels] == [name.split("/")[0] for name in split.ids]
        data = (folder / split.ids[0]).read_bytes()
        assert split.sha256[0] == fingerprint.sha256(data)


def by_index(contents):
    """The rule that must not be: an example's place by its number."""
    return (np.arange(len(contents)) * 0.618) % 1


@pytest.mark.parametrize(("rule", "stays"), [(dataset.positions, True), (by_index, False)])
def test_adding_a_file_moves_no_other(folder, tmp_path, monkeypatch, rule, stays):
    monkeypatch.setattr(dataset, "positions", rule)
    before = load_folder(folder, tmp_path)
    write_image(folder / "cat" / "00_first.png", value=77)
    after = load_folder(folder, tmp_path)
    assert sum(after.counts.values()) == 41
    assert (where(before).items() <= where(after).items()) == stays
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(("rule", "together"), [(dataset.positions, True), (by_index, False)])
def test_copies_stay_together(folder, tmp_path, monkeypatch, rule, together):
    monkeypatch.setattr(dataset, "positions", rule)
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


def test_fingerprint_does_not_depend_on_the_order():
    lines = [("train", "a", b"0", 1), ("test", "b", b"1", 0)]
    assert fingerprint.fingerprint(lines) == fingerprint.fingerprint(lines[::-1])


def test_parts_above_the_classes(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "val", 4, start=100)
    loaded = load_folder(root, tmp_path)
    found = where(loaded)
    assert {name.split("/")[0] for name, split in found.items() if split == "validation"} == {"val"}
    assert loaded.counts["validation"] == 8
    assert loaded.counts["train"] + loaded.counts["test"] == 40
    make_folder(root / "test", 2, start=200)
    assert load_folder(root, tmp_path).counts == {"train": 40, "validation": 8, "test": 4}
    write_image(root / "test" / "bird" / "1.png")
    assert message(load_folder, root, tmp_path) == (
        f"data.root must have the classes of train in every part, got {root / 'test' / 'bird'}; use those"
    )


def test_an_image_in_two_parts_is_named(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "val", 4, start=100)
    shutil.copy(root / "train" / "cat" / "3.png", root / "val" / "cat" / "again.png")
    said = message(load_folder, root, tmp_path)
    assert re.fullmatch(
        r"data\.root must hold every image in one part only, got 1 of (test|validation) in (train|validation) as well "
        r"\(first: (val/cat/again|train/cat/3)\.png\); use each image once",
        said,
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
    root = "data.root must hold only readable images, got"
    formats = "no image of a known format (JPEG, PNG, GIF, BMP, WEBP)"
    (folder / "cat" / "labels.csv").write_text("no image")
    assert message(load_folder, folder, tmp_path) == (
        f"{root} 1 broken: {folder}/cat/labels.csv ({formats}); use data.root without them"
    )
    half = (folder / "cat" / "3.png").read_bytes()[:-40]
    (folder / "cat" / "3.png").write_bytes(half)
    (folder / "dog" / "empty.png").touch()
    said = message(load_folder, folder, tmp_path)
    assert said.startswith(f"{root} 3 broken: {folder}/cat/3.png (")
    assert f"{folder}/dog/empty.png ({formats})" in said
    for number in range(12):
        (folder / "dog" / f"z{number}").touch()
    said = message(load_folder, folder, tmp_path)
    assert said.startswith(f"{root} 15 broken: ")
    assert said.count(" (") - said.count(" (JPEG") == 10
    assert said.endswith(" and 5 more; use data.root without them")


def test_stray_files_folders_and_pipes_are_named(folder, tmp_path):
    (folder / "README").touch()
    assert message(load_folder, folder, tmp_path) == (
        f"data.root must hold only folders beside each other, got the file {folder / 'README'}; use a class folder"
    )
    (folder / "README").unlink()
    os.mkfifo(folder / "cat" / "pipe.jpg")
    files = f"data.root must have only images in its class folders, got {folder}/cat"
    assert message(load_folder, folder, tmp_path) == f"{files}/pipe.jpg; use files, moved up"
    (folder / "cat" / "pipe.jpg").unlink()
    (folder / "cat" / "x.jpg").mkdir()
    assert message(load_folder, folder, tmp_path) == f"{files}/x.jpg; use files, moved up"


def test_only_changed_files_are_looked_at(folder, tmp_path, monkeypatch):
    from train.data import folder as room

    looked, look = [], room._look
    monkeypatch.setattr(room, "_look", lambda path: looked.append(path.name) or look(path))
    load_folder(folder, tmp_path)
    assert len(looked) == 40
    looked.clear()
    load_folder(folder, tmp_path)
    assert looked == []
    write_image(folder / "cat" / "3.png", value=99, side=7)
    load_folder(folder, tmp_path)
    assert looked == ["3.png"]


def test_a_file_changed_after_opening_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    path = folder / split.ids[2]
    write_image(path, value=4321)
    said = "({}); use the data as it was"
    assert message(split.example, 2) == (
        f"every example must be readable, got {path} " + said.format("changed since the data set was opened")
    )
    path.unlink()
    assert message(lambda: split.images) == (
        f"every example must be readable, got {path} " + said.format(f"[Errno 2] No such file or directory: '{path}'")
    )


def test_an_empty_split_is_refused(tmp_path):
    root = make_folder(tmp_path / "root", 2)
    assert message(load_folder, root, tmp_path, validation_fraction=0.01) == (
        "data.validation must have at least one example, got none of 4; use more images, a larger fraction, "
        "or a folder validation/ of your own above the classes"
    )


# --------------------------------------------------------------------------------------------------------- decoding


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def luma(pixels):
    weights = np.array([19595, 38470, 7471])
    return ((pixels.astype(np.int64) @ weights + 2**15) >> 16).astype(np.uint8)[..., None]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_colour_and_grey_are_exact(kind):
    pixels = noise(5, 7, 3)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(pixels), kind, **options)
    np.testing.assert_array_equal(decode.decode(data, 3), pixels)
    np.testing.assert_array_equal(decode.decode(data, 1), luma(pixels))


def test_grey_becomes_colour_by_repetition():
    pixels = noise(5, 7, 1)
    data = encode(Image.fromarray(pixels[..., 0]))
    np.testing.assert_array_equal(decode.decode(data, 1), pixels)
    np.testing.assert_array_equal(decode.decode(data, 3), pixels.repeat(3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),  # shown after a quarter turn clockwise
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=100, subsampling=0, exif=exif)
    pixels = decode.decode(data, 3).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels - upright).max() <= 3


def test_broken_exif_counts_as_upright():
    data = encode(Image.fromarray(noise(8, 8, 3)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode.decode(data, 3).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composed_onto_white(mode):
    channels = len(mode)
    pixels = noise(6, 6, channels)
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    decoded = decode.decode(encode(Image.fromarray(pixels)), 3).astype(int)
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (6, 6, 3))
    assert (decoded[0] == 255).all()
    np.testing.assert_array_equal(decoded[1], np.broadcast_to(pixels[1, :, :-1], (6, 3)))
    assert np.abs(decoded - expected).max() <= 1


def test_palette_with_and_without_transparency():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.frombytes("P", (2, 2), indices.tobytes())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]])
    np.testing.assert_array_equal(decode.decode(encode(image), 3), expected)
    np.testing.assert_array_equal(decode.decode(encode(image, "GIF"), 3), expected)
    expected[0, 1] = expected[1, 1] = 255
    np.testing.assert_array_equal(decode.decode(encode(image, transparency=1), 3), expected)


def test_cmyk_is_exact():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0] = 255  # full cyan above, full black below
    ink[8:, :, 3] = 255
    data = encode(Image.frombytes("CMYK", (16, 16), ink.tobytes()), "JPEG", quality=100, subsampling=0)
    pixels = decode.decode(data, 3).astype(int)
    assert np.abs(pixels[:8] - [0, 255, 255]).max() <= 2
    assert np.abs(pixels[8:]).max() <= 2


def png16(samples, colour_type, *more, size=None):
    """16-bit PNG, which Pillow writes for grey only; size: (width, height) that it claims to have."""
    width, height = size or samples.shape[1::-1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_16_bit_samples_keep_their_high_byte():
    grey = np.array([[0, 255, 256], [257 * 100, 65279, 65535]], np.uint16)
    expected = (grey >> 8).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode.decode(png16(grey, 0), 1), expected)
    np.testing.assert_array_equal(decode.decode(png16(grey, 0), 3), expected.repeat(3, axis=2))
    colour = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3), dtype=np.uint16)
    np.testing.assert_array_equal(decode.decode(png16(colour, 2), 3), colour >> 8)
    clear = png16(grey, 0, (b"tRNS", struct.pack(">H", 256)))  # the sample 256 is transparent, 255 is not
    np.testing.assert_array_equal(decode.decode(clear, 1)[0, :, 0], [0, 0, 255])


def test_first_frame_of_a_gif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode(data, 3), np.broadcast_to([255, 0, 0], (4, 4, 3)))


def test_broken_bytes_have_a_reason():
    whole = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    assert message(decode.decode, whole[: len(whole) // 2], 3).startswith("image file is truncated")
    assert message(decode.decode, b"", 3) == "no image of a known format (JPEG, PNG, GIF, BMP, WEBP)"
    bomb = png16(np.zeros((1, 1), np.uint16), 0, size=(10_000, 9_000))
    with pytest.warns(Image.DecompressionBombWarning):
        assert message(decode.decode, bomb, 3) == "10000x9000 pixels are more than the limit of 89478485"


def triangle(length, size):
    """Weights [size, length] of the antialiased bilinear filter, in float64, written down from its definition."""
    scale = length / size
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(1 - np.abs((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (28, 32), (100, 32), (33, 7), (5, 1)])
def test_resize_is_the_filter_rounded_once(side, size):
    pixels = noise(side, side, 1, seed=side)
    exact = triangle(side, size) @ pixels[..., 0].astype(float) @ triangle(side, size).T
    assert np.abs(decode.resize(pixels, size)[..., 0] - exact).max() <= 0.5 + 1e-3


def test_resize_brings_the_short_side_and_takes_the_centre():
    pixels = noise(8, 16, 1)
    whole = triangle(8, 4) @ pixels[..., 0].astype(float) @ triangle(16, 8).T
    assert np.abs(decode.resize(pixels, 4)[..., 0] - whole[:, 2:6]).max() <= 0.5 + 1e-3
    turned = decode.resize(pixels.swapaxes(0, 1), 4)[..., 0]
    assert np.abs(turned - whole.T[2:6]).max() <= 0.5 + 1e-3
    square = noise(6, 6, 3)
    assert decode.resize(square, 6) is square


# ------------------------------------------------------------------------------------------------------------ order


def test_order_covers_every_index_once_and_differs_by_epoch_and_seed():
    first = order.permutation(0, 0, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(first, order.permutation(0, 0, 1000))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != order.permutation(seed, epoch, 1000)).mean() > 0.99


def test_draws_are_pinned():
    np.testing.assert_array_equal(order.permutation(0, 0, 8), [5, 1, 6, 7, 0, 2, 4, 3])
    wide, narrow = order.uniform_rows(3, "augment", 2, 10, 3), order.uniform_rows(3, "augment", 2, 10, 2)
    np.testing.assert_array_equal(wide[:, :2], narrow)
    assert wide.dtype == np.float32
    assert wide.min() >= 0
    assert wide.max() < 1
    assert (wide != order.uniform_rows(3, "other", 2, 10, 3)).all()


# ---------------------------------------------------------------------------------------------------------- streams


def take(batches):
    pairs = [(images.numpy(), labels.numpy()) for images, labels in batches]
    return [images for images, _ in pairs], [labels for _, labels in pairs]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def stream(digits_8):
    def batches(**options):
        defaults = {"batch_size": 100, "seed": 1, "epoch": 0, "num_classes": 10, "augment": augment.AUGMENTS["crop"]}
        return take(pipeline.train_batches(digits_8.train, **(defaults | options)))

    return batches


def test_an_epoch(stream, digits_8):
    images, labels = stream(augment=augment.none)
    assert [batch.shape for batch in images] == [(100, 8, 8, 1)] * 12
    assert images[0].dtype == np.uint8
    assert labels[0].dtype == np.float32
    places = order.permutation(1, 0, 1281)[:1200]
    expected = np.stack([digits_8.train.example(place) for place in places])
    np.testing.assert_array_equal(np.concatenate(images), expected)
    np.testing.assert_array_equal(np.concatenate(labels), np.eye(10)[digits_8.train.labels[places]])


def test_a_stream_is_a_function_of_seed_and_epoch(stream):
    images, labels = stream()
    assert same(images, stream()[0])
    assert same(images, stream(threads=1)[0])
    for other in ({"epoch": 1}, {"seed": 2}):
        assert not same(images, stream(**other)[0])
    assert not same(labels, stream(epoch=1)[1])


def test_resumed_at_a_batch_it_is_the_tail(stream):
    images, labels = stream()
    tail_images, tail_labels = stream(first_batch=9)
    assert same(images[9:], tail_images)
    assert same(labels[9:], tail_labels)
    assert not same(images[8:11], tail_images)
    assert stream(first_batch=12) == ([], [])


def test_memory_and_store_give_the_same_bits(stream, digits_8):
    for options in ({}, {"first_batch": 10}):
        from_memory, from_store = stream(**options), stream(ram_limit=0, **options)
        assert same(from_memory[0], from_store[0])
        assert same(from_memory[1], from_store[1])
    evaluated = [
        take(pipeline.eval_batches(digits_8.test, batch_size=64, num_classes=10, **options))
        for options in ({}, {"ram_limit": 0})
    ]
    assert same(evaluated[0][0], evaluated[1][0])


def test_resuming_decodes_nothing_of_what_is_done(folder, tmp_path, monkeypatch):
    split = load_folder(folder, tmp_path).train
    decoded, read = [], dataset.decode_resized
    monkeypatch.setattr(dataset, "decode_resized", lambda *arguments: decoded.append(1) or read(*arguments))
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "num_classes": 2, "ram_limit": 0}
    steps = pipeline.steps_per_epoch(split, 4)
    images, _ = take(pipeline.train_batches(split, first_batch=steps - 2, **options))
    assert len(images) == 2
    assert len(decoded) == 8


def test_deterministic_mode_leaves_the_bits_alone(data_dir, stream):
    code = (
        "import sys, hashlib, tensorflow as tf, train.data as d; from train.data import augment, pipeline;"
        "tf.config.experimental.enable_op_determinism(); tf.keras.utils.set_random_seed(0);"
        "split = d.load('digits', sys.argv[1], 8, 1).train;"
        "options = dict(batch_size=100, seed=1, epoch=0, num_classes=10, augment=augment.crop);"
        "[print(hashlib.sha256(b''.join(x.numpy().tobytes() for x, _ in pipeline.train_batches(split, ram_limit=limit,"
        " **options))).hexdigest()) for limit in (0, 2**30)]"
    )
    expected = hashlib.sha256(b"".join(batch.tobytes() for batch in stream()[0])).hexdigest()
    command = [sys.executable, "-c", code, str(data_dir)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout.split()
    assert said == [expected, expected]


def test_evaluation_sees_everything_once_in_order(digits_8):
    split = digits_8.test
    images, labels = take(pipeline.eval_batches(split, batch_size=64, num_classes=10))
    assert [len(batch) for batch in images] == [64] * 5 + [20]
    np.testing.assert_array_equal(np.concatenate(images), split.images.numpy())
    np.testing.assert_array_equal(np.concatenate(labels).argmax(axis=1), split.labels)


def test_batch_messages(digits_8):
    assert pipeline.steps_per_epoch(digits_8.train, 64) == 20
    said = "batch_size must be in 1..176, the size of the validation split, got {}; use batch_size=32"
    for wrong in (177, 0):
        assert message(pipeline.steps_per_epoch, digits_8.validation, wrong) == said.format(wrong)
    options = {"batch_size": 100, "seed": 0, "epoch": 0, "num_classes": 10}
    assert message(pipeline.train_batches, digits_8.train, first_batch=13, **options) == (
        "first_batch must be in 0..12, got 13; use the next batch of the epoch"
    )
    assert message(pipeline.eval_batches, digits_8.test, batch_size=0, num_classes=10) == (
        "batch_size must be at least 1, got 0; use batch_size=32"
    )


def test_a_broken_file_in_the_stream_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    (folder / split.ids[0]).write_bytes(b"gone")
    batches = pipeline.eval_batches(split, batch_size=4, num_classes=2, ram_limit=0)
    with pytest.raises(Exception, match="every example must be readable") as caught:
        list(batches)
    assert pipeline.example_error(caught.value) == (
        f"every example must be readable, got {folder / split.ids[0]} (changed since the data set was opened); "
        "use the data as it was"
    )
    assert pipeline.example_error(RuntimeError("something else")) is None


# ------------------------------------------------------------------------------------------------------ augmentation


def shifted(image, down, right, mirror):
    """The definition, for one image: `down` and `right` are what the picture moves by."""
    border = 2
    padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="reflect")
    if mirror:
        padded = padded[:, ::-1]
    top, left = border - down, border - right
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


CENTRE = 0.5
LEAST, MOST = 0.0, 0.999


@pytest.mark.parametrize(
    ("draw", "moved"),
    [
        ((CENTRE, CENTRE, MOST), (0, 0, False)),
        ((LEAST, CENTRE, MOST), (2, 0, False)),
        ((MOST, CENTRE, MOST), (-2, 0, False)),
        ((CENTRE, LEAST, MOST), (0, 2, False)),
        ((MOST, LEAST, MOST), (-2, 2, False)),
        ((CENTRE, CENTRE, LEAST), (0, 0, True)),
    ],
)
def test_flip_crop_moves_pixels(draw, moved):
    image = noise(16, 16, 3)
    draws = np.array([draw], np.float32)
    np.testing.assert_array_equal(augment.flip_crop(image[None], draws)[0], shifted(image, *moved))
    if not moved[2]:
        np.testing.assert_array_equal(augment.crop(image[None], draws)[0], shifted(image, *moved))


@pytest.mark.parametrize("name", list(augment.AUGMENTS))
def test_augmentations_are_the_same_eagerly_and_in_a_map(name):
    import tensorflow as tf

    images = np.stack([noise(16, 16, 3, seed) for seed in range(32)])
    draws = order.uniform_rows(0, "augment", 0, 32, augment.DRAWS)
    eager = augment.AUGMENTS[name](tf.constant(images), tf.constant(draws))
    mapped = tf.data.Dataset.from_tensors((images, draws)).map(augment.AUGMENTS[name])
    np.testing.assert_array_equal(eager, next(iter(mapped)))
    assert eager.dtype == tf.uint8
    alone = [augment.AUGMENTS[name](images[i : i + 1], draws[i : i + 1])[0] for i in range(32)]
    np.testing.assert_array_equal(eager, np.stack(alone))  # whatever else is in the batch
    assert (eager.numpy() != images).any() == (name != "none")


def test_shifts_and_flips_are_even():
    images = np.zeros((4000, 16, 16, 1), np.uint8)
    images[:, 8, 8] = 255  # where it lands tells the shift
    draws = order.uniform_rows(0, "augment", 0, 4000, augment.DRAWS)
    moved = augment.crop(images, draws).numpy()[..., 0]
    counts = (moved == 255).sum(axis=0)
    assert (counts[6:11, 6:11] > 100).all()
    assert counts[6:11, 6:11].sum() == counts.sum() == 4000
    mirrored = augment.flip_crop(images, draws, pad=0).numpy()[:, 8, 7, 0] == 255
    assert 0.47 < mirrored.mean() < 0.53


def test_pad_message():
    assert message(augment.crop, np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 3), np.float32), pad=0.6) == (
        "pad must be a fraction of the side in 0..0.5, got 0.6; use augment.pad=0.125"
    )


def test_cores():
    assert 1 <= cores() <= (os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
@needs_real_data
def test_fashion_mnist_from_files(tmp_path):
    loaded = train.data.load("fashion_mnist", str(tmp_path), 28, 1, manual_dir=f"{REAL}/fashion_mnist")
    assert loaded.counts == {"train": 54155, "validation": 5845, "test": 10000}
    assert loaded.classes[9] == "Ankle boot"
    assert loaded.fingerprint == "78182c8f3fb404fded1691edf79676a03c6675e494b5c30ffc8f558e6dc0efe6"
    assert not (set(loaded.train.sha256.tolist()) & set(loaded.validation.sha256.tolist()))
    assert np.bincount(loaded.test.labels).tolist() == [1000] * 10
    assert not (tmp_path / "downloads" / "fashion_mnist" / "extracted").exists()


@pytest.mark.real_data
@needs_real_data
def test_sign_digits(tmp_path):
    loaded = train.data.load("folder", str(tmp_path), 32, 3, root=f"{REAL}/sign_digits")
    assert sum(loaded.counts.values()) == 2062
    assert loaded.classes == tuple("0123456789")
    splits = (loaded.train, loaded.validation, loaded.test)
    names = [(split, row) for split in splits for row in range(len(split))]
    turned = [(split, row) for split, row in names if orientation(split, row) == 6]
    assert len(turned) == 3
    for split, row in turned:
        data = split.store.read(split.rows[row])
        stored = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode.decode(data, 3), np.rot90(stored, -1))


def orientation(split, row):
    return Image.open(split.store.root / split.ids[row]).getexif().get(decode.ORIENTATION, 1)
