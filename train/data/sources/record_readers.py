"""Prepared TFDS examples by row, from either of its file formats."""

import contextlib
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.storage import checksummed

CHUNK = 1024


class ArrayRecords:
    """Parts one after the other; ArrayRecord is made for reading by index and checks what it reads."""

    def __init__(self, parts: Sequence[Any]):
        """parts: TFDS data sources whose examples have `image` (encoded bytes) and `label`."""
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [data for data, _ in self.read_labelled(rows)]

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        places = np.asarray(rows, np.int64)
        which = np.searchsorted(self._ends, places, side="right")
        found: list[tuple[bytes, int]] = [(b"", -1)] * len(places)
        for part in np.unique(which):
            here = np.flatnonzero(which == part)
            start = self._ends[part - 1] if part else 0
            for place, example in zip(here, self._examples(part, places[here] - start), strict=True):
                found[place] = example["image"], int(example["label"])
        return found

    def _examples(self, part: int, rows: np.ndarray) -> list[dict[str, Any]]:
        try:
            return self._parts[part].__getitems__(rows.tolist())
        except RuntimeError as error:  # ArrayRecord's own checksums
            raise OSError(short(error)) from error


class TfRecords:
    """TFRecord shards. The format knows no index; theirs is made once, and kept as [N, 3]: shard, offset, length."""

    def __init__(self, shards: Sequence[Path], places: np.ndarray):
        self._shards, self._places = shards, places
        self._files = [os.open(path, os.O_RDONLY) for path in shards]

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [data for data, _ in self.read_labelled(rows)]

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        return [self._example(row) for row in rows]

    def _example(self, row: int) -> tuple[bytes, int]:
        from google.protobuf.message import DecodeError
        from tensorflow.core.example.example_pb2 import Example

        shard, offset, length = self._places[row].tolist()
        try:
            features = Example.FromString(os.pread(self._files[shard], length, offset)).features.feature
            return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
        except (DecodeError, IndexError) as error:
            raise OSError(f"{self._shards[shard]} is damaged") from error


def index_of(shards: Sequence[Path], records: int, place: Path) -> np.ndarray:
    """int64 [N, 3] (shard, offset of the data, its length) of every record; made and kept at `place` the first time.

    Raises: OSError for a damaged shard (every record is read once and held against its checksum), and where there are
    not as many as the set says.
    """
    with checksummed.alone(place):
        return _there(place) if checksummed.is_whole(place) else _made(shards, records, place)


def _there(place: Path) -> np.ndarray:
    return np.load(place, mmap_mode="r", allow_pickle=False)


def _made(shards: Sequence[Path], records: int, place: Path) -> np.ndarray:
    _check_all(shards)
    found = np.array([entry for shard, path in enumerate(shards) for entry in _entries(shard, path)], np.int64)
    found = found.reshape(-1, 3)
    if len(found) != records:
        raise OSError(f"{len(found):,} records instead of {records:,} in {', '.join(map(str, shards[:1]))}")
    with contextlib.suppress(OSError):  # where nothing can be written the next start takes longer, no more
        checksummed.write(place, lambda file: np.save(file, found))
        return _there(place)
    return found


def _entries(shard: int, path: Path) -> list[tuple[int, int, int]]:
    """A record is its length (8 bytes), a checksum (4), the data, and another checksum (4)."""
    found, offset, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            [length] = struct.unpack("<Q", file.read(8))
            found.append((shard, offset + 12, length))
            offset += length + 16
    return found


def _check_all(shards: Sequence[Path]) -> None:
    import tensorflow as tf

    for path in shards:
        try:
            for _ in tf.data.TFRecordDataset(str(path)).batch(CHUNK):
                pass
        except tf.errors.OpError as error:
            raise OSError(f"{path} is damaged: {short(error)}") from error


def short(error: Exception) -> str:
    """The first line of a library's many, without TensorFlow's names of its own functions."""
    lines = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(error)).strip().splitlines()
    return lines[0].rstrip(":.") if lines else type(error).__name__
