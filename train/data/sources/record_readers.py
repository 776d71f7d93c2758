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

    def __init__(self, data_sources: Sequence[Any]):
        """parts: TFDS data sources whose examples have `image` (encoded bytes) and `label`."""
        self._data_sources, self._ends = data_sources, np.cumsum([len(part) for part in data_sources])

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [data for data, _ in self.read_labelled(rows)]

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        places = np.asarray(rows, np.int64)
        which = np.searchsorted(self._ends, places, side="right")
        found: list[tuple[bytes, int]] = [(b"", -1)] * len(places)
        for part in np.unique(which):
            here = np.flatnonzero(which == part)
            start = self._ends[part - 1] if part else 0
            for place, example in zip(here, self._read_part(part, places[here] - start), strict=True):
                found[place] = example["image"], int(example["label"])
        return found

    def _read_part(self, part: int, rows: np.ndarray) -> list[dict[str, Any]]:
        try:
            return self._data_sources[part].__getitems__(rows.tolist())
        except RuntimeError as error:  # ArrayRecord's own checksums
            raise OSError(short_message(error)) from error


class TfRecords:
    """TFRecord shards. The format knows no index; theirs is made once, and kept as [N, 3]: shard, offset, length."""

    def __init__(self, shards: Sequence[Path], record_index: np.ndarray):
        self._shards, self._record_index = shards, record_index
        self._files = [os.open(path, os.O_RDONLY) for path in shards]

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [data for data, _ in self.read_labelled(rows)]

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        return [self._read_example(row) for row in rows]

    def _read_example(self, row: int) -> tuple[bytes, int]:
        from google.protobuf.message import DecodeError
        from tensorflow.core.example.example_pb2 import Example

        shard, offset, length = self._record_index[row].tolist()
        try:
            features = Example.FromString(os.pread(self._files[shard], length, offset)).features.feature
            return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
        except (DecodeError, IndexError) as error:
            raise OSError(f"{self._shards[shard]} is damaged") from error


def load_or_build_index(shards: Sequence[Path], num_records: int, index_path: Path) -> np.ndarray:
    """int64 [N, 3] (shard, offset of the data, its length) of every record; made and kept at `place` the first time.

    Raises: OSError for a damaged shard (every record is read once and held against its checksum), and where there are
    not as many as the set says.
    """
    with checksummed.exclusive(index_path):
        return (
            _load_index(index_path)
            if checksummed.is_intact(index_path)
            else _build_index(shards, num_records, index_path)
        )


def _load_index(index_path: Path) -> np.ndarray:
    return np.load(index_path, mmap_mode="r", allow_pickle=False)


def _build_index(shards: Sequence[Path], num_records: int, index_path: Path) -> np.ndarray:
    _verify_checksums(shards)
    found = np.array([entry for shard, path in enumerate(shards) for entry in _scan_shard(shard, path)], np.int64)
    found = found.reshape(-1, 3)
    if len(found) != num_records:
        raise OSError(f"{len(found):,} records instead of {num_records:,} in {', '.join(map(str, shards[:1]))}")
    with contextlib.suppress(OSError):  # where nothing can be written the next start takes longer, no more
        checksummed.write(index_path, lambda file: np.save(file, found))
        return _load_index(index_path)
    return found


def _scan_shard(shard: int, path: Path) -> list[tuple[int, int, int]]:
    """A record is its length (8 bytes), a checksum (4), the data, and another checksum (4)."""
    found, offset, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            [length] = struct.unpack("<Q", file.read(8))
            found.append((shard, offset + 12, length))
            offset += length + 16
    return found


def _verify_checksums(shards: Sequence[Path]) -> None:
    import tensorflow as tf

    for path in shards:
        try:
            for _ in tf.data.TFRecordDataset(str(path)).batch(CHUNK):
                pass
        except tf.errors.OpError as error:
            raise OSError(f"{path} is damaged: {short_message(error)}") from error


def short_message(error: Exception) -> str:
    """The first line of a library's many, without TensorFlow's names of its own functions."""
    lines = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(error)).strip().splitlines()
    return lines[0].rstrip(":.") if lines else type(error).__name__
