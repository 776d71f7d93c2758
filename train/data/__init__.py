"""Data sets by name, their three disjoint splits, and deterministic streams of batches.

    dataset = load("digits", "data", image_size=32, channels=1)
    for images, labels in pipeline.train_batches(dataset.train, batch_size=64, seed=0, epoch=0, ...): ...

From names to batches: list the examples (catalog, sources) -> validate and index each one once (ingestion) -> assign
them to splits (splits, open, dataset, fingerprint) -> make batches (decode, pixel_cache, augmentation, sampling,
pipeline).

The only package that imports TFDS. Importing it is cheap: TensorFlow and TFDS are imported where they are first used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.data.catalog import SOURCES, Source
from train.data.sources.checks import check

if TYPE_CHECKING:
    from train.data.dataset import Dataset

__all__ = ["SOURCES", "Source", "check", "load"]


def load(
    name: str,
    data_dir: str,
    *,
    image_size: int,
    channels: int,
    background: Sequence[int],
    crop_fraction: float,
    validation_fraction: float,
    test_fraction: float,
    max_bytes: int,
    max_pixels: int,
    on_error: str,
    max_skipped: int,
    on_leak: str,
    train_per_class: int | None,
    root: str | None = None,
    manual_dir: str | None = None,
    file: str | None = None,
) -> "Dataset":
    """Opens a data set; the first time, prepares it under `data_dir` and validates every example.

    name: a key of `SOURCES`. root, manual_dir, file: where the data is, each for some sources alone: the folder of the
    class folders (`folder`), or the base of relative paths (`manifest`); the folder with the manually downloaded files
    of a TFDS set; the table of `manifest`.
    image_size, channels, background, crop_fraction: see decode.ImageSpec. max_bytes, max_pixels, on_error, max_skipped:
    see ingestion.validation.Limits.
    validation_fraction, test_fraction: in (0, 1), fraction of the examples that go to a split for which the set has no
    official one. A hash of the content decides, so adding examples moves no other and equal images stay together.
    on_leak: `warn`, `drop` or `raise` for equal images in two splits or with two labels.
    train_per_class: number of training examples to keep per class; None keeps all.

    Raises: ValueError in one line, for bad arguments, unreadable files (named), no network, no space.
    """
    check(name, data_dir=data_dir, root=root, manual_dir=manual_dir, file=file)
    from train.data.decode import ImageSpec
    from train.data.ingestion.validation import Limits
    from train.data.open import open_dataset

    return open_dataset(
        name,
        data_dir,
        ImageSpec(image_size, channels, (background[0], background[1], background[2]), crop_fraction),
        Limits(max_bytes, max_pixels, on_error, max_skipped),
        on_leak,
        {"validation": validation_fraction, "test": test_fraction},
        root,
        manual_dir,
        file,
        train_per_class,
    )
