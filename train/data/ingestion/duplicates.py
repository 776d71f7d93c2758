"""Examples that are in two splits, or have two labels; and pictures that look as if."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from train.data.ingestion.example_index import ExampleIndex

HASH_BANDS = 4  # of 16 bits; hashes that differ in at most BANDS - 1 bits agree in one of them
MAX_HASH_DISTANCE = HASH_BANDS - 1
MAX_THUMBNAIL_DIFFERENCE = (
    16  # of 255, how far two thumbnails may differ in any place, apart from being brighter as a whole
)
MAX_BAND_CANDIDATES = 1000  # candidates per picture and band
MAX_NAMED = 3
CHUNK = 10_000

# What is measured keeps its examples; what is measured less finally gives way.
SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True)
class Duplicates:
    """By rows. shared: pairs of equal bytes, the second in a later split of ORDER. conflicts: groups of equal bytes
    with several labels. alike: pairs in two splits that look the same and are other bytes.
    """

    shared: list[tuple[int, ...]] = field(default_factory=list)
    conflicts: list[tuple[int, ...]] = field(default_factory=list)
    alike: list[tuple[int, ...]] = field(default_factory=list)


def find_duplicates(splits: dict[str, np.ndarray], example_index: ExampleIndex, labels: np.ndarray) -> Duplicates:
    """splits: rows by name. labels: [rows of the table]."""
    rows = np.concatenate([splits[name] for name in SPLIT_ORDER])
    split = np.concatenate([np.full(len(splits[name]), number, np.int8) for number, name in enumerate(SPLIT_ORDER)])
    shared: list[tuple[int, ...]] = []
    conflicts: list[tuple[int, ...]] = []
    for group in _group_equal(_digest_prefixes(example_index.sha256, rows)):
        members, last = rows[group].tolist(), split[group].max()
        kept = members[int(split[group].argmax())]
        shared += [(row, kept) for row, place in zip(members, split[group], strict=True) if place < last]
        if len(set(labels[members].tolist())) > 1:
            conflicts.append(tuple(members))
    return Duplicates(shared, conflicts, _find_near_duplicates(splits, example_index))


def _digest_prefixes(sha256: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first 64 bits of every digest, uint64. Of a million digests two agree by chance in 1 of 30 million sets."""
    first, heads = sha256.view("S16").reshape(-1, 4)[:, 0], np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), CHUNK):
        digits = first[rows[start : start + CHUNK]].tobytes()
        heads[start : start + CHUNK] = np.frombuffer(bytes.fromhex(digits.decode()), ">u8")
    return heads


def _group_equal(prefixes: np.ndarray) -> list[np.ndarray]:
    """Places of equal entries, where there are at least two, in order."""
    order = np.argsort(prefixes, kind="stable")
    bounds = np.flatnonzero(np.diff(prefixes[order])) + 1
    starts, ends = np.append(0, bounds), np.append(bounds, len(order))
    return [order[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


def _find_near_duplicates(splits: dict[str, np.ndarray], example_index: ExampleIndex) -> list[tuple[int, ...]]:
    likeness = example_index.numeric_column("likeness")
    found: set[tuple[int, ...]] = set()
    for one, other in combinations(SPLIT_ORDER, 2):
        found |= _similar_hash_pairs(
            splits[one][likeness[splits[one]] != 0], splits[other][likeness[splits[other]] != 0], likeness
        )
    return sorted(pair for pair in found if _thumbnails_match(example_index, *pair))


def _thumbnails_match(example_index: ExampleIndex, first: int, second: int) -> bool:
    """Of what has the same hash, pictures of the same kind of thing differ by 26 greys and more in a real set of hands,
    copies that were encoded again or resized by 13 and less.
    """
    if example_index.sha256[first] == example_index.sha256[second]:
        return False
    greys = example_index.thumbnails[[first, second]].astype(np.float64)
    apart = greys - greys.mean(axis=1, keepdims=True)
    return bool(np.abs(apart[0] - apart[1]).max() <= MAX_THUMBNAIL_DIFFERENCE)


def _similar_hash_pairs(first_rows: np.ndarray, second_rows: np.ndarray, hashes: np.ndarray) -> set[tuple[int, ...]]:
    """Pairs whose hashes differ in at most ALIKE_BITS bits, found through the band in which they agree."""
    found: set[tuple[int, ...]] = set()
    for band in range(HASH_BANDS):
        keys = (hashes[first_rows] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        wanted = (hashes[second_rows] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        starts = np.searchsorted(keys[order], wanted, side="left")
        ends = np.minimum(np.searchsorted(keys[order], wanted, side="right"), starts + MAX_BAND_CANDIDATES)
        for row, start, end in zip(second_rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
            near = first_rows[order[start:end]]
            bits = np.bitwise_count(hashes[near] ^ hashes[row])
            found.update((int(candidate), row) for candidate in near[bits <= MAX_HASH_DISTANCE])
    return found


def remove_duplicates(splits: dict[str, np.ndarray], duplicates: Duplicates) -> dict[str, np.ndarray]:
    """Of equal images in two splits those of the earlier one go; of one with several labels all but those of test."""
    contested = {row for group in duplicates.conflicts for row in group} - set(splits["test"].tolist())
    gone = np.array(sorted({one for one, _ in duplicates.shared} | contested), np.int64)
    return {name: rows[~np.isin(rows, gone)] for name, rows in splits.items()}


def describe(
    duplicates: Duplicates, describe_row: Callable[[int], str], label_name: Callable[[int], str]
) -> tuple[list[str], list[str]]:
    """What is certain and what is only likely, with counts and the first names. say: row -> its name and split."""
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
