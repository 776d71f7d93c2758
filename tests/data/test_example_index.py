"""The index of examples: each file is inspected once, and again after it has changed."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from support.commands import message
from support.image_folders import (
    FORMATS,
    example_ids,
    flipped,
    load_folder,
    make_folder,
    splits_by_id,
    unreadable_message,
    write_image,
)
from train.data import decode, pixel_cache


def index_path(tmp_path):
    [index] = (tmp_path / "data" / ".index").glob("folder-*.arrow")
    return index


def test_index_has_one_row_for_each_file(folder, tmp_path):
    import pyarrow.feather

    write_image(folder / "cat" / "photo.jpg", value=1, side=70, quality=95)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    write_image(folder / "cat" / "turned.jpg", value=2, side=70, exif=turned)
    (folder / "dog" / "notes.txt").write_text("no image")
    load_folder(folder, tmp_path, on_error="skip")
    index = index_path(tmp_path)
    assert index.with_name(index.name + ".sha256").read_text() == hashlib.sha256(index.read_bytes()).hexdigest()
    rows = {row["path"]: row for row in pyarrow.feather.read_table(index).to_pylist()}
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


def test_only_changed_files_are_inspected(folder, tmp_path, inspected):
    load_folder(folder, tmp_path)
    assert len(inspected) == 40
    inspected.clear()
    load_folder(folder, tmp_path)
    assert inspected == []
    changed = folder / "cat" / "3.png"
    write_image(changed, value=99, side=7)
    load_folder(folder, tmp_path)
    assert inspected == [changed.read_bytes()]
    inspected.clear()
    write_image(folder / "dog" / "new.png", value=98)
    assert sum(load_folder(folder, tmp_path).split_sizes.values()) == 41
    assert inspected == [(folder / "dog" / "new.png").read_bytes()]
    inspected.clear()
    (folder / "cat" / "0.png").unlink()
    assert "cat/0.png" not in splits_by_id(load_folder(folder, tmp_path))
    assert inspected == []


def test_broken_files_are_inspected_after_every_change(folder, tmp_path, inspected):
    (folder / "cat" / "notes.txt").write_text("no image")
    load_folder(folder, tmp_path, on_error="skip")
    inspected.clear()
    (folder / "dog" / "0.png").unlink()
    load_folder(folder, tmp_path, on_error="skip")
    assert inspected == [b"no image"]


def test_changed_size_or_time_causes_inspection(folder, tmp_path, inspected):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1)
    first = load_folder(folder, tmp_path)
    time = path.stat().st_mtime_ns
    inspected.clear()
    os.utime(path, ns=(time, time + 1))
    assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
    assert inspected == [path.read_bytes()]
    inspected.clear()
    write_image(path, value=1, side=7)
    os.utime(path, ns=(time, time + 1))
    assert load_folder(folder, tmp_path).fingerprint != first.fingerprint
    assert inspected == [path.read_bytes()]


def test_change_with_the_same_size_and_time_is_found_on_reading(folder, tmp_path, inspected):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1)
    time = path.stat().st_mtime_ns
    load_folder(folder, tmp_path)
    inspected.clear()
    write_image(path, value=2)
    os.utime(path, ns=(time, time))
    loaded = load_folder(folder, tmp_path)
    assert inspected == []
    split = loaded.splits[splits_by_id(loaded)["cat/3.bmp"]]
    assert message(split.load_example, example_ids(split).index("cat/3.bmp")) == (
        f"cannot read {path}: changed since it was indexed; restore the file"
    )


def test_changed_limit_causes_inspection(folder, tmp_path, inspected):
    load_folder(folder, tmp_path)
    inspected.clear()
    load_folder(folder, tmp_path, on_error="skip", max_skipped=3, on_leak="drop", background=(0, 0, 0))
    assert inspected == []
    load_folder(folder, tmp_path, max_bytes=2**20)
    assert len(inspected) == 40


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
def test_damaged_index_is_rebuilt(folder, tmp_path, inspected, damage):
    first = load_folder(folder, tmp_path)
    index = index_path(tmp_path)
    before = index.read_bytes()
    damage(index, index.with_name(index.name + ".sha256"))
    inspected.clear()
    assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
    assert len(inspected) == 40
    assert index.read_bytes() == before
    inspected.clear()
    load_folder(folder, tmp_path)
    assert inspected == []


def test_index_that_cannot_be_stored_does_not_stop_loading(folder, tmp_path, inspected):
    first = load_folder(folder, tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".index").write_text("no folder")
    for _ in range(2):
        inspected.clear()
        assert load_folder(folder, tmp_path).fingerprint == first.fingerprint
        assert len(inspected) == 40


@contextlib.contextmanager
def without_privileges():
    """Runs without the privileges of root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_unreadable_file_is_inspected_again():
    with tempfile.TemporaryDirectory() as temporary:
        tmp_path = Path(temporary)
        root = make_folder(tmp_path / "root")
        load_folder(root, tmp_path)  # what is imported late, before the rights are gone
        for path in (tmp_path, *tmp_path.rglob("*")):
            path.chmod(0o777)
        closed = root / "cat" / "3.png"
        os.utime(closed, ns=(1, 1))
        closed.chmod(0)
        with without_privileges():
            assert message(load_folder, root, tmp_path) == unreadable_message(1, 40, f"{closed} (Permission denied)")
        closed.chmod(0o644)
        with without_privileges():
            assert sum(load_folder(root, tmp_path).split_sizes.values()) == 40


def test_file_changed_after_opening_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    path = folder / split.example_id(2)
    write_image(path, value=4321)
    template = "{}; restore the file"
    assert message(split.load_example, 2) == (f"cannot read {path}: " + template.format("changed since it was indexed"))
    path.unlink()
    assert message(lambda: pixel_cache.images(split)) == (
        f"cannot read {path}: " + template.format("No such file or directory")
    )
