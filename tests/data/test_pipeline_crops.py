"""Random resized crops in a stream, cut out of the encoded images."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from support.batches import (
    INCEPTION,
    RecordingStore,
    batch_images,
    equal_batches,
    make_augmentation,
    photo_image,
    train_epoch,
)
from support.image_folders import load_dataset
from support.images import decode_image
from train.data import sampling
from train.data.augmentation import random_resized_crop


def crop_epoch(split, **options):
    return train_epoch(split, **({"batch_size": 4, "num_classes": 2, "augmentation": INCEPTION} | options))


def images_by_example(batches, indices):
    return dict(zip(indices.tolist(), batch_images(batches), strict=True))


def test_threads_do_not_change_crops(photos):
    assert len(photos) == 38
    batches = crop_epoch(photos, threads=1)
    assert [batch[0].shape for batch in batches] == [(4, 32, 32, 3)] * 9
    assert batches[0][0].dtype == np.uint8
    assert equal_batches(batches, crop_epoch(photos, threads=2))
    assert equal_batches(batches, crop_epoch(photos))


def test_resumed_crops_are_the_remaining_ones_and_nothing_else_is_read(photos):
    batches = crop_epoch(photos)
    store = RecordingStore(photos.store)
    tail = crop_epoch(replace(photos, store=store), first_batch=6)
    assert equal_batches(batches[6:], tail)
    assert not equal_batches(batches[5:8], tail)
    assert sorted(store.rows) == sorted(photos.indices[sampling.permutation(1, 0, 38)[24:36]].tolist())


def test_crops_differ_between_epochs(photos):
    first, second = (crop_epoch(photos, epoch=epoch, batch_size=38) for epoch in (0, 1))
    one, other = (
        images_by_example(batches, sampling.permutation(1, epoch, 38)) for epoch, batches in ((0, first), (1, second))
    )
    assert not any(np.array_equal(one[index], other[index]) for index in range(38))
    again = images_by_example(crop_epoch(photos, batch_size=38), sampling.permutation(1, 0, 38))
    assert all(np.array_equal(one[index], again[index]) for index in range(38))


def test_batch_size_does_not_change_crops(photos):
    whole = batch_images(crop_epoch(photos, batch_size=38))
    for batch_size in (1, 5, 19):
        images = batch_images(crop_epoch(photos, batch_size=batch_size))
        np.testing.assert_array_equal(images, whole[: len(images)])


PLAIN_CROP = make_augmentation("inception", color=0.0, mirror=False)


def test_crops_differ_from_example_to_example(tmp_path):
    root = tmp_path / "root"
    for part, count in (("train", 6), ("validation", 1), ("test", 1)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                photo_image(120, 160, 7).save(root / part / name / f"{number}.jpg", quality=90)
    loaded = load_dataset("folder", str(tmp_path / "data"), image_size=32, channels=3, root=str(root))
    images = batch_images(crop_epoch(replace(loaded.train, cache_mode="files"), batch_size=12, augmentation=PLAIN_CROP))
    assert len({image.tobytes() for image in images}) == 12  # of one and the same picture


def box_of(index, size, epoch=0):
    draws = sampling.uniform_rows(1, "crop", epoch, 38, random_resized_crop.DRAWS)
    [(top, left, height, width)] = PLAIN_CROP.random_resized_crop.sample_boxes(
        np.array([size]), draws[index : index + 1]
    )
    return slice(top, top + height), slice(left, left + width)


def cut_by_hand(pixels, box, side=32):
    """The crop, halved by averaging if it stays large enough."""
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
def test_other_images_are_cropped_from_the_pixels_of_pillow(photos, name):
    [index] = [index for index in range(38) if photos.example_id(index).endswith(name)]
    assert not photos.is_fast_jpeg(index)
    actual = images_by_example(
        crop_epoch(photos, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38)
    )[index]
    pixels = decode_image(photos.read([index])[0], 3)
    assert pixels.shape == ((130, 90, 3) if name == "turned.jpg" else (90, 130, 3))
    np.testing.assert_array_equal(actual, cropped_by_hand(pixels, box_of(index, pixels.shape[:2])))


def test_crop_has_the_colours_of_its_own_draws(photos):
    own = sampling.uniform_rows(1, "crop", 0, 38, random_resized_crop.DRAWS)
    maps, turned = INCEPTION.random_resized_crop.color_matrices(own, 3), own[:, 4] < 0.5
    actual = images_by_example(crop_epoch(photos, batch_size=38), sampling.permutation(1, 0, 38))
    names = [index for index in range(38) if photos.example_id(index).endswith((".png", "cmyk.jpg", "turned.jpg"))]
    assert len(names) == 5
    for index in names:
        pixels = decode_image(photos.read([index])[0], 3)
        cut = cut_by_hand(pixels, box_of(index, pixels.shape[:2]))
        expected = np.empty((32, 32, 3), np.uint8)
        INCEPTION.random_resized_crop.render_into(cut, turned[index], maps[index], expected)
        np.testing.assert_array_equal(actual[index], expected)


def test_crop_of_a_jpeg_respects_its_orientation(photos):
    [index] = [index for index in range(38) if photos.example_id(index).endswith("turned.jpg")]
    actual = images_by_example(
        crop_epoch(photos, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38)
    )[index]
    stored = np.asarray(Image.open(io.BytesIO(photos.read([index])[0])))
    wrong = cropped_by_hand(stored, box_of(index, stored.shape[:2]))
    assert np.abs(actual.astype(int) - wrong).mean() > 10


@pytest.mark.parametrize("name", ["/0.jpg", "/5.jpg", "/grey.jpg"])
def test_crop_of_a_plain_jpeg_matches_pillow(photos, name):
    """Exactly if the crop is too small to be scaled while decoding, and approximately if it is halved."""
    [index] = [index for index in range(38) if photos.example_id(index).endswith(name)]
    assert photos.is_fast_jpeg(index)
    pixels = decode_image(photos.read([index])[0], 3)
    boxes = [box_of(index, photos.stored_size(index), epoch=epoch) for epoch in range(30)]
    large = [min(box[0].stop - box[0].start, box[1].stop - box[1].start) >= 64 for box in boxes]
    for halved in {*large}:
        epoch = large.index(halved)
        whole = crop_epoch(photos, batch_size=38, augmentation=PLAIN_CROP, epoch=epoch)
        actual = images_by_example(whole, sampling.permutation(1, epoch, 38))[index].astype(int)
        expected = cropped_by_hand(pixels, boxes[epoch])
        assert np.abs(actual - expected).mean() <= (1.5 if halved else 0)
        if not halved:
            assert np.abs(actual - cropped_by_hand(pixels[:, ::-1], boxes[epoch])).mean() > 5
    assert False in large


def test_crops_of_grey_images_match_pillow(photos):
    grey = replace(photos, image_spec=replace(photos.image_spec, channels=1))
    batches = crop_epoch(grey)
    assert batches[0][0].shape == (4, 32, 32, 1)
    assert equal_batches(batches, crop_epoch(grey, threads=1))
    actual = images_by_example(crop_epoch(grey, batch_size=38, augmentation=PLAIN_CROP), sampling.permutation(1, 0, 38))
    for index in (index for index in range(38) if photos.example_id(index).endswith((".png", "cmyk.jpg", "/grey.jpg"))):
        pixels = decode_image(photos.read([index])[0], 1)
        expected = cropped_by_hand(pixels, box_of(index, pixels.shape[:2]))
        np.testing.assert_array_equal(actual[index], expected.reshape(32, 32, 1))


def test_repeated_examples_of_a_balanced_epoch_are_augmented_differently(tmp_path):
    """The only image of one class is repeated to balance another class; its repetitions differ."""
    root, seeds = tmp_path / "root", iter(range(100))
    for part in ("train", "validation", "test"):
        for name, count in (("cat", 11 if part == "train" else 1), ("dog", 1)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                photo_image(60, 60, next(seeds)).save(root / part / name / f"{number}.png")
    split = load_dataset("folder", str(tmp_path / "data"), image_size=32, channels=3, root=str(root)).train
    for chosen in (make_augmentation("crop", pad=0.5), PLAIN_CROP):
        part = replace(split, cache_mode="files") if chosen.random_resized_crop else split
        [(images, labels)] = crop_epoch(part, batch_size=12, augmentation=chosen, balanced=True, num_classes=2)
        dogs = images[labels[:, 1] == 1]
        assert len(dogs) == 6 and len({dog.tobytes() for dog in dogs}) == 6
