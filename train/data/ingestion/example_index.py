"""What was found out about every example of a data set: a table on disk, looked up there and not held in memory.

An Arrow file that `pandas.read_feather` and DuckDB open, one row per example, broken ones too:

    path    string   TFDS part and number, or the path relative to the root
    split   string   train, validation, test, or empty where the set does not say
    label   int32    index of the class
    size, time  int64  bytes; when the file was last changed, in nanoseconds (0: not a file of its own)
    sha256  64 hexadecimal digits, of the encoded bytes
    format  string   JPEG, PNG, GIF, BMP, WEBP
    width, height  int32  pixels as stored
    plain   bool     an upright JPEG that simplejpeg decodes to the same pixels as Pillow
    likeness  uint64  difference hash of the picture; 0 where it is too small or too flat to be compared
    thumbnail  64 bytes  8x8 mean greys of the picture
    problem string   why it can't be used; empty: it can
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.storage import checksummed

# Arrow's own allocator reserves 1 GiB of addresses, which a process under a limit may not have.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

VERSION = 5  # raised when what the table says, or how it is found out, changes
IDENTITY = b"identity"


@dataclass(frozen=True, eq=False)
class ExampleIndex:
    """identity: of what was looked at; another identity means that it has to be looked at again."""

    identity: str
    table: Any  # read out of its buffers: Arrow's own conversions load pandas, which takes longer than all the rest
    _column_cache: dict[str, np.ndarray] = field(default_factory=dict)  # views of columns, which take a while to make

    def __len__(self) -> int:
        return self.table.num_rows

    def numeric_column(self, name: str) -> np.ndarray:
        """A column of numbers, [N]; not copied, except that of truths."""
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
        """S64 [N]; not copied."""
        return self.bytes_column("sha256").view("S64").reshape(-1)

    @property
    def thumbnails(self) -> np.ndarray:
        """uint8 [N, 64]; not copied."""
        return self.bytes_column("thumbnail")

    def bytes_column(self, name: str) -> np.ndarray:
        """A column of 64 bytes each, uint8 [N, 64]; not copied."""
        if name not in self._column_cache:
            data = np.frombuffer(self.table[name].chunk(0).buffers()[1], np.uint8)
            self._column_cache[name] = data[: 64 * len(self)].reshape(-1, 64)
        return self._column_cache[name]

    def text_at(self, name: str, row: int) -> str:
        """The entry of a column of texts."""
        return self.table[name][int(row)].as_py()

    def texts_at(self, name: str, rows: np.ndarray) -> list[str]:
        """The entries of several rows; many times quicker than one by one."""
        _, ends, texts = self.table[name].chunk(0).buffers()
        bounds, data = np.frombuffer(ends, np.int64), memoryview(texts)
        places = zip(bounds[rows].tolist(), bounds[rows + 1].tolist(), strict=True)
        return [str(data[start:end], "utf-8") for start, end in places]

    def text_equals(self, name: str, text: str) -> np.ndarray:
        """bool [N]: where a column of texts has this one."""
        chunk, wanted = self.table[name].chunk(0), np.frombuffer(text.encode(), np.uint8)
        ends = np.frombuffer(chunk.buffers()[1], np.int64)[: len(self) + 1]
        found = np.diff(ends) == len(wanted)
        if len(wanted) and found.any():
            rows = np.flatnonzero(found)
            texts = np.frombuffer(chunk.buffers()[2], np.uint8)[ends[rows, None] + np.arange(len(wanted))]
            found[rows] = (texts == wanted).all(1)
        return found

    def valid_mask(self) -> np.ndarray:
        """bool [N]: without a problem."""
        return self.text_equals("problem", "")

    def rows_in_split(self, split: str) -> np.ndarray:
        """int64: rows of a split without a problem, in order."""
        return np.flatnonzero(self.text_equals("split", split) & self.valid_mask())

    def has_split(self, split: str) -> bool:
        """Whether any example is of this split, broken ones too."""
        return bool(self.text_equals("split", split).any())

    def problems(self) -> list[tuple[int, str]]:
        """(row, reason) of every example that can't be used."""
        rows = np.flatnonzero(~self.valid_mask())
        return [(row, self.text_at("problem", row)) for row in rows.tolist()]


class TextColumn(Sequence[str]):
    """A column of texts, looked up where it lies."""

    def __init__(self, index: ExampleIndex, name: str):
        self._column = index.table[name]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        return self._column[int(row)].as_py()


NUMERIC_COLUMNS = {
    "label": np.int32, "size": np.int64, "time": np.int64, "width": np.int32, "height": np.int32, "plain": np.bool_,
    "likeness": np.uint64,
}  # fmt: skip
BYTES_COLUMNS = ("sha256", "thumbnail")
TEXT_COLUMNS = ("format", "problem")


class ExampleIndexBuilder:
    """Verdicts in the making, all columns but the names' and the splits'; a million rows take 200 MB."""

    def __init__(self, rows: int):
        self.numeric_columns: dict[str, np.ndarray] = {
            name: np.zeros(rows, kind) for name, kind in NUMERIC_COLUMNS.items()
        }
        self.bytes_columns = {name: np.zeros((rows, 64), np.uint8) for name in BYTES_COLUMNS}
        self.text_columns = {name: [""] * rows for name in TEXT_COLUMNS}

    def set_row(self, row: int, **entries: Any) -> None:
        """Entries by column; the others stay as they are."""
        for name, entry in entries.items():
            if name in BYTES_COLUMNS:
                self.bytes_columns[name][row] = np.frombuffer(entry, np.uint8)
            else:
                (self.numeric_columns if name in NUMERIC_COLUMNS else self.text_columns)[name][row] = entry

    def copy_rows(self, rows: np.ndarray, previous: ExampleIndex, previous_rows: np.ndarray) -> None:
        """Takes the entries of earlier rows over."""
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
    """Where the verdicts over the data set `name`, read from `where`, are kept."""
    place = hashlib.sha256(os.fsencode(source_path.resolve())).hexdigest()[:16]
    return Path(data_dir) / ".index" / f"{name}-{place}.v{VERSION}.arrow"


def read(path: Path) -> ExampleIndex | None:
    """The stored verdicts, mapped into memory; None when there are none or the file is not what was written."""
    import pyarrow as pa

    if not checksummed.is_intact(path):
        return None
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return ExampleIndex(table.schema.metadata[IDENTITY].decode(), table)


def write(path: Path, index: ExampleIndex) -> ExampleIndex:
    """Stores them and gives them back mapped; where nothing can be written, as they are."""
    import pyarrow as pa

    def fill(file: Any) -> None:
        with pa.ipc.new_file(file, index.table.schema) as writer:
            writer.write_table(index.table, max_chunksize=max(1, len(index)))

    with contextlib.suppress(OSError):
        checksummed.write(path, fill)
    return read(path) or index
