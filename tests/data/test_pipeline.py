"""Streams of batches: what an epoch contains, and that seed, epoch and index alone decide it."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from support.batches import (
    BATCH_SIZE,
    RecordingStore,
    batch_images,
    batch_labels,
    equal_batches,
    eval_epoch,
    make_augmentation,
    make_noise_folder,
    train_epoch,
)
from support.commands import WITH_SUPPORT, message
from support.image_folders import load_dataset
from train.data import dataset, pipeline, pixel_cache, sampling
from train.data.augmentation import policy

CACHE_MODES = ("memory", "disk", "none")


# ------------------------------------------------------------------------------------------------------- fixtures


CLASS_COUNTS = {"train": (20, 50, 90), "validation": (4, 4, 4), "test": (12, 13, 15)}


@pytest.fixture(scope="module")
def noise_dataset(tmp_path_factory):
    """160 noisy images for training, of three classes of 20, 50 and 90; 12 for validation, 40 for the test."""
    base = tmp_path_factory.mktemp("noise")
    root = make_noise_folder(base / "root", CLASS_COUNTS)
    return load_dataset("folder", str(base / "data"), image_size=8, channels=3, root=str(root))


@pytest.fixture(scope="module")
def train_split(noise_dataset):
    return noise_dataset.train


# --------------------------------------------------------------------------------------------------------------- epochs


def test_epoch_has_the_examples_in_the_order_of_the_permutation(train_split):
    batches = train_epoch(train_split, augmentation=policy.none(), batch_size=15)
    assert [batch[0].shape for batch in batches] == [(15, 8, 8, 3)] * 10  # the last ten examples are no whole batch
    assert batches[0][0].dtype == np.uint8
    assert batches[0][1].dtype == np.float32
    indices = sampling.permutation(1, 0, 160)[:150]
    expected = np.stack([train_split.load_example(index) for index in indices])
    np.testing.assert_array_equal(batch_images(batches), expected)
    np.testing.assert_array_equal(batch_labels(batches), np.eye(3)[train_split.labels[indices]])


def test_epoch_has_every_example_once(train_split):
    seen = sorted(image.tobytes() for image in batch_images(train_epoch(train_split, augmentation=policy.none())))
    assert len(set(seen)) == 160
    assert seen == sorted(train_split.load_example(index).tobytes() for index in range(160))


AUGMENTATIONS = {
    "flip_crop_erase": make_augmentation("flip_crop", erase=0.5),
    "randaugment_mixed": make_augmentation("randaugment", mixup=0.2, cutmix=1.0),
}


@pytest.fixture(params=list(AUGMENTATIONS))
def augmentation(request):
    return AUGMENTATIONS[request.param]


def test_stream_depends_on_seed_and_epoch_only(train_split, augmentation):
    batches = train_epoch(train_split, augmentation=augmentation)
    assert equal_batches(batches, train_epoch(train_split, augmentation=augmentation))
    for other in ({"epoch": 1}, {"seed": 2}):
        changed = train_epoch(train_split, augmentation=augmentation, **other)
        assert not any(np.array_equal(*pair) for pair in zip(batch_images(batches), batch_images(changed), strict=True))
        assert not np.array_equal(batch_labels(batches), batch_labels(changed))


def test_every_example_is_augmented_by_its_own_draws(train_split):
    chosen = make_augmentation("randaugment", erase=0.5)
    indices = sampling.permutation(1, 3, 160)
    rows = sampling.uniform_rows(1, "paint", 3, 160, chosen.randaugment.num_draws)
    expected = np.stack([chosen.randaugment.apply(train_split.load_example(index), rows[index]) for index in indices])
    for move in chosen.batch_ops:
        expected = move.apply(expected, sampling.uniform_rows(1, move.purpose, 3, 160, move.num_draws)[indices]).numpy()
    np.testing.assert_array_equal(batch_images(train_epoch(train_split, augmentation=chosen, epoch=3)), expected)


def test_augmentation_of_an_example_differs_between_epochs(train_split):
    def shifted(epoch):
        images = batch_images(train_epoch(train_split, epoch=epoch))
        return images[np.argsort(sampling.permutation(1, epoch, 160))]

    still = pixel_cache.images(train_split)
    alike = [(shifted(0) == other).all(axis=(1, 2, 3)).mean() for other in (shifted(1), still)]
    np.testing.assert_allclose(alike, 1 / 9, atol=0.08)  # one of the 3 x 3 shifts


def test_resumed_epoch_has_the_remaining_batches(train_split, augmentation):
    batches = train_epoch(train_split, augmentation=augmentation)
    tail = train_epoch(train_split, augmentation=augmentation, first_batch=7)
    assert equal_batches(batches[7:], tail)
    assert not equal_batches(batches[6:9], tail)
    assert train_epoch(train_split, augmentation=augmentation, first_batch=10) == []


def test_shards_of_all_processes_make_up_the_epoch(train_split, augmentation):
    for options in ({}, {"class_weights": True, "first_batch": 7}, {"balanced": True}):
        whole = train_epoch(train_split, augmentation=augmentation, **options)
        shares = [
            train_epoch(train_split, augmentation=augmentation, shard=(index, 4), **options) for index in range(4)
        ]
        together = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
        assert equal_batches(whole, together)
    assert message(train_epoch, train_split, shard=(1, 3)) == (
        "batch_size must be a multiple of the number of shards, got 16 for shard 1 of 3; "
        "use another batch_size, or another number of processes"
    )


@pytest.mark.parametrize("where", CACHE_MODES)
def test_evaluation_shard_has_its_own_images_and_all_labels(noise_dataset, where):
    split = replace(noise_dataset.test, cache_mode=where)
    whole = eval_epoch(split)
    shares = [eval_epoch(split, shard=(index, 2)) for index in range(2)]
    assert [[len(images) for images, _ in share] for share in shares] == [[8, 8, 8], [8, 8, 0]]  # 40 in all
    np.testing.assert_array_equal(
        np.concatenate([images for parts in zip(*shares, strict=True) for images, _ in parts]), batch_images(whole)
    )
    for share in shares:
        np.testing.assert_array_equal(batch_labels(share), batch_labels(whole))


def test_shard_reads_only_its_own_examples(train_split):
    store = RecordingStore(train_split.store)
    split = replace(train_split, store=store, cache_mode="none")
    assert len(train_epoch(split, shard=(1, 2))) == 10
    own = split.indices[sampling.permutation(1, 0, 160)].reshape(10, 2, 8)[:, 1]
    assert sorted(store.rows) == sorted(own.reshape(-1).tolist())


def test_cache_mode_and_threads_do_not_change_training_batches(train_split, augmentation):
    streams = [
        train_epoch(replace(train_split, cache_mode=where), augmentation=augmentation, threads=threads)
        for where in CACHE_MODES
        for threads in (1, 2)
    ]
    assert [len(batches) for batches in streams] == [10] * 6
    assert all(equal_batches(streams[0], batches) for batches in streams)
    for where in CACHE_MODES:
        tail = train_epoch(replace(train_split, cache_mode=where), augmentation=augmentation, first_batch=8)
        assert equal_batches(streams[0][8:], tail)


def test_cache_mode_and_threads_do_not_change_evaluation_batches(noise_dataset):
    streams = [
        eval_epoch(replace(noise_dataset.test, cache_mode=where), threads=threads)
        for where in CACHE_MODES
        for threads in (1, 2)
    ]
    assert all(equal_batches(streams[0], batches) for batches in streams)


def test_evaluation_has_every_example_once_in_order(noise_dataset):
    batches = eval_epoch(noise_dataset.test)
    assert [len(batch[0]) for batch in batches] == [16, 16, 8]
    assert [part.dtype for part in batches[0]] == [np.uint8, np.float32]
    np.testing.assert_array_equal(
        batch_images(batches), np.stack([noise_dataset.test.load_example(index) for index in range(40)])
    )
    np.testing.assert_array_equal(batch_labels(batches), np.eye(3)[noise_dataset.test.labels])


def test_resuming_decodes_no_earlier_example(train_split, monkeypatch):
    decoded, read = [], dataset.decode_and_resize
    monkeypatch.setattr(dataset, "decode_and_resize", lambda *arguments: decoded.append(1) or read(*arguments))
    store = RecordingStore(train_split.store)
    split = replace(train_split, store=store, cache_mode="none")
    assert len(train_epoch(split, first_batch=8)) == 2
    assert len(decoded) == 32
    assert sorted(store.rows) == sorted(split.indices[sampling.permutation(1, 0, 160)[128:]].tolist())
    decoded.clear()
    assert len(train_epoch(split)) == 10
    assert len(decoded) == 160


@pytest.mark.slow
def test_deterministic_mode_does_not_change_batches(train_split, photos):
    code = (
        "import sys, hashlib, tensorflow as tf; from dataclasses import replace;"
        "from support.batches import make_augmentation, train_stream; from support.image_folders import load_dataset;"
        "tf.config.experimental.enable_op_determinism(); tf.keras.utils.set_random_seed(0);"
        "noise, photos = (load_dataset('folder', sys.argv[i + 1], image_size=size, channels=3, root=sys.argv[i]).train"
        " for i, size in ((1, 8), (3, 32)));"
        "say = lambda split, chosen: print(hashlib.sha256(b''.join(part.numpy().tobytes() for batch in"
        " train_stream(split, augmentation=chosen) for part in batch)).hexdigest());"
        "[say(replace(noise, cache_mode=place), make_augmentation('randaugment', cutmix=1.0))"
        " for place in ('memory', 'none')];"
        "say(replace(photos, cache_mode='files'), make_augmentation('inception'))"
    )
    folders = [part for split in (train_split, photos) for part in (split.error_prefix, split.cache_dir.parent)]
    command = [sys.executable, "-c", code, *map(str, folders)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=WITH_SUPPORT).stdout.split()
    mixed = digest(train_epoch(train_split, augmentation=make_augmentation("randaugment", cutmix=1.0)))
    assert output == [mixed, mixed, digest(train_epoch(photos, augmentation=make_augmentation("inception")))]


@pytest.mark.slow
def test_prefetching_to_a_device_does_not_change_batches(train_split):
    code = (
        "import sys, tensorflow as tf;"
        "from support.batches import train_stream; from support.image_folders import load_dataset;"
        "[cpu] = tf.config.list_physical_devices('CPU');"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2);"
        "split = load_dataset('folder', sys.argv[2], image_size=8, channels=3, root=sys.argv[1]).train;"
        "there = train_stream(split).take(2);"
        "pairs = list(zip(there.prefetch_to_device('CPU:1'), there, strict=True));"
        "print(len(pairs), {t.device[-5:] for pair in pairs for t in pair[0]},"
        " {t.device[-5:] for pair in pairs for t in pair[1]},"
        " all((a.numpy() == b.numpy()).all() for one, two in pairs for a, b in zip(one, two)))"
    )
    command = [sys.executable, "-c", code, str(train_split.error_prefix), str(train_split.cache_dir.parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=WITH_SUPPORT).stdout
    assert output == "2 {'CPU:1'} {'CPU:0'} True\n"


@pytest.mark.slow
def test_epoch_starts_without_copying_the_pixels(train_split):
    """1,000 images at 224 px, 144 MiB; in a separate process, since freed memory would be reused first."""
    code = (
        "import sys, numpy as np, tensorflow as tf; from dataclasses import replace;"
        "from support.batches import train_stream; from support.image_folders import load_dataset;"
        "from train.data.augmentation import policy;"
        "from train.data.pixel_cache import images; tf.config.experimental.enable_op_determinism();"
        "split = load_dataset('folder', sys.argv[2], image_size=224, channels=3, root=sys.argv[1]).train;"
        "many = replace(split, indices=np.resize(split.indices, 1000), labels=np.resize(split.labels, 1000));"
        "own = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) // 1024;"
        "mine = own(); images(many); held = own() - mine;"
        "stream = train_stream(many, augmentation=policy.none(), batch_size=4);"
        "mine = own(); next(iter(stream)); print(held, own() - mine)"
    )
    command = [sys.executable, "-c", code, str(train_split.error_prefix), str(train_split.cache_dir.parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=WITH_SUPPORT).stdout
    held, more = map(int, output.split())
    assert 140 < held < 200
    assert more < 40


def digest(batches):
    return hashlib.sha256(b"".join(part.tobytes() for batch in batches for part in batch)).hexdigest()


# ------------------------------------------------------------------------------------------------------------ messages


def test_unusable_batch_options_are_rejected(noise_dataset):
    assert pipeline.steps_per_epoch(noise_dataset.train, 64) == 2
    assert pipeline.steps_per_epoch(noise_dataset.train, 160) == 1
    template = "batch_size must be in 1..12, the size of the validation split, got {}; use batch_size=12"
    for wrong in (13, 0):
        assert message(pipeline.steps_per_epoch, noise_dataset.validation, wrong) == template.format(wrong)
    assert message(train_epoch, noise_dataset.train, batch_size=161) == (
        "batch_size must be in 1..160, the size of the train split, got 161; use batch_size=32"
    )
    for wrong in (11, -1):
        assert message(train_epoch, noise_dataset.train, first_batch=wrong) == (
            f"first_batch must be in 0..10, got {wrong}; use the next batch of the epoch"
        )
    assert (
        message(eval_epoch, noise_dataset.test, batch_size=0)
        == "batch_size must be at least 1, got 0; use batch_size=32"
    )


# ------------------------------------------------------------------------------------ class weights, balance and mixing


def test_example_weights_match_calculations_by_hand():
    np.testing.assert_array_equal(
        pipeline.example_weights(np.array([0, 0, 0, 1])), np.array([2 / 3, 2 / 3, 2 / 3, 2], np.float32)
    )
    np.testing.assert_array_equal(
        pipeline.example_weights(np.array([2, 0, 2, 2, 2])), [0.625, 2.5, 0.625, 0.625, 0.625]
    )
    np.testing.assert_array_equal(pipeline.example_weights(np.array([1, 0, 1, 0])), [1, 1, 1, 1])
    assert pipeline.example_weights(np.array([0, 1])).dtype == np.float32


def test_example_weights_balance_the_classes_with_mean_one(train_split):
    weights = pipeline.example_weights(train_split.labels)
    assert weights.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    sums = [weights[train_split.labels == label].sum(dtype=np.float64) for label in range(3)]
    np.testing.assert_allclose(sums, 160 / 3, rtol=1e-6)


def test_example_weights_are_the_third_element_of_a_batch(train_split):
    batches = train_epoch(train_split, class_weights=True)
    indices = sampling.permutation(1, 0, 160)
    assert [len(batch) for batch in batches] == [3] * 10
    expected = (np.array([160 / 60, 160 / 150, 160 / 270]))[train_split.labels[indices]].astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([batch[2] for batch in batches]), expected)
    assert equal_batches([batch[:2] for batch in batches], train_epoch(train_split))


def test_balanced_epoch_follows_the_balanced_order(train_split):
    batches = train_epoch(train_split, balanced=True, augmentation=policy.none())
    indices = sampling.balanced_order(1, 0, train_split.labels)
    np.testing.assert_array_equal(
        batch_images(batches), np.stack([train_split.load_example(index) for index in indices])
    )
    np.testing.assert_array_equal(batch_labels(batches).argmax(axis=1), train_split.labels[indices])
    np.testing.assert_array_equal(np.sort(batch_labels(batches).sum(axis=0)), [53, 53, 54])
    assert equal_batches(
        batches[4:], train_epoch(train_split, balanced=True, augmentation=policy.none(), first_batch=4)
    )
    assert not equal_batches(batches, train_epoch(train_split, balanced=True, augmentation=policy.none(), epoch=1))


@pytest.mark.parametrize(("options", "mixed"), [({"mixup": 0.4}, 1.0), ({"cutmix": 1.0}, 0.5), ({}, 0.0)])
def test_mixed_batches_are_floats_with_dense_labels_that_sum_to_one(train_split, options, mixed):
    batches = train_epoch(train_split, augmentation=make_augmentation("none", **options))
    assert {batch[0].dtype for batch in batches} == {np.dtype(np.float32 if mixed else np.uint8)}
    assert {batch[1].dtype for batch in batches} == {np.dtype(np.float32)}
    np.testing.assert_allclose(batch_labels(batches).sum(axis=1), 1, atol=1e-6)
    dense = (batch_labels(batches).max(axis=1) < 1).mean()
    assert (dense > 0.2) == bool(mixed)  # partners may be of the same class
    assert batch_images(batches).min() >= 0
    assert batch_images(batches).max() <= 255


def test_mixup_partner_is_the_next_example_of_the_batch(train_split):
    still = train_epoch(train_split, augmentation=policy.none())
    mixing = make_augmentation("none", mixup=0.4)
    shares = mixing.mixup_cutmix.draw(1, 0, 160)[sampling.permutation(1, 0, 160), :1].reshape(10, BATCH_SIZE, 1)
    for batch, (images, labels), own in zip(train_epoch(train_split, augmentation=mixing), still, shares, strict=True):
        expected = own * labels + (1 - own) * np.roll(labels, -1, axis=0)
        np.testing.assert_allclose(batch[1], expected, atol=1e-6)
        own = own[..., None, None]
        expected = own * images + (1 - own) * np.roll(images, -1, axis=0)
        np.testing.assert_allclose(batch[0], expected, atol=1e-3)
