"""Index of a data set's validated examples: a memory-mapped table on disk.

An Arrow file that `pandas.read_feather` and DuckDB open, with one row per example, including broken ones:

    path    string   TFDS split and number, or the path relative to the root
    split   string   train, validation, test, or empty if the data set defines no splits
    label   int32    index of the class
    size, time  int64  bytes; modification time of the file in nanoseconds (0: not a file of its own)
    sha256  64 hexadecimal digits, of the encoded bytes
    format  string   JPEG, PNG, GIF, BMP, WEBP
    width, height  int32  pixels as stored
    plain   bool     an upright JPEG that simplejpeg decodes to the same pixels as Pillow
    likeness  uint64  difference hash of the image; 0 if it is too small or too uniform to be compared
    thumbnail  64 bytes  8x8 mean grey levels of the image
    problem string   reason why it can't be used; empty for a valid example
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from train.storage import checksummed

if TYPE_CHECKING:
    import pyarrow as pa

# Arrow's own allocator reserves 1 GiB of address space, which fails in a process with a memory limit.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

VERSION = 5  # increase it when the contents of the table, or how they are computed, change
IDENTITY = b"identity"


@dataclass(frozen=True, eq=False)
class ExampleIndex:
    """Table of examples. identity: of the validated data and limits; an index with another identity is outdated."""

    identity: str
    # Read through its buffers: Arrow's own conversions import pandas, which takes longer than all the rest.
    table: "pa.Table"
    _column_cache: dict[str, np.ndarray] = field(default_factory=dict)  # views of columns, which are slow to create

    def __len__(self) -> int:
        return self.table.num_rows

    def numeric_column(self, name: str) -> np.ndarray:
        """Returns a numeric column [N] without copying it (except booleans)."""
        if name not in self._column_cache:
            data = self.table[name].chunk(0).buffers()[1]
            if NUMERIC_COLUMNS[name] is np.bool_:
                self._column_cache[name] = (
                    np.unpackbits(np.frombuffer(data, np.uint8), count=len(self), bitorder="little") > 0
                )
            else:
                self._column_cache[name] = np.frombuffer(data, NUMERIC_COLUMNS[name])[: len(self)]
        return self._column_cache[name]

    @property
    def sha256(self) -> np.ndarray:
        """Hexadecimal digests, S64 [N]; not copied."""
        return self.bytes_column("sha256").view("S64").reshape(-1)

    @property
    def thumbnails(self) -> np.ndarray:
        """uint8 [N, 64]; not copied."""
        return self.bytes_column("thumbnail")

    def bytes_column(self, name: str) -> np.ndarray:
        """Returns a column with 64 bytes per row, uint8 [N, 64], without copying it."""
        if name not in self._column_cache:
            data = np.frombuffer(self.table[name].chunk(0).buffers()[1], np.uint8)
            self._column_cache[name] = data[: 64 * len(self)].reshape(-1, 64)
        return self._column_cache[name]

    def text_at(self, name: str, row: int) -> str:
        """Returns an entry of a text column."""
        return self.table[name][int(row)].as_py()

    def texts_at(self, name: str, rows: np.ndarray) -> list[str]:
        """Returns several entries of a text column; many times faster than one by one."""
        _, ends, texts = self.table[name].chunk(0).buffers()
        bounds = np.frombuffer(ends, np.int64)
        data = memoryview(texts)
        spans = zip(bounds[rows].tolist(), bounds[rows + 1].tolist(), strict=True)
        return [str(data[start:end], "utf-8") for start, end in spans]

    def text_equals(self, name: str, text: str) -> np.ndarray:
        """Whether each entry of a text column equals `text`: bool [N]."""
        chunk = self.table[name].chunk(0)
        encoded = np.frombuffer(text.encode(), np.uint8)
        ends = np.frombuffer(chunk.buffers()[1], np.int64)[: len(self) + 1]
        matches = np.diff(ends) == len(encoded)
        if len(encoded) and matches.any():
            rows = np.flatnonzero(matches)
            texts = np.frombuffer(chunk.buffers()[2], np.uint8)[ends[rows, None] + np.arange(len(encoded))]
            matches[rows] = (texts == encoded).all(1)
        return matches

    def valid_mask(self) -> np.ndarray:
        """Whether each example is valid: bool [N]."""
        return self.text_equals("problem", "")

    def rows_in_split(self, split: str) -> np.ndarray:
        """Rows of the valid examples of a split, ascending: int64."""
        return np.flatnonzero(self.text_equals("split", split) & self.valid_mask())

    def has_split(self, split: str) -> bool:
        """Whether the split has any example, including broken ones."""
        return bool(self.text_equals("split", split).any())

    def problems(self) -> list[tuple[int, str]]:
        """Lists (row, reason) of each broken example."""
        rows = np.flatnonzero(~self.valid_mask())
        return [(row, self.text_at("problem", row)) for row in rows.tolist()]


class TextColumn(Sequence[str]):
    """A text column of an index, read from disk entry by entry."""

    def __init__(self, index: ExampleIndex, name: str):
        self._column = index.table[name]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # entries are read one by one, without slices
        return self._column[int(row)].as_py()


NUMERIC_COLUMNS = {
    "label": np.int32, "size": np.int64, "time": np.int64, "width": np.int32, "height": np.int32, "plain": np.bool_,
    "likeness": np.uint64,
}  # fmt: skip
BYTES_COLUMNS = ("sha256", "thumbnail")
TEXT_COLUMNS = ("format", "problem")


class ExampleIndexBuilder:
    """Collects the columns of an index, except names and splits; a million rows take 200 MB."""

    def __init__(self, rows: int):
        self.numeric_columns: dict[str, np.ndarray] = {
            name: np.zeros(rows, dtype) for name, dtype in NUMERIC_COLUMNS.items()
        }
        self.bytes_columns = {name: np.zeros((rows, 64), np.uint8) for name in BYTES_COLUMNS}
        self.text_columns = {name: [""] * rows for name in TEXT_COLUMNS}

    def set_row(self, row: int, **entries: object) -> None:
        """Sets some columns of a row: texts, bytes or numbers."""
        for name, entry in entries.items():
            if isinstance(entry, bytes):
                self.bytes_columns[name][row] = np.frombuffer(entry, np.uint8)
            elif isinstance(entry, str):
                self.text_columns[name][row] = entry
            else:
                self.numeric_columns[name][row] = entry

    def copy_rows(self, rows: np.ndarray, previous: ExampleIndex, previous_rows: np.ndarray) -> None:
        """Copies rows from a previous index."""
        for name, column in self.numeric_columns.items():
            column[rows] = previous.numeric_column(name)[previous_rows]
        for name, fixed in self.bytes_columns.items():
            fixed[rows] = previous.bytes_column(name)[previous_rows]
        for name, texts in self.text_columns.items():
            for row, text in zip(rows.tolist(), previous.table[name].take(previous_rows).to_pylist(), strict=True):
                texts[row] = text

    def build(self, identity: str, names: Sequence[str], splits: Sequence[str]) -> ExampleIndex:
        import pyarrow as pa

        fixed = {
            name: pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), len(column), [None, pa.py_buffer(column)])
            for name, column in self.bytes_columns.items()
        }
        texts = {"path": names, "split": splits, **self.text_columns}
        columns = {name: pa.array(entries, pa.large_string()) for name, entries in texts.items()}
        columns |= {name: pa.array(column) for name, column in self.numeric_columns.items()} | fixed
        return ExampleIndex(identity, pa.table(columns).replace_schema_metadata({IDENTITY: identity.encode()}))


def index_path_for(data_dir: str, name: str, source_path: Path) -> Path:
    """Path of the index of the data set `name` that is read from `source_path`."""
    digest = hashlib.sha256(os.fsencode(source_path.resolve())).hexdigest()[:16]
    return Path(data_dir) / ".index" / f"{name}-{digest}.v{VERSION}.arrow"


def read(path: Path) -> ExampleIndex | None:
    """Memory-maps a stored index; returns None if there is none or the file is damaged."""
    import pyarrow as pa

    if not checksummed.is_intact(path):
        return None
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return ExampleIndex(table.schema.metadata[IDENTITY].decode(), table)


def write(path: Path, index: ExampleIndex) -> ExampleIndex:
    """Writes an index and returns it memory-mapped, or unchanged if it can't be written."""
    import pyarrow as pa

    def fill(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, index.table.schema) as writer:
            writer.write_table(index.table, max_chunksize=max(1, len(index)))

    with contextlib.suppress(OSError):
        checksummed.write(path, fill)
    return read(path) or index
