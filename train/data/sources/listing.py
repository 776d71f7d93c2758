"""The common interface of all sources: a list of examples that can be read by row."""

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

SPLITS = ("train", "validation", "test")


class Store(Protocol):
    """Reads encoded images by row; thread-safe."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Reads the encoded bytes of several rows, in this order. Raises: OSError."""

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Reads (encoded bytes, label) of several rows, in this order. Raises: OSError."""


@dataclass(frozen=True, eq=False)
class Listing:
    """N examples by row, before any of them has been read.

    classes: names in the order of the labels. names: ids of the examples. splits: official split of each example, or
    "" if there are none. error_prefix: precedes an example's name in errors. index_path: where its example index is
    stored. labels: [N], None if they are stored with the data. file_stats: int64 [N, 2], size in bytes and modification
    time in ns; None if examples are not files. identity: identifies the data beyond file_stats. problems: rows that
    can't be read, with the reason.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    splits: Sequence[str]
    store: Store
    error_prefix: str
    index_path: Path
    identity: str = ""
    labels: Sequence[int] | None = None
    file_stats: np.ndarray | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


class LazySequence(Sequence[str]):
    """Sequence over consecutive parts whose entries are computed on access, to save memory."""

    def __init__(self, counts: dict[str, int], make_entry: Callable[[str, int], str]):
        """counts: entries per part. make_entry: (part, number within the part) -> entry."""
        self._make_entry = make_entry
        self._parts = list(counts)
        self._ends = list(itertools.accumulate(counts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # a slice would have to compute its entries
        if row >= len(self):
            raise IndexError(row)
        part = bisect.bisect_right(self._ends, row)
        return self._make_entry(self._parts[part], row - (self._ends[part - 1] if part else 0))


class FileStore:
    """Reads image files by their path relative to a root."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | np.ndarray):
        self.root, self.names, self.labels = root, names, labels

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [self._read(os.path.join(self.root, self.names[row])) for row in rows]  # noqa: PTH118 - see _read

    @staticmethod
    def _read(path: str) -> bytes:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path takes as long as the reading
            return file.read()

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        return [(data, int(self.labels[row])) for row, data in zip(rows, self.read(rows), strict=True)]
