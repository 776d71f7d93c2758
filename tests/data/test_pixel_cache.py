"""The pixel cache: memory or disk by available space, written once, and checked on every read."""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from support.batches import eval_stream, train_stream
from support.commands import WITH_SUPPORT, message, run_command
from support.image_folders import load_dataset
from train.data import dataset, parallel_map, pixel_cache
from train.data.example_error import ExampleError
from train.data.sources.listing import FileStore
from train.storage import checksummed

COUNTS = {"train": 20, "validation": 6, "test": 10}
SIDE = 64
BYTES = {name: count * SIDE * SIDE * 3 for name, count in COUNTS.items()}  # 245,760, 73,728 and 122,880
GIB = 2**30

# ------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """36 small images of two classes."""
    folder = tmp_path_factory.mktemp("images") / "root"
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for number in range(count):
            path = folder / part / ("cat", "dog")[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return folder


def load(root, data_dir, **options):
    defaults = {"image_size": SIDE, "channels": 3, "root": str(root)}
    return load_dataset("folder", str(data_dir), **(defaults | options))


@pytest.fixture
def opened(root, tmp_path):
    return load(root, tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch):
    """A list with one entry for every decoded image."""
    calls, decode_resized = [], dataset.decode_and_resize
    monkeypatch.setattr(dataset, "decode_and_resize", lambda *arguments: calls.append(1) or decode_resized(*arguments))
    return calls


def cache_modes(cached):
    return {name: split.cache_mode for name, split in cached.splits.items()}


def all_splits(cache_mode):
    return dict.fromkeys(COUNTS, cache_mode)


def exact(split):
    return np.stack([split.load_example(index) for index in range(len(split))])


def cache_files(data_dir):
    """The contents of the pixel cache, without lock files."""
    return sorted(path.name for path in (data_dir / ".pixels").glob("[!.]*"))


# -------------------------------------------------------------------------------------------------- choice of the cache


def test_splits_are_cached_in_memory_while_there_is_room(opened):
    def chosen_modes(ram_bytes):
        return tuple(cache_modes(pixel_cache.choose_cache(opened, "auto", ram_bytes / GIB, crops=False)[0]).values())

    assert chosen_modes(sum(BYTES.values())) == ("memory", "memory", "memory")
    assert chosen_modes(sum(BYTES.values()) - 1) == ("memory", "memory", "disk")
    assert chosen_modes(BYTES["train"] + BYTES["validation"] - 1) == ("memory", "disk", "disk")
    assert chosen_modes(BYTES["train"] + BYTES["test"]) == ("memory", "memory", "disk")
    assert chosen_modes(BYTES["train"] - 1) == ("disk", "memory", "memory")
    assert chosen_modes(0) == ("disk", "disk", "disk")


def test_disk_cache_uses_at_most_half_of_the_disk(root, tiny_disk):
    disk = tiny_disk("3m")
    opened = load(root, disk)

    def chosen_modes(room_on_disk):
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(free - 2 * room_on_disk))
        assert 0 <= 2 * room_on_disk - shutil.disk_usage(disk).free <= 8192  # whole pages
        return tuple(cache_modes(pixel_cache.choose_cache(opened, "auto", 0, crops=False)[0]).values())

    slack = 8192
    assert chosen_modes(sum(BYTES.values()) + slack) == ("disk", "disk", "disk")
    assert chosen_modes(sum(BYTES.values()) - slack) == ("disk", "disk", "none")
    assert chosen_modes(BYTES["train"] + slack) == ("disk", "none", "none")
    assert chosen_modes(BYTES["train"] - slack) == ("none", "disk", "disk")
    assert chosen_modes(slack) == ("none", "none", "none")


def test_requested_cache_mode_is_used(opened):
    for cache_mode in ("memory", "disk", "none"):
        assert cache_modes(pixel_cache.choose_cache(opened, cache_mode, 1.0, crops=False)[0]) == all_splits(cache_mode)
    assert cache_modes(pixel_cache.choose_cache(opened, "none", 0, crops=False)[0]) == all_splits("none")
    assert cache_modes(pixel_cache.choose_cache(opened, "disk", 0, crops=False)[0]) == all_splits("disk")


def test_crops_are_not_cached(opened):
    for cache_mode in ("auto", "memory", "disk", "none"):
        modes = cache_modes(pixel_cache.choose_cache(opened, cache_mode, 1.0, crops=True)[0])
        assert modes == all_splits("memory" if cache_mode == "auto" else cache_mode) | {"train": "files"}
    room = (BYTES["validation"] + BYTES["test"]) / GIB
    assert cache_modes(pixel_cache.choose_cache(opened, "memory", room, crops=True)[0])["test"] == "memory"


def test_cache_choice_is_reported(root, tiny_disk):
    disk = tiny_disk("8g")  # takes no memory while it is empty
    opened = load(root, disk, image_size=4096)  # 48 MiB each

    def choice_message(cache_mode, ram_budget, crops=False):
        return pixel_cache.choose_cache(opened, cache_mode, ram_budget, crops)[1]

    assert choice_message("auto", 2.0) == "pixel cache: train, validation, test in memory (1.69 GiB)"
    assert choice_message("auto", 1.0) == "pixel cache: train in memory (0.94 GiB); validation, test on disk (0.75 GiB)"
    assert choice_message("auto", 0.5) == "pixel cache: train, test on disk (1.41 GiB); validation in memory (0.28 GiB)"
    assert choice_message("none", 2.0) == "pixel cache: train, validation, test not cached (decoded every epoch)"
    assert choice_message("disk", 0.0) == "pixel cache: train, validation, test on disk (1.69 GiB)"
    assert choice_message("auto", 1.0, crops=True) == (
        "pixel cache: train not cached (cropped from the files every epoch); validation, test in memory (0.75 GiB)"
    )
    assert cache_files(disk) == []  # nothing has been decoded yet


def test_too_little_memory_is_rejected(root, tmp_path):
    opened = load(root, tmp_path / "data", image_size=4096)
    template = (
        "data.cache=memory is too small for the {} split: it needs {} GiB, {} GiB of data.ram_budget are left; "
        "use data.cache=auto, or data.ram_budget={}"
    )
    for crops, values in ((False, ("train", "0.94", "0.50")), (True, ("test", "0.47", "0.22"))):
        refused = message(pixel_cache.choose_cache, opened, "memory", 0.5, crops=crops)
        assert refused == template.format(*values, refused.rpartition("=")[2])  # the number: see the next test


def test_suggested_memory_is_sufficient(root, tmp_path):
    opened = load(root, tmp_path / "data", image_size=16384)  # 15, 4.5 and 7.5 GiB
    for ram_budget in (1.0, 16.0, 20.0):
        error = message(pixel_cache.choose_cache, opened, "memory", ram_budget, crops=False)
        advised = float(error.rpartition("data.ram_budget=")[2])
        assert advised > ram_budget
        assert cache_modes(pixel_cache.choose_cache(opened, "memory", advised, crops=False)[0]) == all_splits("memory")


def test_too_little_disk_is_rejected(root, tiny_disk):
    disk = tiny_disk("400k")
    opened = load(root, disk)
    assert message(pixel_cache.choose_cache, opened, "disk", 1.0, crops=False).startswith(
        "data.cache=disk is too small for the train split: it needs 0.00 GiB, "
        "0.00 GiB of half of the free disk are left; use data.cache=auto"
    )
    assert cache_modes(pixel_cache.choose_cache(opened, "auto", 1.0, crops=False)[0]) == all_splits("memory")
    assert cache_modes(pixel_cache.choose_cache(opened, "none", 1.0, crops=False)[0]) == all_splits("none")


def test_pixels_already_on_disk_need_no_more_space(root, tiny_disk):
    disk = tiny_disk("1100k")
    opened, _ = pixel_cache.choose_cache(load(root, disk), "disk", 0, crops=False)
    for split in opened.splits.values():
        pixel_cache.DiskCache(split)
    assert shutil.disk_usage(disk).free * 0.5 < BYTES["train"] + BYTES["validation"] + BYTES["test"]
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 65536))
    for cache_mode in ("disk", "auto"):
        assert cache_modes(pixel_cache.choose_cache(load(root, disk), cache_mode, 0, crops=False)[0]) == all_splits(
            "disk"
        )


# ---------------------------------------------------------------------------------------------------------- cache files


def test_second_start_decodes_nothing(root, tmp_path, decoded):
    for cache_mode in ("disk", "memory"):
        data_dir = tmp_path / cache_mode
        splits = pixel_cache.choose_cache(load(root, data_dir), cache_mode, 1.0, crops=False)[0].splits
        for start in range(2):
            decoded.clear()
            for name, split in splits.items():
                pixels = (
                    pixel_cache.load_into_memory(split)
                    if cache_mode == "memory"
                    else pixel_cache.DiskCache(split).read(np.arange(len(split)))
                )
                assert len(pixels) == COUNTS[name]
                del pixels
            assert len(decoded) == (0 if start else 36)
            splits = pixel_cache.choose_cache(load(root, data_dir), cache_mode, 1.0, crops=False)[0].splits
        assert len(cache_files(data_dir)) == 3


def test_memory_and_disk_caches_share_their_files(root, tmp_path, decoded):
    pixel_cache.load_into_memory(load(root, tmp_path).train)
    assert len(decoded) == 20
    assert pixel_cache.DiskCache(load(root, tmp_path).train).read(np.array([3])).shape == (1, 64, 64, 3)
    assert len(decoded) == 20


def test_cache_mode_none_stores_nothing(opened, tmp_path, decoded):
    read = pixel_cache.make_reader(replace(opened.train, cache_mode="none"))
    for _ in range(2):
        read(np.arange(5))
    assert len(decoded) == 10
    assert cache_files(tmp_path / "data") == []


def test_every_cache_mode_gives_the_pixels_of_the_examples(opened):
    split, chosen = opened.test, np.array([7, 0, 7, 3])
    expected = exact(split)
    np.testing.assert_array_equal(pixel_cache.make_reader(replace(split, cache_mode="none"))(chosen), expected[chosen])
    np.testing.assert_array_equal(pixel_cache.make_reader(replace(split, cache_mode="disk"))(chosen), expected[chosen])
    np.testing.assert_array_equal(pixel_cache.load_into_memory(split), expected)
    np.testing.assert_array_equal(pixel_cache.images(split), expected)


def test_examples_of_several_chunks_keep_their_order(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "CHUNK", 3)
    for limit in (0, 4096):  # many threads; one
        monkeypatch.setattr(parallel_map, "TINY_BYTES", limit)
        opened = load(root, tmp_path / str(limit))
        np.testing.assert_array_equal(pixel_cache.load_into_memory(opened.train), exact(opened.train))


def copy_of(root, folder):
    return shutil.copytree(root, folder / "root")


def turned(path):
    """Another image of the same name."""
    Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)


def test_another_image_spec_has_another_cache_path(root, tmp_path):
    views = [
        {},
        {"image_size": 32},
        {"channels": 1},
        {"background": (0, 0, 0)},
        {"crop_fraction": 0.875},
    ]
    paths = [pixel_cache.cache_path(load(root, tmp_path, **view).train) for view in views]
    assert len(set(paths)) == 5
    assert paths[0] == pixel_cache.cache_path(load(root, tmp_path).train)
    assert {folder.parent for folder in paths} == {tmp_path / ".pixels"}


def test_another_order_or_other_contents_have_another_cache_path(root, tmp_path):
    own = copy_of(root, tmp_path)
    split = load(own, tmp_path / "data").train
    first = pixel_cache.cache_path(split)
    assert first == pixel_cache.cache_path(load(own, tmp_path / "data").train)
    assert first != pixel_cache.cache_path(replace(split, indices=split.indices[::-1].copy()))
    assert first != pixel_cache.cache_path(replace(split, indices=split.indices[:-1].copy()))
    assert first != pixel_cache.cache_path(load(own, tmp_path / "data").test)
    turned(own / split.example_id(4))
    assert first != pixel_cache.cache_path(load(own, tmp_path / "data").train)


def test_names_and_labels_do_not_change_the_cache_path(root, tmp_path):
    own = copy_of(root, tmp_path)
    first = pixel_cache.cache_path(load(own, tmp_path / "data").train)
    own.rename(tmp_path / "moved")
    assert first == pixel_cache.cache_path(load(tmp_path / "moved", tmp_path / "data").train)


def test_new_contents_are_decoded_again(root, tmp_path):
    own = copy_of(root, tmp_path)
    split = load(own, tmp_path / "data").train
    before = pixel_cache.load_into_memory(split)
    turned(own / split.example_id(4))
    after = pixel_cache.load_into_memory(load(own, tmp_path / "data").train)
    assert [index for index in range(20) if (before[index] != after[index]).any()] == [4]


# ------------------------------------------------------------------------------------------------------------ damage


def flip(split, index):
    """Flips one bit of one pixel on disk."""
    with (pixel_cache.cache_path(split) / "pixels.npy").open("r+b") as file:
        file.seek(-len(split) * SIDE * SIDE * 3 + index * SIDE * SIDE * 3 + 1000, 2)
        [value] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value ^ 4]))


def damaged(split, index):
    folder = pixel_cache.cache_path(split)
    return (
        f"cannot read {split.error_prefix}{split.example_id(index)}: pixel cache {folder} is damaged; "
        f"to rebuild it: rm -r {folder}"
    )


def test_flipped_bit_is_detected_and_named(opened, root):
    split = replace(opened.test, cache_mode="disk")
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(10)), exact(split))
    flip(split, 7)
    assert message(pixel_cache.DiskCache(split).read, np.arange(10)) == damaged(split, 7)
    assert damaged(split, 7).startswith(f"cannot read {root}/test/dog/05.png: pixel cache /")
    assert message(pixel_cache.load_into_memory, split) == damaged(split, 7)
    others = np.array([0, 1, 6, 8])
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(others), exact(split)[others])


def test_flipped_bit_is_named_by_the_stream(opened):
    split = replace(opened.test, cache_mode="disk")

    def stream():
        return list(eval_stream(split, batch_size=4, num_classes=2))

    assert len(stream()) == 3
    flip(split, 7)
    with pytest.raises(ExampleError) as caught:
        stream()
    assert str(caught.value) == damaged(split, 7)
    assert (caught.value.split, caught.value.example_id) == ("test", split.example_id(7))
    flip(split, 7)
    assert len(stream()) == 3


def test_damaged_cache_is_rebuilt_after_removal(opened):
    split = opened.test
    pixel_cache.DiskCache(split)
    flip(split, 0)
    error = message(pixel_cache.DiskCache(split).read, np.arange(10))
    shutil.rmtree(error.partition("to rebuild it: rm -r ")[2])
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(10)), exact(split))


@pytest.mark.parametrize("name", ["pixels.npy", "sums.npy"])
@pytest.mark.parametrize("size", [0, 130])
def test_truncated_cache_file_is_named(opened, name, size):
    split = opened.test
    pixel_cache.DiskCache(split)
    path = pixel_cache.cache_path(split)
    with (path / name).open("r+b") as file:
        file.truncate(size)
    error = message(lambda: pixel_cache.DiskCache(split).read(np.arange(10)))
    assert error == f"pixel cache {path} of the test split is truncated; to rebuild it: rm -r {path}"


def test_broken_example_is_named_and_nothing_is_cached(root, tmp_path):
    own = copy_of(root, tmp_path)
    split = load(own, tmp_path / "data").train
    (own / split.example_id(9)).write_bytes(b"gone")
    expected = f"cannot read {own / split.example_id(9)}: changed since it was indexed; restore the file"
    assert message(pixel_cache.DiskCache, split) == expected
    assert message(pixel_cache.load_into_memory, split) == expected
    assert cache_files(tmp_path / "data") == []


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(opened, tmp_path):
    folder = tmp_path / "data/.pixels"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, elsewhere = platform.node(), f"{platform.node()}-2"
    own = f"incomplete-{here}-{os.getpid()}"
    others = [
        f"{own}-{pixel_cache.PROCESS_TOKEN}-aa",
        f"incomplete-{here}-1-bb",
        f"incomplete-{elsewhere}-{dead.pid}-cc",
    ]
    for name in (f"incomplete-{here}-{dead.pid}-dd", f"{own}-earlier-ee", *others):  # as in a container begun again
        (folder / name).mkdir(parents=True)
        (folder / name / "pixels.npy").write_bytes(b"half")
    pixel_cache.DiskCache(opened.test)
    assert cache_files(tmp_path / "data") == sorted([*others, pixel_cache.cache_path(opened.test).name])


@pytest.mark.parametrize("fault", ["folder/complete", "folder/renamed"])
def test_killed_process_leaves_a_whole_cache_or_none(root, tmp_path, fault):
    code = (
        "import sys; from support.image_folders import load_dataset; from train.data import pixel_cache;"
        "split = load_dataset('folder', sys.argv[1], image_size=32, channels=3, root=sys.argv[2]).train;"
        "print('loaded', flush=True);"
        "pixel_cache.DiskCache(split)"
    )
    done = run_command(
        sys.executable, "-c", code, str(tmp_path), str(root), env=WITH_SUPPORT | {"INCEPTION_FAULT": f"{fault}:1"}
    )  # fmt: skip
    assert (done.code, done.out) == (-signal.SIGKILL, "loaded\n")
    split = load(root, tmp_path, image_size=32).train
    name = pixel_cache.cache_path(split).name
    [left] = cache_files(tmp_path)
    assert (left == name) == (fault == "folder/renamed")
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(20)), exact(split))
    assert cache_files(tmp_path) == [name]


# ------------------------------------------------------------------------------ full disk, no permission, two processes


def test_full_disk_leaves_no_partial_cache(root, tiny_disk, decoded):
    disk = tiny_disk("200k")
    split = load(root, disk).train
    free = shutil.disk_usage(disk).free
    with pytest.raises(OSError, match="No space left on device"):
        pixel_cache.DiskCache(split)
    assert cache_files(disk) == []
    assert shutil.disk_usage(disk).free >= free - 4096  # the empty folder
    decoded.clear()
    np.testing.assert_array_equal(pixel_cache.load_into_memory(split), exact(split))
    assert cache_files(disk) == []


@pytest.fixture
def no_folder(root, tmp_path):
    """A data folder without a writable cache: a file has the name of its folder."""
    opened = load(root, tmp_path / "data")
    (tmp_path / "data" / ".pixels").write_text("in the way")
    return opened


def test_memory_is_used_when_the_folder_is_not_writable(no_folder, decoded):
    dataset_in_memory, choice_message = pixel_cache.choose_cache(no_folder, "auto", 1.0, crops=False)
    assert choice_message == "pixel cache: train, validation, test in memory (0.00 GiB)"
    for _ in range(2):
        fresh = replace(dataset_in_memory.train)  # as after another start
        stream = train_stream(fresh, batch_size=10, num_classes=2)
        assert [images.shape for images, _ in stream] == [(10, 64, 64, 3)] * 2
    assert len(decoded) == 40  # each start anew
    assert no_folder.train.cache_dir.read_text() == "in the way"


def test_auto_does_not_choose_a_disk_that_is_not_writable(no_folder):
    chosen, choice_message = pixel_cache.choose_cache(no_folder, "auto", 0, crops=False)
    assert choice_message == "pixel cache: train, validation, test not cached (decoded every epoch)"
    stream = eval_stream(chosen.test, batch_size=10, num_classes=2)
    assert [images.shape for images, _ in stream] == [(10, 64, 64, 3)]


@pytest.mark.parametrize(("locked", "made"), [("locked", 1), ("", 2)])
def test_two_processes_share_one_cache_folder(root, tmp_path, locked, made):
    """One process writes it while the other waits; without locks both write."""
    load(root, tmp_path)
    code = (
        "import sys, contextlib, pathlib, hashlib; from train.data import pixel_cache;"
        "from support.image_folders import load_dataset;"
        "from train.storage import checksummed;"
        "split = load_dataset('folder', sys.argv[1], image_size=512, channels=3, root=sys.argv[2]).train;"
        "keep, times = pixel_cache._write_cache, [];"
        "pixel_cache._write_cache = lambda *given: (times.append(1), keep(*given));"
        "checksummed.exclusive = checksummed.exclusive if sys.argv[3] else lambda _: contextlib.nullcontext();"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(hashlib.sha256(pixel_cache.load_into_memory(split)).hexdigest(),"
        " pixel_cache.cache_path(split).name, len(times))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(root), locked]
    pipes = {"stdin": -1, "stdout": -1, "stderr": -1, "text": True}
    both = [subprocess.Popen(command, env=WITH_SUPPORT, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (one, name, *times), (other, *_, more) = (out.split() for out, _ in outputs)
    assert one == other
    assert cache_files(tmp_path) == [name]
    assert int(times[0]) + int(more) == made
    split = load(root, tmp_path, image_size=512).train
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(20)), exact(split))


def test_second_process_keeps_the_existing_cache(opened, tmp_path, monkeypatch):
    """Without locks."""
    monkeypatch.setattr(checksummed, "exclusive", lambda _: contextlib.nullcontext())
    split = opened.train
    path = pixel_cache.cache_path(split)

    class Slow(FileStore):
        """Another process finishes while this one still reads."""

        def read(self, rows):
            if not path.exists():
                pixel_cache.DiskCache(replace(split, store=split.store))
                (path / "mark").touch()
            return super().read(rows)

    store = Slow(split.store.root, split.store.names, split.store.labels)
    np.testing.assert_array_equal(pixel_cache.DiskCache(replace(split, store=store)).read(np.arange(20)), exact(split))
    assert cache_files(tmp_path / "data") == [path.name]
    assert (path / "mark").exists()
