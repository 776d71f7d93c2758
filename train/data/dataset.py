"""A data set cut into train, validation and test."""

import hashlib
import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from train.data.decode import decode_resized
from train.data.fingerprint import fingerprint, sha256
from train.data.folder import load_folder
from train.data.parts import Part, Store
from train.data.prepared import load_prepared
from train.runtime import cores

NAMES = ("train", "validation", "test")
CHUNK = 256  # examples that a thread reads at once
TINY_BYTES = 4096  # encoded


@dataclass(frozen=True, eq=False)
class Split:
    """Examples 0..N-1 of one part.

    labels: int32 [N]. sha256: S64 [N], hexadecimal, of the encoded bytes. rows: int64 [N], their places in the store.
    """

    name: str
    store: Store
    rows: np.ndarray
    labels: np.ndarray
    sha256: np.ndarray
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """TFDS part and index, or the path relative to the root, of every example."""
        return tuple(self.store.name(row) for row in self.rows)

    @property
    def decoded_bytes(self) -> int:
        """Size of all examples as pixels."""
        return len(self) * self.image_size**2 * self.channels

    def example(self, index: int) -> np.ndarray:
        """Decoded example, uint8 [image_size, image_size, channels] in 0..255.

        Raises: ValueError that names the example, when it can't be read or is not what was fingerprinted.
        """
        try:
            return self._decode(index, self.store.read(self.rows[index]))
        except OSError as error:
            raise self._unreadable(index, error) from error

    @cached_property
    def images(self) -> Any:
        """All examples as one uint8 tensor [N, image_size, image_size, channels] in host memory; decoded once.

        Raises: ValueError as `example`.
        """
        import tensorflow as tf

        pixels = np.empty((len(self), self.image_size, self.image_size, self.channels), dtype=np.uint8)
        with ThreadPoolExecutor(self._decoders()) as pool:
            for _ in pool.map(lambda start: self._fill(pixels, start), range(0, len(self), CHUNK)):
                pass
        with tf.device("CPU:0"):
            return tf.constant(pixels)

    def _decoders(self) -> int:
        # Threads that decode tiny images only wait for the interpreter's lock: two took 1.5 times as long as one.
        return 1 if len(self.store.read(self.rows[0])) < TINY_BYTES else cores()

    def _fill(self, pixels: np.ndarray, start: int) -> None:
        rows = self.rows[start : start + CHUNK].tolist()
        try:
            encoded = self.store.read_many(rows)
        except OSError:
            encoded = [b""] * len(rows)  # one by one then, to name the one
        for index, data in enumerate(encoded, start):
            pixels[index] = self._decode(index, data) if data else self.example(index)

    def _decode(self, index: int, data: bytes) -> np.ndarray:
        try:
            if sha256(data) != self.sha256[index]:
                raise ValueError("changed since the data set was opened")
            return decode_resized(data, self.image_size, self.channels)
        except ValueError as error:
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> ValueError:
        place = self.store.where(self.rows[index])
        return ValueError(f"every example must be readable, got {place} ({error}); use the data as it was")


@dataclass(frozen=True, eq=False)
class Dataset:
    """classes: names in the order of the labels. fingerprint: hexadecimal, over every (split, id, content, label)."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str

    @property
    def counts(self) -> dict[str, int]:
        """Examples per split."""
        return {split.name: len(split) for split in (self.train, self.validation, self.test)}


def open_dataset(
    name: str,
    data_dir: str,
    image_size: int,
    channels: int,
    root: str | None,
    manual_dir: str | None,
    validation_fraction: float,
    test_fraction: float,
) -> Dataset:
    """`train.data.load` behind its checks."""
    _check_numbers(image_size, channels, validation_fraction, test_fraction)
    if root is not None:
        classes, parts = load_folder(root, data_dir)
    else:
        classes, parts = load_prepared(name, data_dir, manual_dir)
    places = cut(parts, {"validation": validation_fraction, "test": test_fraction})
    splits = {split: _split(split, part, rows, image_size, channels) for split, (part, rows) in places.items()}
    if root is not None and len(parts) > 1:
        _check_disjoint(splits)
    return Dataset(name, classes, **splits, fingerprint=fingerprint(_lines(splits.values())))


def _check_disjoint(splits: dict[str, Split]) -> None:
    """Raises: ValueError when an image of one of the user's own parts is in another one, too."""
    for one, other in itertools.combinations(splits.values(), 2):
        shared = np.flatnonzero(np.isin(other.sha256, one.sha256))
        if len(shared):
            raise ValueError(
                f"data.root must hold every image in one part only, got {len(shared)} of {other.name} in {one.name} "
                f"as well (first: {other.ids[shared[0]]}); use each image once"
            )


def cut(parts: dict[str, Part], fractions: dict[str, float]) -> dict[str, tuple[Part, np.ndarray]]:
    """Rows of every split: official parts as they are, missing ones cut from train by content.

    An example's place is a hash of its own bytes: adding examples moves no other, and equal images stay together.
    Raises: ValueError when a split would be empty.
    """
    place = positions(parts["train"].sha256)
    rest, start = np.ones(len(place), dtype=bool), 0.0
    places: dict[str, tuple[Part, np.ndarray]] = {}
    for split in ("test", "validation"):
        if split in parts:
            places[split] = (parts[split], np.arange(len(parts[split].labels)))
            continue
        taken = (place >= start) & (place < start + fractions[split])
        places[split], rest, start = (parts["train"], np.flatnonzero(taken)), rest & ~taken, start + fractions[split]
    places["train"] = (parts["train"], np.flatnonzero(rest))
    _refuse_empty(places)
    return {split: places[split] for split in NAMES}


def positions(contents: np.ndarray) -> np.ndarray:
    """Where examples lie in [0, 1): float64 [N] from SHA-256s (S64 [N]) by hashing once more."""
    heads = (hashlib.sha256(b"split" + bytes.fromhex(content.decode())).digest()[:8] for content in contents)
    return np.array([int.from_bytes(head, "big") / 2**64 for head in heads])


def _refuse_empty(places: dict[str, tuple[Part, np.ndarray]]) -> None:
    for split, (part, rows) in places.items():
        if not len(rows):
            raise ValueError(
                f"data.{split} must have at least one example, got none of {len(part.labels)}; use more images, "
                f"a larger fraction, or a folder {split}/ of your own above the classes"
            )


def _split(name: str, part: Part, rows: np.ndarray, image_size: int, channels: int) -> Split:
    return Split(name, part.store, rows, part.labels[rows], part.sha256[rows], image_size, channels)


def _lines(splits: Iterable[Split]) -> Iterable[tuple[str, str, bytes, int]]:
    for split in splits:
        for name, content, label in zip(split.ids, split.sha256.tolist(), split.labels.tolist(), strict=True):
            yield split.name, name, content, label


def _check_numbers(image_size: int, channels: int, validation: float, test: float) -> None:
    if image_size < 1:
        raise ValueError(f"data.image_size must be at least 1 pixel, got {image_size}; use data.image_size=32")
    if channels not in (1, 3):
        raise ValueError(f"data.channels must be 1 or 3, got {channels}; use data.channels=1")
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(
            f"validation and test fraction must be above 0 and below 1 together, got {validation} and {test}; "
            "use 0.1 and 0.2"
        )
