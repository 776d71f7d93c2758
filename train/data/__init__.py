"""Data: a data set by name, its three disjoint parts, and deterministic streams of batches.

    dataset = load("digits", "data", image_size=32, channels=1)
    for images, labels in pipeline.train_batches(dataset.train, batch_size=64, seed=0, epoch=0, ...): ...

The only room that knows TFDS. Importing it is cheap: TensorFlow and TFDS are imported where they are first needed.
"""

from typing import TYPE_CHECKING

from train.data.check import check
from train.data.source import SOURCES, Source

if TYPE_CHECKING:
    from train.data.dataset import Dataset

__all__ = ["SOURCES", "Source", "check", "load"]


def load(
    name: str,
    data_dir: str,
    image_size: int,
    channels: int,
    root: str | None = None,
    manual_dir: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
) -> "Dataset":
    """Opens a data set, preparing it under `data_dir` the first time.

    name: a key of `SOURCES`. root: the class folders of `folder`. manual_dir: files of a TFDS set fetched by hand.
    image_size: side in pixels of the square that every image becomes; channels: 1 (grey) or 3 (RGB).
    validation_fraction, test_fraction: in (0, 1), share of the examples that a part gets where the set has no official
    one; what falls into it is decided by content, so adding examples moves no other and equal images stay together.

    Raises: ValueError in one line, for bad arguments, files that can't be read (named), no network, no space.
    """
    check(name, root=root, manual_dir=manual_dir, data_dir=data_dir)
    from train.data.dataset import open_dataset

    return open_dataset(name, data_dir, image_size, channels, root, manual_dir, validation_fraction, test_fraction)
