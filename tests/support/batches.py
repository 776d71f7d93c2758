"""Data sets and epochs for tests of the input pipeline."""

import numpy as np
from PIL import Image

from train.config import schema
from train.data import pipeline
from train.data.augmentation import policy

BATCH_SIZE = 16


def square_noise(side, seed):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def photo_image(height, width, seed):
    """Large smooth blobs of colour, as many as an image of that size has room for."""
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
                Image.fromarray(square_noise(12, seed)).save(root / part / name / f"{number:02}.png")
    return root


def to_numpy(stream):
    """All batches, each a tuple of arrays."""
    return [tuple(part.numpy() for part in batch) for batch in stream]


def make_augmentation(name, **options):
    """The augmentation with this name; options that a test does not set have the config's defaults."""
    return policy.build(name, **(schema.options(schema.GROUPS["augment"][name]()) | options))


TRAIN_OPTIONS = {
    "batch_size": BATCH_SIZE, "seed": 1, "epoch": 0, "first_batch": 0, "num_classes": 3, "balanced": False,
    "class_weights": False, "shard": pipeline.SINGLE_SHARD, "augmentation": make_augmentation("crop"),
}  # fmt: skip
EVAL_OPTIONS = {"batch_size": BATCH_SIZE, "num_classes": 3, "shard": pipeline.SINGLE_SHARD}


def train_stream(split, **options):
    return pipeline.train_batches(split, **(TRAIN_OPTIONS | options))


def eval_stream(split, **options):
    return pipeline.eval_batches(split, **(EVAL_OPTIONS | options))


def train_epoch(split, **options):
    return to_numpy(train_stream(split, **options))


def eval_epoch(split, **options):
    return to_numpy(eval_stream(split, **options))


def equal_batches(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(np.array_equal, a, b)) for a, b in zip(one, other, strict=True)
    )


def batch_images(batches):
    return np.concatenate([batch[0] for batch in batches])


def batch_labels(batches):
    return np.concatenate([batch[1] for batch in batches])


class RecordingStore:
    """A store that remembers which rows were read."""

    def __init__(self, store):
        self.store, self.rows = store, []

    def read(self, rows):
        self.rows += rows
        return self.store.read(rows)


INCEPTION = make_augmentation("inception")
