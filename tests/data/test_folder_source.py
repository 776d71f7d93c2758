"""Folders of images: classes, splits above them, links, stray files and names."""

import hashlib
import os
import shutil

from support.commands import message
from support.image_folders import (
    FORMATS,
    example_ids,
    load_folder,
    make_folder,
    splits_by_id,
    unreadable_message,
    write_image,
)
from train.data.sources import folder as folder_source


def test_folder_has_splits_and_classes(folder, tmp_path):
    loaded = load_folder(folder, tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert sum(loaded.split_sizes.values()) == 40
    assert set(splits_by_id(loaded)) == {f"{name}/{number}.png" for name in ("cat", "dog") for number in range(20)}
    for split in loaded.splits.values():
        assert [loaded.classes[label] for label in split.labels] == [name.split("/")[0] for name in example_ids(split)]
        data = (folder / split.example_id(0)).read_bytes()
        assert split.sha256[0] == hashlib.sha256(data).hexdigest().encode()
        assert split.read([0]) == [data]


def test_split_folders_above_the_classes_are_used(tmp_path):
    root = tmp_path / "root"
    make_folder(root / "train", 20)
    make_folder(root / "val", 4, start=100)
    loaded = load_folder(root, tmp_path)
    found = splits_by_id(loaded)
    assert {name.split("/")[0] for name, split in found.items() if split == "validation"} == {"val"}
    assert loaded.split_sizes["validation"] == 8
    assert loaded.split_sizes["train"] + loaded.split_sizes["test"] == 40
    make_folder(root / "test", 2, start=200)
    assert load_folder(root, tmp_path).split_sizes == {"train": 40, "validation": 8, "test": 4}
    write_image(root / "test" / "bird" / "1.png")
    assert message(load_folder, root, tmp_path) == (
        f"class folder {root / 'test' / 'bird'} has no counterpart in train; rename or remove it"
    )


def test_class_may_be_called_train(tmp_path):
    root = make_folder(tmp_path / "root", classes=("bus", "train"))
    assert load_folder(root, tmp_path).classes == ("bus", "train")


def test_file_type_follows_the_content_and_hidden_files_are_ignored(folder, tmp_path):
    for name, kind in (("a.JPG", "JPEG"), ("b.jpeg", "PNG"), ("c.GIF", "GIF"), ("d.bmp", "BMP"), ("e f.WebP", "WEBP")):
        write_image(folder / "cat" / name, value=len(name), format=kind)
    for name in (".DS_Store", "Thumbs.db"):
        (folder / "cat" / name).write_bytes(b"left by a file manager")
    found = splits_by_id(load_folder(folder, tmp_path))
    assert len(found) == 45
    assert {"cat/a.JPG", "cat/b.jpeg", "cat/c.GIF", "cat/d.bmp", "cat/e f.WebP"} <= set(found)


def test_files_that_are_not_images_are_named(folder, tmp_path):
    (folder / "cat" / "labels.csv").write_text("no image")
    assert message(load_folder, folder, tmp_path) == unreadable_message(1, 41, f"{folder}/cat/labels.csv ({FORMATS})")
    half = (folder / "cat" / "3.png").read_bytes()[:-40]
    (folder / "cat" / "3.png").write_bytes(half)
    (folder / "dog" / "empty.png").touch()
    error = message(load_folder, folder, tmp_path)
    assert error.startswith(f"3 of 42 images cannot be read: {folder}/cat/3.png (")
    assert f"{folder}/dog/empty.png ({FORMATS})" in error
    for number in range(12):
        (folder / "dog" / f"z{number}").touch()
    error = message(load_folder, folder, tmp_path)
    assert error.startswith("15 of 54 images cannot be read: ")
    assert error.count(" (") - error.count(" (JPEG") == 10
    assert error.endswith(
        " and 5 more; fix or remove them, or set data.on_error=skip data.max_skipped=15 to leave them out"
    )


def test_stray_files_folders_and_pipes_are_named(folder, tmp_path):
    (folder / "README").touch()
    assert message(load_folder, folder, tmp_path) == (
        f"{folder / 'README'} is not in a class folder; move it into one, or remove it"
    )
    (folder / "README").unlink()
    os.mkfifo(folder / "cat" / "pipe.jpg")
    assert message(load_folder, folder, tmp_path) == unreadable_message(
        1, 41, f"{folder}/cat/pipe.jpg (not a regular file)"
    )
    (folder / "cat" / "x.jpg").mkdir()
    assert message(load_folder, folder, tmp_path) == unreadable_message(
        2, 42, f"{folder}/cat/pipe.jpg (not a regular file); {folder}/cat/x.jpg (a folder)"
    )
    (folder / "cat" / "pipe.jpg").unlink()
    (folder / "cat" / "x.jpg").rmdir()
    assert sum(load_folder(folder, tmp_path).split_sizes.values()) == 40


def test_link_out_of_the_root_is_rejected(folder, tmp_path):
    before = load_folder(folder, tmp_path)
    write_image(tmp_path / "elsewhere.png", value=5)
    link = folder / "cat" / "link.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    expected = f"{link} (is outside {folder})"
    assert message(load_folder, folder, tmp_path) == unreadable_message(1, 41, expected)
    link.unlink()
    link.symlink_to("../../elsewhere.png")
    assert message(load_folder, folder, tmp_path) == unreadable_message(1, 41, expected)
    link.unlink()
    link.symlink_to("../dog/3.png")
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    gone = f"{folder}/cat/gone.png (No such file or directory)"
    assert message(load_folder, folder, tmp_path) == unreadable_message(1, 42, gone)
    (folder / "cat" / "gone.png").unlink()
    after = load_folder(folder, tmp_path)
    assert splits_by_id(after) == splits_by_id(before) | {"cat/link.png": splits_by_id(before)["dog/3.png"]}


def test_links_are_followed_once_for_each_folder(folder, tmp_path, monkeypatch):
    """Not once per file, which would dominate with a million files."""
    inside = folder_source._RootMembership
    asked, holds = [], inside.contains
    monkeypatch.setattr(inside, "contains", lambda root, path: asked.append(path) or holds(root, path))
    (folder / "cat" / "link.png").symlink_to("../dog/3.png")
    load_folder(folder, tmp_path)
    assert asked == [f"{folder}/cat", f"{folder}/cat/link.png", f"{folder}/dog"]


def test_class_folder_outside_the_root_is_rejected(folder, tmp_path):
    (folder / "cat").rename(tmp_path / "cats")
    (folder / "cat").symlink_to(tmp_path / "cats")
    error = message(load_folder, folder, tmp_path)
    first = f"{folder}/cat/0.png (is outside {folder})"
    assert error.startswith(f"20 of 40 images cannot be read: {first}; ")
    root = tmp_path / "another name"
    root.symlink_to(folder)
    (folder / "cat").unlink()
    (tmp_path / "cats").rename(folder / "cat")
    assert load_folder(root, tmp_path).fingerprint == load_folder(folder, tmp_path).fingerprint


def test_self_referencing_link_beside_the_classes_is_named(folder, tmp_path):
    (folder / "loop").symlink_to("loop")
    expected = f"{folder}/loop is not in a class folder; move it into one, or remove it"
    assert message(load_folder, folder, tmp_path) == expected


def test_self_referencing_link_in_a_class_is_named(folder, tmp_path):
    (folder / "cat" / "loop.png").symlink_to("loop.png")
    error = message(load_folder, folder, tmp_path)
    assert error.startswith(f"1 of 41 images cannot be read: {folder}/cat/loop.png (")


def test_file_name_that_is_not_utf8_is_named(folder, tmp_path):
    write_image(folder / "cat" / "café \u4e00.png", value=5)  # UTF-8
    assert "cat/café \u4e00.png" in splits_by_id(load_folder(folder, tmp_path))
    shutil.copy(folder / "cat" / "3.png", os.fsencode(folder) + b"/cat/caf\xe9.png")
    named = f"{folder}/cat/caf\\udce9.png (the name is not UTF-8)"
    assert message(load_folder, folder, tmp_path) == unreadable_message(1, 42, named)
    loaded = load_folder(folder, tmp_path, on_error="skip")
    assert loaded.skipped == (("cat/caf\\udce9.png", "the name is not UTF-8"),)
    assert sum(loaded.split_sizes.values()) == 41
