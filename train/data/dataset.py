"""A data set and its splits: train, validation and test."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from train.data.decode import ImageSpec, decode, decode_and_resize, decode_jpeg
from train.data.example_error import ExampleError
from train.data.fingerprint import digest
from train.data.ingestion.example_index import ExampleIndex
from train.data.sources.listing import Store

CHUNK = 10_000  # rows that are read from the index at once


@dataclass(frozen=True, eq=False)
class Split:
    """The examples 0..N-1 of one split.

    store, example_index: cover the whole data set, by row. indices: int64 [N], rows of the examples. labels: int32 [N].
    error_prefix: precedes an example's name in errors. cache_dir: directory of the disk caches of decoded pixels.
    cache_mode: memory, disk, none or files (see train.data.pixel_cache).
    """

    name: str
    store: Store
    example_index: ExampleIndex
    indices: np.ndarray
    labels: np.ndarray
    image_spec: ImageSpec
    error_prefix: str
    cache_dir: Path
    cache_mode: str = "memory"

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sha256(self) -> np.ndarray:
        """SHA-256 of the encoded bytes, hexadecimal: S64 [N]."""
        return self.example_index.sha256[self.indices]

    @cached_property
    def digest(self) -> str:
        """Order-independent digest over (id, SHA-256, label) of all examples."""
        return digest(chain.from_iterable(map(self._digest_entries, range(0, len(self), CHUNK))))

    def _digest_entries(self, start: int) -> Iterator[tuple[str, bytes, int]]:
        """Yields (id, SHA-256, label) of the examples in the chunk that begins at `start`."""
        rows, labels = self.indices[start : start + CHUNK], self.labels[start : start + CHUNK]
        return zip(
            self.example_index.texts_at("path", rows),
            self.example_index.sha256[rows].tolist(),
            labels.tolist(),
            strict=True,
        )

    def example_id(self, index: int) -> str:
        """TFDS split and number, or the path relative to the root."""
        return self.example_index.text_at("path", self.indices[index])

    def read(self, indices: Iterable[int]) -> list[bytes]:
        """Reads the encoded bytes of several examples.

        Raises: ExampleError for the first example that can't be read or has changed since it was indexed.
        """
        indices = list(indices)
        encoded: Iterable[bytes]
        try:
            encoded = self.store.read([int(self.indices[index]) for index in indices])
        except OSError:
            encoded = map(self._read_one, indices)  # each is verified before the next is read: the first error counts
        return list(self._verify(indices, encoded))

    def load_example(self, index: int) -> np.ndarray:
        """Reads and decodes an example: uint8 [image_size, image_size, channels] in 0..255. Raises: see `read`."""
        return self.decode(index, self.read([index])[0])

    def is_fast_jpeg(self, index: int) -> bool:
        """Whether `decode_jpeg_scaled` and `decode_full` decode the example to the same pixels."""
        return self.image_spec.channels == 3 and bool(self.example_index.numeric_column("plain")[self.indices[index]])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels as stored, before EXIF rotation."""
        row = self.indices[index]
        return self.example_index.numeric_column("height")[row], self.example_index.numeric_column("width")[row]

    def decode(self, index: int, data: bytes) -> np.ndarray:
        """Decodes its bytes and resizes them to the image spec. Raises: ExampleError."""
        return self._decode_or_raise(index, lambda: decode_and_resize(data, self.image_spec))

    def decode_full(self, index: int, data: bytes) -> np.ndarray:
        """Decodes its bytes at full size: uint8 [H, W, channels]. Raises: ExampleError."""
        return self._decode_or_raise(
            index, lambda: decode(data, self.image_spec.channels, self.image_spec.background, max_pixels=None)
        )

    def decode_jpeg_scaled(self, index: int, data: bytes, scale_denom: int) -> np.ndarray:
        """Decodes a fast JPEG at 1/scale_denom of its size: uint8 [H, W, 3]. Raises: ExampleError."""
        return self._decode_or_raise(index, lambda: decode_jpeg(data, scale_denom))

    def error(self, index: int, reason: str, advice: str = "restore the file") -> ExampleError:
        """Makes the error of an example that can't be read. reason: what is wrong. advice: what to do."""
        example_id = self.example_id(index)
        name = f"{self.error_prefix}{example_id}"
        return ExampleError(name, split=self.name, example_id=example_id, reason=reason, advice=advice)

    def _decode_or_raise(self, index: int, decoder: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return decoder()
        except ValueError as error:
            raise self.error(index, str(error)) from error

    def _read_one(self, index: int) -> bytes:
        try:
            return self.store.read([int(self.indices[index])])[0]
        except OSError as error:
            raise self.error(index, error.strerror or str(error)) from error

    def _verify(self, indices: list[int], encoded: Iterable[bytes]) -> Iterator[bytes]:
        """Yields encoded bytes whose SHA-256 is the indexed one. Raises: ExampleError."""
        digests = self.example_index.sha256
        for index, data in zip(indices, encoded, strict=True):
            if hashlib.sha256(data).hexdigest().encode() != digests[self.indices[index]]:
                raise self.error(index, "changed since it was indexed")
            yield data


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its three splits.

    classes: names in the order of the labels. fingerprint: hexadecimal digest over (split, id, SHA-256, label) of all
    examples. notes: messages and warnings for the user. skipped: (id, reason) of each example left out. leak_counts:
    number of duplicates by kind.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    leak_counts: dict[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        return {split.name: split for split in (self.train, self.validation, self.test)}

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of examples per split."""
        return {name: len(split) for name, split in self.splits.items()}

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """Number of examples of each class per split."""
        return {
            name: np.bincount(split.labels, minlength=len(self.classes)).tolist() for name, split in self.splits.items()
        }
