"""Where decoded pixels are kept: chosen by the room there is, made once, and checked whenever they are read."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import train.data
from support.commands import message
from train.data import dataset, parallel_map, pipeline, pixel_cache
from train.data.augmentation import policy
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
    place = tmp_path_factory.mktemp("images") / "root"
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for number in range(count):
            path = place / part / ("cat", "dog")[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return place


def load(root, data_dir, **options):
    defaults = {"image_size": SIDE, "channels": 3, "root": str(root)}
    return train.data.load("folder", str(data_dir), **(defaults | options))


@pytest.fixture
def opened(root, tmp_path):
    return load(root, tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch):
    """One entry for every image that is decoded."""
    calls, decode_resized = [], dataset.decode_and_resize
    monkeypatch.setattr(dataset, "decode_and_resize", lambda *arguments: calls.append(1) or decode_resized(*arguments))
    return calls


def where(placed):
    return {name: split.cache_mode for name, split in placed.splits.items()}


def everywhere(place):
    return dict.fromkeys(COUNTS, place)


def exact(split):
    return np.stack([split.load_example(index) for index in range(len(split))])


def left(data_dir):
    """What lies where pixels are kept, beside the locks of those who made it."""
    return sorted(path.name for path in (data_dir / ".pixels").glob("[!.]*"))


# -------------------------------------------------------------------------------------------------------- the choice


def test_memory_is_taken_split_by_split_while_there_is_room(opened):
    def placed(ram_bytes):
        return tuple(where(pixel_cache.choose_cache(opened, "auto", ram_bytes / GIB, crops=False)[0]).values())

    assert placed(sum(BYTES.values())) == ("memory", "memory", "memory")
    assert placed(sum(BYTES.values()) - 1) == ("memory", "memory", "disk")
    assert placed(BYTES["train"] + BYTES["validation"] - 1) == ("memory", "disk", "disk")
    assert placed(BYTES["train"] + BYTES["test"]) == ("memory", "memory", "disk")
    assert placed(BYTES["train"] - 1) == ("disk", "memory", "memory")
    assert placed(0) == ("disk", "disk", "disk")


def test_a_disk_is_filled_by_half(root, tiny_disk):
    disk = tiny_disk("3m")
    opened = load(root, disk)

    def placed(room_on_disk):
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(free - 2 * room_on_disk))
        assert 0 <= 2 * room_on_disk - shutil.disk_usage(disk).free <= 8192  # whole pages
        return tuple(where(pixel_cache.choose_cache(opened, "auto", 0, crops=False)[0]).values())

    slack = 8192
    assert placed(sum(BYTES.values()) + slack) == ("disk", "disk", "disk")
    assert placed(sum(BYTES.values()) - slack) == ("disk", "disk", "none")
    assert placed(BYTES["train"] + slack) == ("disk", "none", "none")
    assert placed(BYTES["train"] - slack) == ("none", "disk", "disk")
    assert placed(slack) == ("none", "none", "none")


def test_what_is_asked_for_is_done(opened):
    for place in ("memory", "disk", "none"):
        assert where(pixel_cache.choose_cache(opened, place, 1.0, crops=False)[0]) == everywhere(place)
    assert where(pixel_cache.choose_cache(opened, "none", 0, crops=False)[0]) == everywhere("none")
    assert where(pixel_cache.choose_cache(opened, "disk", 0, crops=False)[0]) == everywhere("disk")


def test_of_crops_there_is_nothing_to_keep(opened):
    for place in ("auto", "memory", "disk", "none"):
        found = where(pixel_cache.choose_cache(opened, place, 1.0, crops=True)[0])
        assert found == everywhere("memory" if place == "auto" else place) | {"train": "files"}
    room = (BYTES["validation"] + BYTES["test"]) / GIB
    assert where(pixel_cache.choose_cache(opened, "memory", room, crops=True)[0])["test"] == "memory"


def test_the_choice_is_told(root, tiny_disk):
    disk = tiny_disk("8g")  # takes no memory while it is empty
    opened = load(root, disk, image_size=4096)  # 48 MiB each

    def told(place, ram_budget, crops=False):
        return pixel_cache.choose_cache(opened, place, ram_budget, crops)[1]

    assert told("auto", 2.0) == "pixels: train, validation, test in memory (1.69 GiB)"
    assert told("auto", 1.0) == "pixels: train in memory (0.94 GiB); validation, test on disk (0.75 GiB)"
    assert told("auto", 0.5) == "pixels: train, test on disk (1.41 GiB); validation in memory (0.28 GiB)"
    assert told("none", 2.0) == "pixels: train, validation, test decoded each time"
    assert told("disk", 0.0) == "pixels: train, validation, test on disk (1.69 GiB)"
    assert told("auto", 1.0, crops=True) == (
        "pixels: train cropped from the files; validation, test in memory (0.75 GiB)"
    )
    assert left(disk) == []  # nothing has been decoded yet


def test_too_little_memory_is_refused(root, tmp_path):
    opened = load(root, tmp_path / "data", image_size=4096)
    said = (
        "data.cache must be one that has room, got memory with {} GiB left of data.ram_budget and {} GiB of {}; "
        "use data.cache=auto, or data.ram_budget={}"
    )
    for crops, found in ((False, ("0.50", "0.94", "train")), (True, ("0.22", "0.47", "test"))):
        refused = message(pixel_cache.choose_cache, opened, "memory", 0.5, crops=crops)
        assert refused == said.format(*found, refused.rpartition("=")[2])  # the number: see the next test


def test_the_memory_that_is_advised_is_enough(root, tmp_path):
    opened = load(root, tmp_path / "data", image_size=16384)  # 15, 4.5 and 7.5 GiB
    for ram_budget in (1.0, 16.0, 20.0):
        said = message(pixel_cache.choose_cache, opened, "memory", ram_budget, crops=False)
        advised = float(said.rpartition("data.ram_budget=")[2])
        assert advised > ram_budget
        assert where(pixel_cache.choose_cache(opened, "memory", advised, crops=False)[0]) == everywhere("memory")


def test_too_little_disk_is_refused(root, tiny_disk):
    disk = tiny_disk("400k")
    opened = load(root, disk)
    assert message(pixel_cache.choose_cache, opened, "disk", 1.0, crops=False).startswith(
        "data.cache must be one that has room, got disk with 0.00 GiB left of half of the free disk and 0.00 GiB of "
        "train; use data.cache=auto"
    )
    assert where(pixel_cache.choose_cache(opened, "auto", 1.0, crops=False)[0]) == everywhere("memory")
    assert where(pixel_cache.choose_cache(opened, "none", 1.0, crops=False)[0]) == everywhere("none")


def test_pixels_that_lie_on_disk_already_need_no_more_room(root, tiny_disk):
    disk = tiny_disk("1100k")
    opened, _ = pixel_cache.choose_cache(load(root, disk), "disk", 0, crops=False)
    for split in opened.splits.values():
        pixel_cache.DiskCache(split)
    assert shutil.disk_usage(disk).free * 0.5 < BYTES["train"] + BYTES["validation"] + BYTES["test"]
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 65536))
    for place in ("disk", "auto"):
        assert where(pixel_cache.choose_cache(load(root, disk), place, 0, crops=False)[0]) == everywhere("disk")


# -------------------------------------------------------------------------------------------------------------- kept


def test_a_second_start_decodes_nothing(root, tmp_path, decoded):
    for place in ("disk", "memory"):
        data_dir = tmp_path / place
        splits = pixel_cache.choose_cache(load(root, data_dir), place, 1.0, crops=False)[0].splits
        for start in range(2):
            decoded.clear()
            for name, split in splits.items():
                found = (
                    pixel_cache.load_into_memory(split)
                    if place == "memory"
                    else pixel_cache.DiskCache(split).read(np.arange(len(split)))
                )
                assert len(found) == COUNTS[name]
                del found
            assert len(decoded) == (0 if start else 36)
            splits = pixel_cache.choose_cache(load(root, data_dir), place, 1.0, crops=False)[0].splits
        assert len(left(data_dir)) == 3


def test_what_memory_has_kept_serves_disk_and_the_other_way_round(root, tmp_path, decoded):
    pixel_cache.load_into_memory(load(root, tmp_path).train)
    assert len(decoded) == 20
    assert pixel_cache.DiskCache(load(root, tmp_path).train).read(np.array([3])).shape == (1, 64, 64, 3)
    assert len(decoded) == 20


def test_decoding_each_time_keeps_nothing(opened, tmp_path, decoded):
    read = pixel_cache.make_reader(replace(opened.train, pixels="none"))
    for _ in range(2):
        read(np.arange(5))
    assert len(decoded) == 10
    assert left(tmp_path / "data") == []


def test_the_three_ways_give_the_pixels_of_the_examples(opened):
    split, chosen = opened.test, np.array([7, 0, 7, 3])
    expected = exact(split)
    np.testing.assert_array_equal(pixel_cache.make_reader(replace(split, pixels="none"))(chosen), expected[chosen])
    np.testing.assert_array_equal(pixel_cache.make_reader(replace(split, pixels="disk"))(chosen), expected[chosen])
    np.testing.assert_array_equal(pixel_cache.load_into_memory(split), expected)
    np.testing.assert_array_equal(pixel_cache.images(split), expected)


def test_more_examples_than_a_thread_takes_at_once_come_in_order(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "CHUNK", 3)
    for limit in (0, 4096):  # many threads; one
        monkeypatch.setattr(parallel_map, "TINY_BYTES", limit)
        opened = load(root, tmp_path / str(limit))
        np.testing.assert_array_equal(pixel_cache.load_into_memory(opened.train), exact(opened.train))


def copy_of(root, place):
    return shutil.copytree(root, place / "root")


def turned(path):
    """Another image in its place."""
    Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)


def test_another_view_has_another_place(root, tmp_path):
    views = [
        {},
        {"image_size": 32},
        {"channels": 1},
        {"background": (0, 0, 0)},
        {"crop_fraction": 0.875},
    ]
    places = [pixel_cache.cache_path(load(root, tmp_path, **view).train) for view in views]
    assert len(set(places)) == 5
    assert places[0] == pixel_cache.cache_path(load(root, tmp_path).train)
    assert {place.parent for place in places} == {tmp_path / ".pixels"}


def test_another_order_or_other_contents_have_another_place(root, tmp_path):
    own = copy_of(root, tmp_path)
    split = load(own, tmp_path / "data").train
    first = pixel_cache.cache_path(split)
    assert first == pixel_cache.cache_path(load(own, tmp_path / "data").train)
    assert first != pixel_cache.cache_path(replace(split, rows=split.indices[::-1].copy()))
    assert first != pixel_cache.cache_path(replace(split, rows=split.indices[:-1].copy()))
    assert first != pixel_cache.cache_path(load(own, tmp_path / "data").test)
    turned(own / split.example_id(4))
    assert first != pixel_cache.cache_path(load(own, tmp_path / "data").train)


def test_another_name_or_label_of_the_same_pixels_has_the_same_place(root, tmp_path):
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
    """One bit of one pixel, where it lies on the disk."""
    with (pixel_cache.cache_path(split) / "pixels.npy").open("r+b") as file:
        file.seek(-len(split) * SIDE * SIDE * 3 + index * SIDE * SIDE * 3 + 1000, 2)
        [value] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value ^ 4]))


def damaged(split, index):
    place = pixel_cache.cache_path(split)
    return (
        f"every example must be readable, got {split.error_prefix}{split.example_id(index)} damaged in {place}; "
        f"use rm -r {place}, it is made again"
    )


def test_a_flipped_bit_is_noticed_and_named(opened, root):
    split = replace(opened.test, pixels="disk")
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(10)), exact(split))
    flip(split, 7)
    assert message(pixel_cache.DiskCache(split).read, np.arange(10)) == damaged(split, 7)
    assert damaged(split, 7).startswith(f"every example must be readable, got {root}/test/dog/05.png damaged in /")
    assert message(pixel_cache.load_into_memory, split) == damaged(split, 7)
    others = np.array([0, 1, 6, 8])
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(others), exact(split)[others])


def test_a_flipped_bit_is_named_by_the_stream(opened):
    split = replace(opened.test, pixels="disk")

    def stream():
        return list(pipeline.eval_batches(split, batch_size=4, num_classes=2))

    assert len(stream()) == 3
    flip(split, 7)
    with pytest.raises(Exception, match="every example must be readable") as caught:
        stream()
    assert pipeline.extract_example_error(caught.value) == damaged(split, 7)
    flip(split, 7)
    assert len(stream()) == 3


def test_what_is_damaged_is_made_again_once_it_is_removed(opened):
    split = opened.test
    pixel_cache.DiskCache(split)
    flip(split, 0)
    said = message(pixel_cache.DiskCache(split).read, np.arange(10))
    shutil.rmtree(said.partition("use rm -r ")[2].removesuffix(", it is made again"))
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(10)), exact(split))


@pytest.mark.parametrize("name", ["pixels.npy", "sums.npy"])
@pytest.mark.parametrize("size", [0, 130])
def test_a_file_that_was_cut_short_is_named(opened, name, size):
    split = opened.test
    pixel_cache.DiskCache(split)
    place = pixel_cache.cache_path(split)
    with (place / name).open("r+b") as file:
        file.truncate(size)
    said = message(lambda: pixel_cache.DiskCache(split).read(np.arange(10)))
    assert said.endswith(f"use rm -r {place}, it is made again")


def test_an_example_that_is_broken_is_named_and_nothing_is_kept(root, tmp_path):
    own = copy_of(root, tmp_path)
    split = load(own, tmp_path / "data").train
    (own / split.example_id(9)).write_bytes(b"gone")
    said = (
        f"every example must be readable, got {own / split.example_id(9)} (changed since the data set was opened); "
        "use the data as it was"
    )
    assert message(pixel_cache.DiskCache, split) == said
    assert message(pixel_cache.load_into_memory, split) == said
    assert left(tmp_path / "data") == []


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(opened, tmp_path):
    place = tmp_path / "data/.pixels"
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
        (place / name).mkdir(parents=True)
        (place / name / "pixels.npy").write_bytes(b"half")
    pixel_cache.DiskCache(opened.test)
    assert left(tmp_path / "data") == sorted([*others, pixel_cache.cache_path(opened.test).name])


# -------------------------------------------------------------------------------------- no room, no right, two at once


def test_a_full_disk_leaves_nothing_half_made(root, tiny_disk, decoded):
    disk = tiny_disk("200k")
    split = load(root, disk).train
    free = shutil.disk_usage(disk).free
    with pytest.raises(OSError, match="No space left on device"):
        pixel_cache.DiskCache(split)
    assert left(disk) == []
    assert shutil.disk_usage(disk).free >= free - 4096  # the empty folder
    decoded.clear()
    np.testing.assert_array_equal(pixel_cache.load_into_memory(split), exact(split))
    assert left(disk) == []


@pytest.fixture
def no_folder(root, tmp_path):
    """A data folder in which no pixels can be kept: a file is in their place."""
    opened = load(root, tmp_path / "data")
    (tmp_path / "data" / ".pixels").write_text("in the way")
    return opened


def test_where_nothing_can_be_written_memory_serves(no_folder, decoded):
    placed, told = pixel_cache.choose_cache(no_folder, "auto", 1.0, crops=False)
    assert told == "pixels: train, validation, test in memory (0.00 GiB)"
    for _ in range(2):
        fresh = replace(placed.train)  # as after another start
        stream = pipeline.train_batches(
            fresh, batch_size=10, seed=0, epoch=0, augmentation=policy.crop(), num_classes=2
        )
        assert [images.shape for images, _ in stream] == [(10, 64, 64, 3)] * 2
    assert len(decoded) == 40  # each start anew
    assert no_folder.train.cache_dir.read_text() == "in the way"


def test_where_nothing_can_be_written_auto_does_not_choose_the_disk(no_folder):
    placed, told = pixel_cache.choose_cache(no_folder, "auto", 0, crops=False)
    assert told == "pixels: train, validation, test decoded each time"
    stream = pipeline.eval_batches(placed.test, batch_size=10, num_classes=2)
    assert [images.shape for images, _ in stream] == [(10, 64, 64, 3)]


@pytest.mark.parametrize(("locked", "made"), [("locked", 1), ("", 2)])
def test_two_processes_at_once_end_with_one_folder(root, tmp_path, locked, made):
    """Which one of them makes, while the other waits; without locks both do."""
    load(root, tmp_path)
    code = (
        "import sys, contextlib, pathlib, hashlib, train.data as d; from train.data import pixel_cache;"
        "from train.storage import checksummed;"
        "split = d.load('folder', sys.argv[1], image_size=512, channels=3, root=sys.argv[2]).train;"
        "keep, times = pixel_cache._write_cache, [];"
        "pixel_cache._write_cache = lambda *given: (times.append(1), keep(*given));"
        "checksummed.exclusive = checksummed.exclusive if sys.argv[3] else lambda _: contextlib.nullcontext();"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(hashlib.sha256(pixel_cache.load_into_memory(split)).hexdigest(),"
        " pixel_cache.cache_path(split).name, len(times))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(root), locked]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (one, name, *times), (other, *_, more) = (out.split() for out, _ in said)
    assert one == other
    assert left(tmp_path) == [name]
    assert int(times[0]) + int(more) == made
    split = load(root, tmp_path, image_size=512).train
    np.testing.assert_array_equal(pixel_cache.DiskCache(split).read(np.arange(20)), exact(split))


def test_who_comes_second_leaves_what_is_there(opened, tmp_path, monkeypatch):
    """Where there are no locks."""
    monkeypatch.setattr(checksummed, "exclusive", lambda _: contextlib.nullcontext())
    split = opened.train
    place = pixel_cache.cache_path(split)

    class Slow(FileStore):
        """Somebody else is done while this one still reads."""

        def read(self, rows):
            if not place.exists():
                pixel_cache.DiskCache(replace(split, store=split.store))
                (place / "mark").touch()
            return super().read(rows)

    store = Slow(split.store.root, split.store.names, split.store.labels)
    np.testing.assert_array_equal(pixel_cache.DiskCache(replace(split, store=store)).read(np.arange(20)), exact(split))
    assert left(tmp_path / "data") == [place.name]
    assert (place / "mark").exists()
