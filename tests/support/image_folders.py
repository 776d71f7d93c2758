"""Data sets for tests: digits, and folders of small images."""

import numpy as np
from PIL import Image

import train.data

DIGITS_FINGERPRINT = "9394412a559e0ae377593c7ee5a5b60fc6b95adae6de4a362d77f1d781d23e12"
FORMATS = "not an image in a supported format (JPEG, PNG, GIF, BMP, WEBP)"


# Of a test that says nothing else.
LOAD_OPTIONS = {
    "background": (255, 255, 255), "crop_fraction": 1.0, "validation_fraction": 0.1, "test_fraction": 0.2,
    "max_bytes": 2**26, "max_pixels": 50_000_000, "on_error": "raise", "max_skipped": 100, "on_leak": "warn",
    "train_per_class": None,
}  # fmt: skip


def load_dataset(name, data_dir, **options):
    return train.data.load(name, str(data_dir), **(LOAD_OPTIONS | options))


def load_digits(data_dir, **options):
    return load_dataset("digits", data_dir, **({"image_size": 8, "channels": 1} | options))


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


def load_folder(root, tmp_path, **options):
    return load_dataset("folder", tmp_path / "data", image_size=4, channels=3, root=str(root), **options)


def example_ids(split):
    return [split.example_id(index) for index in range(len(split))]


def splits_by_id(loaded):
    """The split name of every example, by id."""
    return {name: split.name for split in loaded.splits.values() for name in example_ids(split)}


def unreadable_message(count, total, named, advice=None):
    """The message about examples that cannot be read."""
    advice = advice or f"data.on_error=skip data.max_skipped={count} to leave them out"
    return f"{count} of {total} images cannot be read: {named}; fix or remove them, or set {advice}"


MNIST_FILES = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
)


def flipped(data, position):
    """`data` with all bits of one byte inverted."""
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]
