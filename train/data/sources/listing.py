"""What every source hands over before anything is looked at: a list of examples that can be read by row."""

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "validation", "test")


class Store(Protocol):
    """Encoded images by row; may be read by several threads at once."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded bytes of several rows, in their order. Raises: OSError."""

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """The same with their labels."""


@dataclass(frozen=True, eq=False)
class Listing:
    """N examples by row, of which nothing is known yet but their names.

    classes: names in the order of the labels. names: ids of the examples. splits: each one's official part, "" where
    the set does not say. origin: what an error puts before a name. index: where verdicts over it are kept. labels:
    [N], where they do not come with the data. stamps: int64 [N, 2], size in bytes and time of the last change in ns, of
    files of their own. identity: of everything that these do not cover. problems: reasons why a row need not even be
    read.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    splits: Sequence[str]
    store: Store
    error_prefix: str
    index_path: Path
    identity: str = ""
    labels: Any = None
    file_stats: np.ndarray | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


class LazySequence(Sequence[str]):
    """What `say` tells of every row of parts that lie one after the other; nothing is held in memory."""

    def __init__(self, counts: dict[str, int], make_entry: Callable[[str, int], str]):
        """say: (part, number within the part) -> entry."""
        self._make_entry, self._parts = make_entry, list(counts)
        self._ends = list(itertools.accumulate(counts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: Any) -> Any:
        if row >= len(self):
            raise IndexError(row)
        part = bisect.bisect_right(self._ends, row)
        return self._make_entry(self._parts[part], row - (self._ends[part - 1] if part else 0))


class FileStore:
    """Images under a root by their relative path."""

    def __init__(self, root: Path, names: Sequence[str], labels: Any):
        self.root, self.names, self.labels = root, names, labels

    def read(self, rows: Sequence[int]) -> list[bytes]:
        return [self._read(os.path.join(self.root, self.names[row])) for row in rows]  # noqa: PTH118 - see _read

    @staticmethod
    def _read(path: str) -> bytes:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path takes as long as the reading
            return file.read()

    def read_labelled(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        return [(data, int(self.labels[row])) for row, data in zip(rows, self.read(rows), strict=True)]
