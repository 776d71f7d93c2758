"""Digests of examples and data sets, and the index that spares a second reading."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

INDEX_VERSION = 1  # raised when what an index says, or how it is checked, changes


def sha256(data: bytes) -> bytes:
    """Hexadecimal SHA-256 as bytes, as it lies in arrays of dtype S64."""
    return hashlib.sha256(data).hexdigest().encode()


def fingerprint(lines: Iterable[tuple[str, str, bytes, int]]) -> str:
    """Hexadecimal SHA-256 over the sorted lines (split, id, SHA-256 of the encoded bytes, label).

    The fields are joined by NUL, which no file name can hold, so that no two sets write the same lines.
    """
    digest = hashlib.sha256()
    for line in sorted(_line(*fields) for fields in lines):
        digest.update(line)
    return digest.hexdigest()


def _line(split: str, name: str, content: bytes, label: int) -> bytes:
    return b"\0".join((split.encode(), os.fsencode(name), content, str(label).encode())) + b"\n"


def index_path(data_dir: str, name: str, where: Path) -> Path:
    """Where the index of the data set `name`, read from `where`, is kept."""
    place = hashlib.sha256(os.fsencode(where.resolve())).hexdigest()[:16]
    return Path(data_dir) / ".index" / f"{name}-{place}.v{INDEX_VERSION}.npz"


def read_index(path: Path) -> dict[str, np.ndarray] | None:
    """The stored arrays, or None when there are none or they are damaged (every array carries a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def write_index(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Stores the arrays, whole or not at all. Where nothing can be written the next start takes longer, no more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            try:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
