"""Limits on bytes and pixels, and broken examples: refused, or skipped up to a number."""

import os
import tracemalloc

from support.commands import message
from support.image_folders import FORMATS, load_folder, splits_by_id, unreadable_message, write_image


def test_file_with_too_many_bytes_is_rejected(folder, tmp_path):
    path = folder / "cat" / "3.bmp"
    write_image(path, value=1, side=40)
    size = path.stat().st_size
    assert f"{size:,}" == "4,854"
    named = f"{path} (4,854 bytes are more than the limit of 4,853)"
    assert message(load_folder, folder, tmp_path, max_bytes=size - 1) == unreadable_message(1, 41, named)
    assert sum(load_folder(folder, tmp_path, max_bytes=size).split_sizes.values()) == 41


def test_file_with_too_many_bytes_is_not_read(folder, tmp_path):
    path = folder / "cat" / "0.png"
    path.touch()
    os.truncate(path, 2**28)
    tracemalloc.start()
    try:
        error = message(load_folder, folder, tmp_path, max_bytes=2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error == unreadable_message(1, 40, f"{path} (268,435,456 bytes are more than the limit of 1,048,576)")
    assert peak < 2**26


def test_image_with_too_many_pixels_is_rejected(folder, tmp_path):
    path = folder / "cat" / "3.png"
    write_image(path, value=1, side=7)
    named = f"{path} (7x7 pixels are more than the limit of 48)"
    assert message(load_folder, folder, tmp_path, max_pixels=48) == unreadable_message(1, 40, named)
    assert sum(load_folder(folder, tmp_path, max_pixels=49).split_sizes.values()) == 40


def test_broken_examples_can_be_skipped(folder, tmp_path):
    whole = load_folder(folder, tmp_path)
    for number in range(4):
        (folder / "cat" / f"x{number}.png").write_text("no image")
    loaded = load_folder(folder, tmp_path, on_error="skip", max_skipped=4)
    assert loaded.fingerprint == whole.fingerprint  # of what is used
    assert splits_by_id(loaded) == splits_by_id(whole)
    assert loaded.skipped == tuple((f"cat/x{number}.png", FORMATS) for number in range(4))
    named = "; ".join(f"cat/x{number}.png ({FORMATS})" for number in range(3))
    assert loaded.notes == (f"warning: skipped 4 broken examples: {named}; ...",)
    (folder / "cat" / "x3.png").unlink()
    assert load_folder(folder, tmp_path, on_error="skip").notes == (f"warning: skipped 3 broken examples: {named}",)


def test_more_broken_examples_than_max_skipped_are_rejected(folder, tmp_path):
    for number in range(3):
        (folder / "cat" / f"x{number}.png").write_text("no image")
    named = "; ".join(f"{folder}/cat/x{number}.png ({FORMATS})" for number in range(3))
    assert message(load_folder, folder, tmp_path, on_error="skip", max_skipped=2) == unreadable_message(
        3, 43, named, "data.max_skipped=3 to leave them out"
    )
    assert sum(load_folder(folder, tmp_path, on_error="skip", max_skipped=3).split_sizes.values()) == 40
    assert message(load_folder, folder, tmp_path) == unreadable_message(3, 43, named)
