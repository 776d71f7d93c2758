"""Streams of batches: what is in an epoch, and that nothing but seed, epoch and index decides what it is."""

import hashlib
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image

import train.data
from support.commands import message
from train.data import dataset, decode, pipeline, pixel_cache, sampling
from train.data.augmentation import policy, random_resized_crop

BATCH = 16
PLACES = ("memory", "disk", "none")

# ------------------------------------------------------------------------------------------------------- fixtures


def noise(side, seed):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def photo(height, width, seed):
    """Large smooth blobs of colour, as far as an image of that size has room."""
    blobs = np.random.default_rng(seed).integers(0, 256, (2 + height // 40, 2 + width // 40, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def make_noise_folder(root, counts):
    """PNGs of 12x12, `counts` of every class in each part."""
    seed = 0
    for part, numbers in counts.items():
        for name, count in zip(("cat", "dog", "owl"), numbers, strict=True):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                Image.fromarray(noise(12, seed)).save(root / part / name / f"{number:02}.png")
    return root


UNEVEN = {"train": (20, 50, 90), "validation": (4, 4, 4), "test": (12, 13, 15)}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """160 noisy images for training, of three classes of 20, 50 and 90; 12 for validation, 40 for the test."""
    place = tmp_path_factory.mktemp("noise")
    root = make_noise_folder(place / "root", UNEVEN)
    return train.data.load("folder", str(place / "data"), image_size=8, channels=3, root=str(root))


@pytest.fixture(scope="module")
def train_split(opened):
    return opened.train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """38 photo-like images of many sizes, not all of which TensorFlow would decode as they are meant."""
    place = tmp_path_factory.mktemp("photos")
    root = place / "root"
    for seed, part in enumerate(("train", "validation", "test")):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            photo(40, 50, 1000 + 10 * seed + (name == "dog")).save(root / part / name / f"{name}.png")
    for number in range(32):
        name = "dog" if number % 3 else "cat"
        size = 60 + 7 * number, 90 + 5 * (number % 7) * number
        photo(*size, number).save(root / "train" / name / f"{number}.jpg", quality=95)
    photo(90, 130, 100).convert("CMYK").save(root / "train" / "cat" / "cmyk.jpg", quality=95)
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    photo(90, 130, 101).save(root / "train" / "cat" / "turned.jpg", quality=95, exif=turned)
    photo(90, 130, 102).save(root / "train" / "dog" / "bitmap.png")
    photo(90, 130, 103).convert("L").save(root / "train" / "dog" / "grey.jpg", quality=95)
    loaded = train.data.load("folder", str(place / "data"), image_size=32, channels=3, root=str(root))
    return replace(loaded.train, pixels="files")


@pytest.fixture
def folder(tmp_path):
    return make_noise_folder(tmp_path / "root", {"train": (12, 12, 12), "validation": (1, 1, 1), "test": (1, 1, 1)})


def load_folder(root, tmp_path, **options):
    return train.data.load("folder", str(tmp_path / "data"), image_size=8, channels=3, root=str(root), **options)


def take(stream):
    """All batches, each a tuple of arrays."""
    return [tuple(part.numpy() for part in batch) for batch in stream]


def epoch_of(split, **options):
    defaults = {"batch_size": BATCH, "seed": 1, "epoch": 0, "num_classes": 3, "augmentation": policy.crop()}
    return take(pipeline.train_batches(split, **(defaults | options)))


def evaluated(split, **options):
    return take(pipeline.eval_batches(split, **({"batch_size": BATCH, "num_classes": 3} | options)))


def same(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(np.array_equal, a, b)) for a, b in zip(one, other, strict=True)
    )


def images_of(batches):
    return np.concatenate([batch[0] for batch in batches])


def labels_of(batches):
    return np.concatenate([batch[1] for batch in batches])


class Counting:
    """A store that remembers which rows were read."""

    def __init__(self, store):
        self.store, self.rows = store, []

    def read(self, rows):
        self.rows += rows
        return self.store.read(rows)


# ------------------------------------------------------------------------------------------------------------ order


def test_order_covers_every_index_once_and_differs_by_epoch_and_seed():
    first = sampling.permutation(0, 0, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(first, sampling.permutation(0, 0, 1000))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != sampling.permutation(seed, epoch, 1000)).mean() > 0.99


def test_draws_are_pinned():
    np.testing.assert_array_equal(sampling.permutation(0, 0, 8), [5, 1, 6, 7, 0, 2, 4, 3])
    np.testing.assert_array_equal(
        sampling.balanced_order(0, 0, np.array([0, 0, 0, 0, 0, 1, 2, 2])), [0, 2, 5, 7, 6, 3, 5, 5]
    )
    np.testing.assert_array_equal(
        sampling.uniform_rows(3, "augment", 2, 10, 3)[0], np.array([0.8530739, 0.56678474, 0.8276501], np.float32)
    )
    np.testing.assert_array_equal(
        sampling.uniform_rows(3, "crop", 2, 10, 3)[0], np.array([0.09266347, 0.8025931, 0.58499205], np.float32)
    )
    draws = sampling.uniform_rows(3, "crop", 2, 10, random_resized_crop.DRAWS)
    np.testing.assert_array_equal(
        INCEPTION.random_resized_crop.sample_boxes(np.array([[900, 1200]] * 10), draws)[0], [300, 297, 387, 461]
    )


def test_one_more_column_of_draws_leaves_the_others_as_they_were():
    wide, narrow = sampling.uniform_rows(3, "augment", 2, 10, 3), sampling.uniform_rows(3, "augment", 2, 10, 2)
    np.testing.assert_array_equal(wide[:, :2], narrow)
    assert wide.dtype == np.float32
    assert wide.min() >= 0
    assert wide.max() < 1
    assert (wide != sampling.uniform_rows(3, "other", 2, 10, 3)).all()


def test_draws_of_seeds_purposes_and_epochs_differ():
    rows = {
        sampling.uniform_rows(seed, purpose, epoch, 1, 3).tobytes()
        for seed in range(10)
        for purpose in ("crop", "mix")
        for epoch in range(10)
    }
    assert len(rows) == 200


@pytest.mark.parametrize("counts", [(20, 50, 90), (1, 1, 98), (7, 7, 7), (3, 0, 97), (1, 2, 2)])
def test_a_balanced_order_has_every_class_equally_often(counts):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    drawn = sampling.balanced_order(0, 0, labels)
    assert drawn.shape == labels.shape
    often = np.bincount(labels[drawn], minlength=3)[np.array(counts) > 0]
    assert often.max() - often.min() <= 1
    times = np.bincount(drawn, minlength=len(labels))
    for label in np.unique(labels):  # each before one comes again
        assert np.ptp(times[labels == label]) <= 1


def test_an_order_that_is_not_balanced_is_told_from_one_that_is():
    labels = np.repeat([0, 1, 2], (20, 50, 90))
    often = np.bincount(labels[sampling.permutation(0, 0, 160)])
    np.testing.assert_array_equal(often, [20, 50, 90])
    np.testing.assert_array_equal(np.sort(np.bincount(labels[sampling.balanced_order(0, 0, labels)])), [53, 53, 54])


def test_a_balanced_order_is_a_function_of_seed_and_epoch_and_is_mixed():
    labels = np.repeat([0, 1, 2], (20, 50, 90))
    first = sampling.balanced_order(0, 0, labels)
    np.testing.assert_array_equal(first, sampling.balanced_order(0, 0, labels))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != sampling.balanced_order(seed, epoch, labels)).mean() > 0.9
    in_large = [
        set(sampling.balanced_order(0, epoch, labels)[labels[sampling.balanced_order(0, epoch, labels)] == 2])
        for epoch in (0, 1)
    ]
    assert in_large[0] != in_large[1]  # others are left out the next time
    for quarter in np.split(labels[first], 4):
        assert set(quarter) == {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------- an epoch


def test_an_epoch(train_split):
    batches = epoch_of(train_split, augmentation=policy.none(), batch_size=15)
    assert [batch[0].shape for batch in batches] == [(15, 8, 8, 3)] * 10  # the last ten examples are no whole batch
    assert batches[0][0].dtype == np.uint8
    assert batches[0][1].dtype == np.float32
    places = sampling.permutation(1, 0, 160)[:150]
    expected = np.stack([train_split.load_example(place) for place in places])
    np.testing.assert_array_equal(images_of(batches), expected)
    np.testing.assert_array_equal(labels_of(batches), np.eye(3)[train_split.labels[places]])


def test_an_epoch_sees_every_example_once(train_split):
    seen = sorted(image.tobytes() for image in images_of(epoch_of(train_split, augmentation=policy.none())))
    assert len(set(seen)) == 160
    assert seen == sorted(train_split.load_example(index).tobytes() for index in range(160))


AUGMENTATIONS = {
    "flip_crop_erase": policy.build("flip_crop", erase=0.5),
    "randaugment_mixed": policy.build("randaugment", mixup=0.2, cutmix=1.0),
}


@pytest.fixture(params=list(AUGMENTATIONS))
def augmentation(request):
    return AUGMENTATIONS[request.param]


def test_a_stream_is_a_function_of_seed_and_epoch(train_split, augmentation):
    batches = epoch_of(train_split, augmentation=augmentation)
    assert same(batches, epoch_of(train_split, augmentation=augmentation))
    for other in ({"epoch": 1}, {"seed": 2}):
        changed = epoch_of(train_split, augmentation=augmentation, **other)
        assert not any(np.array_equal(*pair) for pair in zip(images_of(batches), images_of(changed), strict=True))
        assert not np.array_equal(labels_of(batches), labels_of(changed))


def test_every_example_is_changed_by_its_own_draws(train_split):
    chosen = policy.build("randaugment", erase=0.5)
    places = sampling.permutation(1, 3, 160)
    rows = sampling.uniform_rows(1, "paint", 3, 160, chosen.randaugment.num_draws)
    expected = np.stack([chosen.randaugment.apply(train_split.load_example(place), rows[place]) for place in places])
    for move in chosen.batch_ops:
        expected = move.apply(expected, sampling.uniform_rows(1, move.purpose, 3, 160, move.num_draws)[places]).numpy()
    np.testing.assert_array_equal(images_of(epoch_of(train_split, augmentation=chosen, epoch=3)), expected)


def test_another_epoch_changes_an_example_in_another_way(train_split):
    def shifted(epoch):
        images = images_of(epoch_of(train_split, epoch=epoch))
        return images[np.argsort(sampling.permutation(1, epoch, 160))]

    still = pixel_cache.images(train_split)
    alike = [(shifted(0) == other).all(axis=(1, 2, 3)).mean() for other in (shifted(1), still)]
    np.testing.assert_allclose(alike, 1 / 9, atol=0.08)  # one of the 3 x 3 shifts


def test_resumed_at_a_batch_it_is_the_tail(train_split, augmentation):
    batches = epoch_of(train_split, augmentation=augmentation)
    tail = epoch_of(train_split, augmentation=augmentation, first_batch=7)
    assert same(batches[7:], tail)
    assert not same(batches[6:9], tail)
    assert epoch_of(train_split, augmentation=augmentation, first_batch=10) == []


def test_shares_of_all_processes_are_the_whole(train_split, augmentation):
    for options in ({}, {"class_weights": True, "first_batch": 7}, {"balanced": True}):
        whole = epoch_of(train_split, augmentation=augmentation, **options)
        shares = [epoch_of(train_split, augmentation=augmentation, share=(index, 4), **options) for index in range(4)]
        together = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
        assert same(whole, together)
    assert "share must be a part of a batch of 16, got 1 of 3" in message(epoch_of, train_split, share=(1, 3))


@pytest.mark.parametrize("where", PLACES)
def test_a_share_of_an_evaluation_has_its_own_images_and_all_labels(opened, where):
    split = replace(opened.test, pixels=where)
    whole = evaluated(split)
    shares = [evaluated(split, share=(index, 2)) for index in range(2)]
    assert [[len(images) for images, _ in share] for share in shares] == [[8, 8, 8], [8, 8, 0]]  # 40 in all
    np.testing.assert_array_equal(
        np.concatenate([images for parts in zip(*shares, strict=True) for images, _ in parts]), images_of(whole)
    )
    for share in shares:
        np.testing.assert_array_equal(labels_of(share), labels_of(whole))


def test_a_share_reads_nothing_of_the_others(train_split):
    store = Counting(train_split.store)
    split = replace(train_split, store=store, pixels="none")
    assert len(epoch_of(split, share=(1, 2))) == 10
    own = split.indices[sampling.permutation(1, 0, 160)].reshape(10, 2, 8)[:, 1]
    assert sorted(store.rows) == sorted(own.reshape(-1).tolist())


def test_memory_disk_and_decoding_give_the_same_bits_with_one_thread_and_with_two(train_split, augmentation):
    streams = [
        epoch_of(replace(train_split, pixels=where), augmentation=augmentation, threads=threads)
        for where in PLACES
        for threads in (1, 2)
    ]
    assert [len(batches) for batches in streams] == [10] * 6
    assert all(same(streams[0], batches) for batches in streams)
    for where in PLACES:
        tail = epoch_of(replace(train_split, pixels=where), augmentation=augmentation, first_batch=8)
        assert same(streams[0][8:], tail)


def test_evaluation_is_the_same_from_memory_disk_and_decoding(opened):
    streams = [evaluated(replace(opened.test, pixels=where), threads=threads) for where in PLACES for threads in (1, 2)]
    assert all(same(streams[0], batches) for batches in streams)


def test_evaluation_sees_everything_once_in_order(opened):
    batches = evaluated(opened.test)
    assert [len(batch[0]) for batch in batches] == [16, 16, 8]
    assert [part.dtype for part in batches[0]] == [np.uint8, np.float32]
    np.testing.assert_array_equal(
        images_of(batches), np.stack([opened.test.load_example(index) for index in range(40)])
    )
    np.testing.assert_array_equal(labels_of(batches), np.eye(3)[opened.test.labels])


def test_resuming_decodes_nothing_of_what_is_done(train_split, monkeypatch):
    decoded, read = [], dataset.decode_and_resize
    monkeypatch.setattr(dataset, "decode_and_resize", lambda *arguments: decoded.append(1) or read(*arguments))
    store = Counting(train_split.store)
    split = replace(train_split, store=store, pixels="none")
    assert len(epoch_of(split, first_batch=8)) == 2
    assert len(decoded) == 32
    assert sorted(store.rows) == sorted(split.indices[sampling.permutation(1, 0, 160)[128:]].tolist())
    decoded.clear()
    assert len(epoch_of(split)) == 10
    assert len(decoded) == 160


@pytest.mark.slow
def test_deterministic_mode_leaves_the_bits_alone(train_split, photos):
    code = (
        "import sys, hashlib, tensorflow as tf, train.data as d; from dataclasses import replace;"
        "from train.data import pipeline; from train.data.augmentation import policy;"
        "tf.config.experimental.enable_op_determinism(); tf.keras.utils.set_random_seed(0);"
        "noise, photos = (d.load('folder', sys.argv[i + 1], image_size=size, channels=3, root=sys.argv[i]).train"
        " for i, size in ((1, 8), (3, 32)));"
        "options = dict(batch_size=16, seed=1, epoch=0, num_classes=3);"
        "say = lambda split, chosen: print(hashlib.sha256(b''.join(part.numpy().tobytes() for batch in"
        " pipeline.train_batches(split, augmentation=chosen, **options) for part in batch)).hexdigest());"
        "[say(replace(noise, cache_mode=place), policy.build('randaugment', cutmix=1.0))"
        " for place in ('memory', 'none')];"
        "say(replace(photos, cache_mode='files'), policy.inception())"
    )
    places = [part for split in (train_split, photos) for part in (split.error_prefix, split.cache_dir.parent)]
    command = [sys.executable, "-c", code, *map(str, places)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout.split()
    mixed = digest(epoch_of(train_split, augmentation=policy.build("randaugment", cutmix=1.0)))
    assert said == [mixed, mixed, digest(epoch_of(photos, augmentation=policy.inception()))]


@pytest.mark.slow
def test_batches_are_on_the_device_that_wants_them_and_the_same(train_split):
    code = (
        "import sys, tensorflow as tf, train.data as d; from train.data import pipeline;"
        "from train.data.augmentation import policy;"
        "[cpu] = tf.config.list_physical_devices('CPU');"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2);"
        "split = d.load('folder', sys.argv[2], image_size=8, channels=3, root=sys.argv[1]).train;"
        "there = pipeline.train_batches(split, augmentation=policy.crop(), batch_size=16, seed=1, epoch=0,"
        " num_classes=3).take(2);"
        "pairs = list(zip(pipeline.on_device(there, 'CPU:1'), there, strict=True));"
        "print(len(pairs), {t.device[-5:] for pair in pairs for t in pair[0]},"
        " {t.device[-5:] for pair in pairs for t in pair[1]},"
        " all((a.numpy() == b.numpy()).all() for one, two in pairs for a, b in zip(one, two)))"
    )
    command = [sys.executable, "-c", code, str(train_split.error_prefix), str(train_split.cache_dir.parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout
    assert said == "2 {'CPU:1'} {'CPU:0'} True\n"


@pytest.mark.slow
def test_an_epoch_begins_without_a_copy_of_the_pixels(train_split):
    """1,000 images at 224 px, 144 MiB; in a process of its own, since freed memory would be taken first."""
    code = (
        "import sys, numpy as np, tensorflow as tf, train.data as d; from dataclasses import replace;"
        "from train.data import pipeline; from train.data.augmentation import policy;"
        "from train.data.pixel_cache import images; tf.config.experimental.enable_op_determinism();"
        "split = d.load('folder', sys.argv[2], image_size=224, channels=3, root=sys.argv[1]).train;"
        "many = replace(split, indices=np.resize(split.indices, 1000), labels=np.resize(split.labels, 1000));"
        "own = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) // 1024;"
        "mine = own(); images(many); held = own() - mine;"
        "stream = pipeline.train_batches(many, augmentation=policy.none(), batch_size=4, seed=1, epoch=0,"
        " num_classes=3); mine = own(); next(iter(stream)); print(held, own() - mine)"
    )
    command = [sys.executable, "-c", code, str(train_split.error_prefix), str(train_split.cache_dir.parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout
    held, more = map(int, said.split())
    assert 140 < held < 200
    assert more < 40


def digest(batches):
    return hashlib.sha256(b"".join(part.tobytes() for batch in batches for part in batch)).hexdigest()


# ------------------------------------------------------------------------------------------------------------ messages


def test_batch_messages(opened):
    assert pipeline.steps_per_epoch(opened.train, 64) == 2
    assert pipeline.steps_per_epoch(opened.train, 160) == 1
    said = "batch_size must be in 1..12, the size of the validation split, got {}; use batch_size=12"
    for wrong in (13, 0):
        assert message(pipeline.steps_per_epoch, opened.validation, wrong) == said.format(wrong)
    assert message(epoch_of, opened.train, batch_size=161) == (
        "batch_size must be in 1..160, the size of the train split, got 161; use batch_size=32"
    )
    for wrong in (11, -1):
        assert message(epoch_of, opened.train, first_batch=wrong) == (
            f"first_batch must be in 0..10, got {wrong}; use the next batch of the epoch"
        )
    assert message(evaluated, opened.test, batch_size=0) == "batch_size must be at least 1, got 0; use batch_size=32"


def broken(stream):
    """What is said of a stream that can't be read to its end."""
    with pytest.raises(Exception, match="every example must be readable") as caught:
        take(stream)
    return pipeline.extract_example_error(caught.value)


def streams_of(split):
    """The three ways by which encoded bytes come into a stream."""
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "num_classes": 3}
    none, files = replace(split, pixels="none"), replace(split, pixels="files")
    yield pipeline.eval_batches(none, batch_size=4, num_classes=3)
    yield pipeline.train_batches(none, augmentation=policy.randaugment(), **options)
    yield pipeline.train_batches(files, augmentation=policy.inception(), **options)


def test_a_broken_file_in_the_stream_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    (folder / split.example_id(5)).write_bytes(b"gone")
    said = (
        f"every example must be readable, got {folder / split.example_id(5)} (changed since the data set was opened); "
        "use the data as it was"
    )
    assert [broken(stream) for stream in streams_of(split)] == [said] * 3
    assert message(lambda: pixel_cache.images(replace(split, cache_mode="memory"))) == said
    assert pipeline.extract_example_error(RuntimeError("something else")) is None


def test_a_file_that_is_gone_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    (folder / split.example_id(5)).unlink()
    said = (
        f"every example must be readable, got {folder / split.example_id(5)} (No such file or directory); "
        "use the data as it was"
    )
    assert [broken(stream) for stream in streams_of(split)] == [said] * 3


def test_another_image_in_the_place_of_one_is_named(folder, tmp_path):
    split = load_folder(folder, tmp_path).train
    Image.fromarray(noise(12, 9999)).save(folder / split.example_id(5))
    for stream in streams_of(split):
        assert f"{folder / split.example_id(5)} (changed since the data set was opened)" in broken(stream)


def test_a_jpeg_that_only_another_decoder_could_read_is_named(photos, monkeypatch):
    refusal = ValueError("no such marker")
    monkeypatch.setattr(dataset, "decode_jpeg", Mock(side_effect=refusal))
    said = broken(pipeline.train_batches(photos, augmentation=INCEPTION, batch_size=4, seed=0, epoch=0, num_classes=3))
    assert said.endswith(".jpg (no such marker); use the data as it was")


def test_an_image_above_the_usual_limit_is_read_where_the_user_allows_it(folder, tmp_path):
    Image.new("1", (7072, 7072), 1).save(folder / "train" / "cat" / "huge.png")
    loaded = load_folder(folder, tmp_path, max_pixels=60_000_000)
    split = replace(loaded.train, pixels="none")
    [row] = [index for index in range(len(split)) if split.example_id(index).endswith("huge.png")]
    np.testing.assert_array_equal(split.load_example(row), np.full((8, 8, 3), 255))


# --------------------------------------------------------------------------------- crops out of the encoded images


INCEPTION = policy.inception()


def crops(split, **options):
    return epoch_of(split, **({"batch_size": 4, "num_classes": 2, "augmentation": INCEPTION} | options))


def by_index(batches, indices):
    return dict(zip(indices.tolist(), images_of(batches), strict=True))


def test_crops_are_the_same_with_one_thread_and_with_two(photos):
    assert len(photos) == 38
    batches = crops(photos, threads=1)
    assert [batch[0].shape for batch in batches] == [(4, 32, 32, 3)] * 9
    assert batches[0][0].dtype == np.uint8
    assert same(batches, crops(photos, threads=2))
    assert same(batches, crops(photos))


def test_crops_resumed_at_a_batch_are_the_tail_and_nothing_else_is_read(photos):
    batches = crops(photos)
    store = Counting(photos.store)
    tail = crops(replace(photos, store=store), first_batch=6)
    assert same(batches[6:], tail)
    assert not same(batches[5:8], tail)
    assert sorted(store.rows) == sorted(photos.rows[sampling.permutation(1, 0, 38)[24:36]].tolist())


def test_another_epoch_gives_other_crops(photos):
    first, second = (crops(photos, epoch=epoch, batch_size=38) for epoch in (0, 1))
    one, other = (by_index(batches, sampling.permutation(1, epoch, 38)) for epoch, batches in ((0, first), (1, second)))
    assert not any(np.array_equal(one[index], other[index]) for index in range(38))
    again = by_index(crops(photos, batch_size=38), sampling.permutation(1, 0, 38))
    assert all(np.array_equal(one[index], again[index]) for index in range(38))


def test_an_example_has_the_same_crop_whatever_the_batch_size(photos):
    whole = images_of(crops(photos, batch_size=38))
    for batch_size in (1, 5, 19):
        images = images_of(crops(photos, batch_size=batch_size))
        np.testing.assert_array_equal(images, whole[: len(images)])


PLAIN_CROP = policy.inception(color=0.0, mirror=False)


def test_crops_differ_from_example_to_example(tmp_path):
    root = tmp_path / "root"
    for part, count in (("train", 6), ("validation", 1), ("test", 1)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                photo(120, 160, 7).save(root / part / name / f"{number}.jpg", quality=90)
    loaded = train.data.load("folder", str(tmp_path / "data"), image_size=32, channels=3, root=str(root))
    images = images_of(crops(replace(loaded.train, pixels="files"), batch_size=12, augmentation=PLAIN_CROP))
    assert len({image.tobytes() for image in images}) == 12  # of one and the same picture


def box_of(index, size, epoch=0):
    draws = sampling.uniform_rows(1, "crop", epoch, 38, random_resized_crop.DRAWS)
    [(top, left, height, width)] = PLAIN_CROP.random_resized_crop.sample_boxes(
        np.array([size]), draws[index : index + 1]
    )
    return slice(top, top + height), slice(left, left + width)


def cut_by_hand(pixels, box, side=32):
    """Halved by averaging where the crop stays large enough."""
    rows, columns = box
    if min(rows.stop - rows.start, columns.stop - columns.start) < 2 * side:
        return pixels[box]
    even = np.pad(pixels, [(0, length % 2) for length in pixels.shape[:2]] + [(0, 0)], mode="edge")
    height, width, channels = even.shape
    blocks = even.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))
    top, left = rows.start // 2, columns.start // 2
    size = (rows.stop - rows.start) // 2, (columns.stop - columns.start) // 2
    return np.floor(blocks + 0.5).astype(np.uint8)[top : top + size[0], left : left + size[1]]


def cropped_by_hand(pixels, box, side=32):
    cut = cut_by_hand(pixels, box, side).astype(np.float32)
    return np.rint(cv2.resize(cut, (side, side), interpolation=cv2.INTER_LINEAR)).astype(np.uint8)


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "bitmap.png"])
def test_what_is_no_plain_jpeg_is_cropped_from_the_pixels_of_pillow(photos, name):
    [index] = [index for index in range(38) if photos.example_id(index).endswith(name)]
    assert not photos.is_fast_jpeg(index)
    found = by_index(crops(photos, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38))[index]
    pixels = decode.decode(photos.read([index])[0], 3)
    assert pixels.shape == ((130, 90, 3) if name == "turned.jpg" else (90, 130, 3))
    np.testing.assert_array_equal(found, cropped_by_hand(pixels, box_of(index, pixels.shape[:2])))


def test_a_crop_has_the_colours_of_its_own_draws(photos):
    own = sampling.uniform_rows(1, "crop", 0, 38, random_resized_crop.DRAWS)
    maps, turned = INCEPTION.random_resized_crop.color_matrices(own, 3), own[:, 4] < 0.5
    found = by_index(crops(photos, batch_size=38), sampling.permutation(1, 0, 38))
    names = [index for index in range(38) if photos.example_id(index).endswith((".png", "cmyk.jpg", "turned.jpg"))]
    assert len(names) == 5
    for index in names:
        pixels = decode.decode(photos.read([index])[0], 3)
        cut = cut_by_hand(pixels, box_of(index, pixels.shape[:2]))
        expected = np.empty((32, 32, 3), np.uint8)
        INCEPTION.random_resized_crop.render_into(cut, turned[index], maps[index], expected)
        np.testing.assert_array_equal(found[index], expected)


def test_a_turned_jpeg_would_be_another_picture_without_turning(photos):
    [index] = [index for index in range(38) if photos.example_id(index).endswith("turned.jpg")]
    found = by_index(crops(photos, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38))[index]
    stored = np.asarray(Image.open(io.BytesIO(photos.read([index])[0])))
    wrong = cropped_by_hand(stored, box_of(index, stored.shape[:2]))
    assert np.abs(found.astype(int) - wrong).mean() > 10


@pytest.mark.parametrize("name", ["/0.jpg", "/5.jpg", "/grey.jpg"])
def test_a_plain_jpeg_is_cropped_to_the_pixels_of_pillow(photos, name):
    """Exactly where the crop is too small to be scaled while it is decoded, and nearly where it is halved."""
    [index] = [index for index in range(38) if photos.example_id(index).endswith(name)]
    assert photos.is_fast_jpeg(index)
    pixels = decode.decode(photos.read([index])[0], 3)
    boxes = [box_of(index, photos.size_of(index), epoch=epoch) for epoch in range(30)]
    large = [min(box[0].stop - box[0].start, box[1].stop - box[1].start) >= 64 for box in boxes]
    for halved in {*large}:
        epoch = large.index(halved)
        whole = crops(photos, batch_size=38, augmentation=PLAIN_CROP, epoch=epoch)
        found = by_index(whole, sampling.permutation(1, epoch, 38))[index].astype(int)
        expected = cropped_by_hand(pixels, boxes[epoch])
        assert np.abs(found - expected).mean() <= (1.5 if halved else 0)
        if not halved:
            assert np.abs(found - cropped_by_hand(pixels[:, ::-1], boxes[epoch])).mean() > 5
    assert False in large


def test_crops_of_grey_images(photos):
    grey = replace(photos, view=replace(photos.view, channels=1))
    batches = crops(grey)
    assert batches[0][0].shape == (4, 32, 32, 1)
    assert same(batches, crops(grey, threads=1))
    found = by_index(crops(grey, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38))
    for index in (index for index in range(38) if photos.example_id(index).endswith((".png", "cmyk.jpg", "/grey.jpg"))):
        pixels = decode.decode(photos.read([index])[0], 1)
        expected = cropped_by_hand(pixels, box_of(index, pixels.shape[:2]))
        np.testing.assert_array_equal(found[index], expected.reshape(32, 32, 1))


# --------------------------------------------------------------------------------------------- classes and mixtures


def test_weights_are_exact():
    np.testing.assert_array_equal(
        pipeline.example_weights(np.array([0, 0, 0, 1])), np.array([2 / 3, 2 / 3, 2 / 3, 2], np.float32)
    )
    np.testing.assert_array_equal(
        pipeline.example_weights(np.array([2, 0, 2, 2, 2])), [0.625, 2.5, 0.625, 0.625, 0.625]
    )
    np.testing.assert_array_equal(pipeline.example_weights(np.array([1, 0, 1, 0])), [1, 1, 1, 1])
    assert pipeline.example_weights(np.array([0, 1])).dtype == np.float32


def test_all_classes_weigh_the_same_and_the_mean_is_one(train_split):
    weights = pipeline.example_weights(train_split.labels)
    assert weights.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    sums = [weights[train_split.labels == label].sum(dtype=np.float64) for label in range(3)]
    np.testing.assert_allclose(sums, 160 / 3, rtol=1e-6)


def test_weights_are_the_third_element_of_a_batch(train_split):
    batches = epoch_of(train_split, class_weights=True)
    places = sampling.permutation(1, 0, 160)
    assert [len(batch) for batch in batches] == [3] * 10
    expected = (np.array([160 / 60, 160 / 150, 160 / 270]))[train_split.labels[places]].astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([batch[2] for batch in batches]), expected)
    assert same([batch[:2] for batch in batches], epoch_of(train_split))


def test_a_balanced_epoch(train_split):
    batches = epoch_of(train_split, balanced=True, augmentation=policy.none())
    places = sampling.balanced_order(1, 0, train_split.labels)
    np.testing.assert_array_equal(images_of(batches), np.stack([train_split.load_example(place) for place in places]))
    np.testing.assert_array_equal(labels_of(batches).argmax(axis=1), train_split.labels[places])
    np.testing.assert_array_equal(np.sort(labels_of(batches).sum(axis=0)), [53, 53, 54])
    assert same(batches[4:], epoch_of(train_split, balanced=True, augmentation=policy.none(), first_batch=4))
    assert not same(batches, epoch_of(train_split, balanced=True, augmentation=policy.none(), epoch=1))


@pytest.mark.parametrize(("options", "mixed"), [({"mixup": 0.4}, 1.0), ({"cutmix": 1.0}, 0.5), ({}, 0.0)])
def test_mixed_batches_are_floats_with_dense_labels_that_sum_to_one(train_split, options, mixed):
    batches = epoch_of(train_split, augmentation=policy.build("none", **options))
    assert {batch[0].dtype for batch in batches} == {np.dtype(np.float32 if mixed else np.uint8)}
    assert {batch[1].dtype for batch in batches} == {np.dtype(np.float32)}
    np.testing.assert_allclose(labels_of(batches).sum(axis=1), 1, atol=1e-6)
    dense = (labels_of(batches).max(axis=1) < 1).mean()
    assert (dense > 0.2) == bool(mixed)  # partners may be of the same class
    assert images_of(batches).min() >= 0
    assert images_of(batches).max() <= 255


def test_the_partner_is_the_next_example_of_the_batch(train_split):
    still = epoch_of(train_split, augmentation=policy.none())
    mixing = policy.build("none", mixup=0.4)
    shares = mixing.mixup_cutmix.draw(1, 0, 160)[sampling.permutation(1, 0, 160), :1].reshape(10, BATCH, 1)
    for batch, (images, labels), own in zip(epoch_of(train_split, augmentation=mixing), still, shares, strict=True):
        expected = own * labels + (1 - own) * np.roll(labels, -1, axis=0)
        np.testing.assert_allclose(batch[1], expected, atol=1e-6)
        own = own[..., None, None]
        expected = own * images + (1 - own) * np.roll(images, -1, axis=0)
        np.testing.assert_allclose(batch[0], expected, atol=1e-3)


def test_copies_of_a_balanced_epoch_are_changed_in_different_ways(tmp_path):
    """One picture of one class stands against many of another: its copies are not the same image again and again."""
    root, seeds = tmp_path / "root", iter(range(100))
    for part in ("train", "validation", "test"):
        for name, count in (("cat", 11 if part == "train" else 1), ("dog", 1)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                photo(60, 60, next(seeds)).save(root / part / name / f"{number}.png")
    split = train.data.load("folder", str(tmp_path / "data"), image_size=32, channels=3, root=str(root)).train
    for chosen in (policy.crop(pad=0.5), PLAIN_CROP):
        part = replace(split, pixels="files") if chosen.random_resized_crop else split
        [(images, labels)] = crops(part, batch_size=12, augmentation=chosen, balanced=True, num_classes=2)
        dogs = images[labels[:, 1] == 1]
        assert len(dogs) == 6 and len({dog.tobytes() for dog in dogs}) == 6
