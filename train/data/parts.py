"""What every source hands over: parts of examples that can be read by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Store(Protocol):
    """Encoded images by row; may be read by several threads at once."""

    def read(self, row: int) -> bytes:
        """The encoded bytes."""

    def read_many(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded bytes of several rows, in their order; cheaper than one by one where the format allows."""

    def name(self, row: int) -> str:
        """The id: TFDS part and index, or the path relative to the root."""

    def where(self, row: int) -> str:
        """What an error calls this example."""


@dataclass(frozen=True, eq=False)
class Part:
    """labels: int32 [N], sha256: S64 [N], the hexadecimal SHA-256 of the encoded bytes of every row of the store."""

    store: Store
    labels: np.ndarray
    sha256: np.ndarray
