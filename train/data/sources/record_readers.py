"""Readers of prepared TFDS data by row, for ArrayRecord and TFRecord."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from train.storage import checksummed

CHUNK = 1024  # records that are verified at once


class Record(TypedDict):
    """A record of prepared data whose image is not decoded."""

    image: bytes
    label: np.integer


class DataSource(Protocol):
    """A split as TFDS reads it from ArrayRecord."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Record]:
        """Raises: RuntimeError if a checksum does not match."""


class ArrayRecords:
    """Reads concatenated ArrayRecord splits; the format has an index and verifies checksums on reading."""

    def __init__(self, data_sources: Sequence[DataSource]):
        self._data_sources = data_sources
        self._ends = np.cumsum([len(source) for source in data_sources])

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [data for data, _ in self.read_labelled(rows)]

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        row_array = np.asarray(rows, np.int64)
        source_of_row = np.searchsorted(self._ends, row_array, side="right")
        examples: list[tuple[bytes, int]] = [(b"", -1)] * len(row_array)
        for source in np.unique(source_of_row):
            positions = np.flatnonzero(source_of_row == source)
            start = self._ends[source - 1] if source else 0
            records = self._read_source(source, row_array[positions] - start)
            for position, record in zip(positions, records, strict=True):
                examples[position] = record["image"], int(record["label"])
        return examples

    def _read_source(self, source: int, rows: np.ndarray) -> Sequence[Record]:
        try:
            return self._data_sources[source].__getitems__(rows.tolist())
        except RuntimeError as error:  # a checksum of ArrayRecord does not match
            raise OSError(short_message(error)) from error


class TfRecords:
    """Reads TFRecord shards. The format has no index; `load_or_build_index` provides one: shard, offset, length.

    Why they are not converted to ArrayRecord instead: TFRecord is what TFDS itself prepares by default, so that sets
    which are there already, often for all users of a machine and not writable, are mostly of this format. A copy would
    take their space once more (ImageNet: 160 GB) and hours, for reading that is not faster; the index is 24 bytes a
    record.
    """

    def __init__(self, shards: Sequence[Path], record_index: np.ndarray):
        self._shards = shards
        self._record_index = record_index
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
    """Returns int64 [N, 3] (shard, offset of the data, length) of all records; built and stored the first time.

    Raises: OSError for a damaged shard (building the index verifies the checksums of all records) or a wrong number of
    records.
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
    entries = [entry for shard, path in enumerate(shards) for entry in _scan_shard(shard, path)]
    index = np.array(entries, np.int64).reshape(-1, 3)
    if len(index) != num_records:
        raise OSError(f"{len(index):,} records instead of {num_records:,} in {', '.join(map(str, shards[:1]))}")
    with contextlib.suppress(OSError):  # if it can't be written, the next start just takes longer
        checksummed.write(index_path, lambda file: np.save(file, index))
        return _load_index(index_path)
    return index


def _scan_shard(shard: int, path: Path) -> list[tuple[int, int, int]]:
    """Lists (shard, offset, length). A record is its length (8 bytes), a checksum (4), the data and a checksum (4)."""
    entries = []
    offset = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            [length] = struct.unpack("<Q", file.read(8))
            entries.append((shard, offset + 12, length))
            offset += length + 16
    return entries


def _verify_checksums(shards: Sequence[Path]) -> None:
    import tensorflow as tf

    for path in shards:
        try:
            for _ in tf.data.TFRecordDataset(str(path)).batch(CHUNK):
                pass
        except tf.errors.OpError as error:
            raise OSError(f"{path} is damaged: {short_message(error)}") from error


def short_message(error: Exception) -> str:
    """Returns the first line of a library's error, without TensorFlow's function names."""
    lines = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(error)).strip().splitlines()
    return lines[0].rstrip(":.") if lines else type(error).__name__
