"""Assigns the examples of a data set to train, validation and test."""

import hashlib
from collections.abc import Sequence

import numpy as np

from train.data.ingestion.example_index import ExampleIndex
from train.data.sources.listing import SPLITS

CHUNK = 10_000  # digests that are hashed at once


def assign_splits(example_index: ExampleIndex, fractions: dict[str, float]) -> dict[str, np.ndarray]:
    """Returns the rows of each split: official splits unchanged, missing ones taken from train by content hash.

    A hash of its own bytes assigns an example: adding examples moves no other, and equal images stay together.
    Raises: ValueError if a split would be empty.
    """
    official = {split: example_index.rows_in_split(split) for split in SPLITS}
    pool = np.concatenate([official["train"], example_index.rows_in_split("")])
    position = content_hash_uniform(example_index.sha256, pool)
    unassigned = np.ones(len(pool), dtype=bool)
    start = 0.0
    assigned: dict[str, np.ndarray] = {}
    for split in ("test", "validation"):
        if example_index.has_split(split):
            assigned[split] = official[split]
            continue
        end = start + fractions[split]
        selected = (position >= start) & (position < end)
        assigned[split] = pool[selected]
        unassigned &= ~selected
        start = end
    assigned["train"] = pool[unassigned]
    check_not_empty(assigned, len(example_index))
    return {split: assigned[split] for split in SPLITS}


def limit_per_class(
    rows: np.ndarray, labels: np.ndarray, content_hashes: np.ndarray, per_class: int, classes: Sequence[str]
) -> np.ndarray:
    """Keeps `per_class` rows of each class, in their order; a larger number keeps a superset.

    Raises: ValueError naming a class with fewer examples.
    """
    if per_class < 1:
        raise ValueError(f"data.train_per_class must be at least 1, got {per_class}; use 1 or null")
    order = rows[np.argsort(content_hash_uniform(content_hashes, rows), kind="stable")]
    kept = [order[labels[order] == label][:per_class] for label in range(len(classes))]
    for name, members in zip(classes, kept, strict=True):
        if len(members) < per_class:
            raise ValueError(
                f"class {name} has only {len(members)} examples in train, fewer than data.train_per_class={per_class}; "
                f"use {len(members)} or null"
            )
    return np.sort(np.concatenate(kept))


def content_hash_uniform(content_hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Maps examples to [0, 1) by hashing their SHA-256 (S64 [N]) once more: float64 [rows]."""
    prefixes = bytearray()
    for start in range(0, len(rows), CHUNK):
        digests = bytes.fromhex(content_hashes[rows[start : start + CHUNK]].tobytes().decode())
        for offset in range(0, len(digests), 32):
            prefixes += hashlib.sha256(b"split" + digests[offset : offset + 32]).digest()[:8]
    return np.frombuffer(prefixes, ">u8") / 2**64


def check_not_empty(splits: dict[str, np.ndarray], count: int) -> None:
    """Raises: ValueError if a split has no examples. count: number of examples in the data set."""
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(
                f"the {split} split is empty (0 of {count} examples); add images, use a larger fraction for it, "
                f"or add a folder {split}/ with class folders"
            )
