"""Finds duplicates across splits, equal images with different labels, and near-duplicates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from train.data.ingestion.example_index import ExampleIndex

HASH_BANDS = 4  # of 16 bits; hashes that differ in at most HASH_BANDS - 1 bits agree in one of the bands
MAX_HASH_DISTANCE = HASH_BANDS - 1
MAX_THUMBNAIL_DIFFERENCE = 16  # of 255, between corresponding pixels of two thumbnails without their means
MAX_BAND_CANDIDATES = 1000  # per image and band
MAX_NAMED = 3  # examples that a message names
CHUNK = 10_000

# Evaluation data keeps its examples: a duplicate is removed from the earlier split in this order.
SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True)
class Duplicates:
    """Groups of duplicates, by row.

    shared: pairs with equal bytes, the second in a later split of SPLIT_ORDER. conflicts: groups with equal bytes and
    several labels. alike: near-duplicates, pairs in two splits that look the same and differ in their bytes.
    """

    shared: list[tuple[int, ...]] = field(default_factory=list)
    conflicts: list[tuple[int, ...]] = field(default_factory=list)
    alike: list[tuple[int, ...]] = field(default_factory=list)


def find_duplicates(splits: dict[str, np.ndarray], example_index: ExampleIndex, labels: np.ndarray) -> Duplicates:
    """Finds all kinds of duplicates. splits: rows by split name. labels: [rows of the example index]."""
    rows = np.concatenate([splits[name] for name in SPLIT_ORDER])
    split = np.concatenate([np.full(len(splits[name]), number, np.int8) for number, name in enumerate(SPLIT_ORDER)])
    shared: list[tuple[int, ...]] = []
    conflicts: list[tuple[int, ...]] = []
    for group in _group_equal(_digest_prefixes(example_index.sha256, rows)):
        members, last = rows[group].tolist(), split[group].max()
        kept = members[int(split[group].argmax())]
        shared += [(row, kept) for row, number in zip(members, split[group], strict=True) if number < last]
        if len(set(labels[members].tolist())) > 1:
            conflicts.append(tuple(members))
    return Duplicates(shared, conflicts, _find_near_duplicates(splits, example_index))


def _digest_prefixes(sha256: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """First 64 bits of each digest, uint64. Among a million digests, two collide in 1 of 30 million cases."""
    first_digits = sha256.view("S16").reshape(-1, 4)[:, 0]
    prefixes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), CHUNK):
        digits = first_digits[rows[start : start + CHUNK]].tobytes()
        prefixes[start : start + CHUNK] = np.frombuffer(bytes.fromhex(digits.decode()), ">u8")
    return prefixes


def _group_equal(prefixes: np.ndarray) -> list[np.ndarray]:
    """Positions of equal entries, one ascending array per group of at least two."""
    order = np.argsort(prefixes, kind="stable")
    bounds = np.flatnonzero(np.diff(prefixes[order])) + 1
    starts, ends = np.append(0, bounds), np.append(bounds, len(order))
    return [order[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


def _find_near_duplicates(splits: dict[str, np.ndarray], example_index: ExampleIndex) -> list[tuple[int, ...]]:
    hashes = example_index.numeric_column("likeness")
    hashed_rows = {name: rows[hashes[rows] != 0] for name, rows in splits.items()}
    pairs: set[tuple[int, ...]] = set()
    for first, second in combinations(SPLIT_ORDER, 2):
        pairs |= _similar_hash_pairs(hashed_rows[first], hashed_rows[second], hashes)
    return sorted(pair for pair in pairs if _thumbnails_match(example_index, *pair))


def _thumbnails_match(example_index: ExampleIndex, first: int, second: int) -> bool:
    """Whether two images with similar hashes are copies.

    In a real data set of hands, different images with equal hashes differ by at least 26 grey levels; re-encoded or
    resized copies by at most 13.
    """
    if example_index.sha256[first] == example_index.sha256[second]:
        return False
    thumbnails = example_index.thumbnails[[first, second]].astype(np.float64)
    centered = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    return bool(np.abs(centered[0] - centered[1]).max() <= MAX_THUMBNAIL_DIFFERENCE)


def _similar_hash_pairs(first_rows: np.ndarray, second_rows: np.ndarray, hashes: np.ndarray) -> set[tuple[int, ...]]:
    """Pairs whose hashes differ in at most MAX_HASH_DISTANCE bits, found through a band in which they agree."""
    pairs: set[tuple[int, ...]] = set()
    for band in range(HASH_BANDS):
        keys = (hashes[first_rows] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        second_keys = (hashes[second_rows] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        starts = np.searchsorted(keys[order], second_keys, side="left")
        ends = np.minimum(np.searchsorted(keys[order], second_keys, side="right"), starts + MAX_BAND_CANDIDATES)
        for row, start, end in zip(second_rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
            candidates = first_rows[order[start:end]]
            distances = np.bitwise_count(hashes[candidates] ^ hashes[row])
            pairs.update((int(candidate), row) for candidate in candidates[distances <= MAX_HASH_DISTANCE])
    return pairs


def remove_duplicates(splits: dict[str, np.ndarray], duplicates: Duplicates) -> dict[str, np.ndarray]:
    """Removes duplicates from the earlier split, and images with several labels from all splits but test."""
    contested = {row for group in duplicates.conflicts for row in group} - set(splits["test"].tolist())
    removed = np.array(sorted({earlier for earlier, _ in duplicates.shared} | contested), np.int64)
    return {name: rows[~np.isin(rows, removed)] for name, rows in splits.items()}


def describe(
    duplicates: Duplicates, describe_row: Callable[[int], str], label_name: Callable[[int], str]
) -> tuple[list[str], list[str]]:
    """Returns sentences on certain and on likely duplicates. describe_row: row -> its name and split."""
    certain = [
        _duplicates_message("image is", "images are", "in two splits", duplicates.shared, describe_row),
        _duplicates_message(
            "image has",
            "images have",
            "several labels",
            duplicates.conflicts,
            lambda row: f"{describe_row(row)} as {label_name(row)}",
        ),
    ]
    likely = [
        _duplicates_message(
            "pair of images in two splits looks",
            "pairs of images in two splits look",
            "alike",
            duplicates.alike,
            describe_row,
        )
    ]
    return list(filter(None, certain)), list(filter(None, likely))


def _duplicates_message(
    singular: str, plural: str, predicate: str, groups: list[tuple[int, ...]], describe_row: Callable[[int], str]
) -> str:
    if not groups:
        return ""
    first = "; ".join(" and ".join(map(describe_row, group)) for group in groups[:MAX_NAMED])
    noun = singular if len(groups) == 1 else plural
    return f"{len(groups)} {noun} {predicate} ({first}{'; ...' if len(groups) > MAX_NAMED else ''})"
