"""Examples that are in two splits, or have two labels; and pictures that look as if."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from train.data.ingestion.example_index import Verdicts

BANDS = 4  # of 16 bits; hashes that differ in at most BANDS - 1 bits agree in one of them
ALIKE_BITS = BANDS - 1
ALIKE_GREYS = 16  # of 255, how far two thumbnails may differ in any place, apart from being brighter as a whole
MOST_IN_BAND = 1000  # candidates per picture and band
NAMED = 3
CHUNK = 10_000

# What is measured keeps its examples; what is measured less finally gives way.
ORDER = ("train", "validation", "test")


@dataclass(frozen=True)
class Leaks:
    """By rows. shared: pairs of equal bytes, the second in a later split of ORDER. conflicts: groups of equal bytes
    with several labels. alike: pairs in two splits that look the same and are other bytes.
    """

    shared: list[tuple[int, ...]] = field(default_factory=list)
    conflicts: list[tuple[int, ...]] = field(default_factory=list)
    alike: list[tuple[int, ...]] = field(default_factory=list)


def find_leaks(splits: dict[str, np.ndarray], verdicts: Verdicts, labels: np.ndarray) -> Leaks:
    """splits: rows by name. labels: [rows of the table]."""
    rows = np.concatenate([splits[name] for name in ORDER])
    split = np.concatenate([np.full(len(splits[name]), number, np.int8) for number, name in enumerate(ORDER)])
    shared: list[tuple[int, ...]] = []
    conflicts: list[tuple[int, ...]] = []
    for group in _groups(_heads(verdicts.sha256, rows)):
        members, last = rows[group].tolist(), split[group].max()
        kept = members[int(split[group].argmax())]
        shared += [(row, kept) for row, place in zip(members, split[group], strict=True) if place < last]
        if len(set(labels[members].tolist())) > 1:
            conflicts.append(tuple(members))
    return Leaks(shared, conflicts, _alike(splits, verdicts))


def _heads(sha256: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first 64 bits of every digest, uint64. Of a million digests two agree by chance in 1 of 30 million sets."""
    first, heads = sha256.view("S16").reshape(-1, 4)[:, 0], np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), CHUNK):
        digits = first[rows[start : start + CHUNK]].tobytes()
        heads[start : start + CHUNK] = np.frombuffer(bytes.fromhex(digits.decode()), ">u8")
    return heads


def _groups(heads: np.ndarray) -> list[np.ndarray]:
    """Places of equal entries, where there are at least two, in order."""
    order = np.argsort(heads, kind="stable")
    bounds = np.flatnonzero(np.diff(heads[order])) + 1
    starts, ends = np.append(0, bounds), np.append(bounds, len(order))
    return [order[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


def _alike(splits: dict[str, np.ndarray], verdicts: Verdicts) -> list[tuple[int, ...]]:
    likeness = verdicts.numbers("likeness")
    found: set[tuple[int, ...]] = set()
    for one, other in combinations(ORDER, 2):
        found |= _close(splits[one][likeness[splits[one]] != 0], splits[other][likeness[splits[other]] != 0], likeness)
    return sorted(pair for pair in found if _look_the_same(verdicts, *pair))


def _look_the_same(verdicts: Verdicts, one: int, other: int) -> bool:
    """Of what has the same hash, pictures of the same kind of thing differ by 26 greys and more in a real set of hands,
    copies that were encoded again or resized by 13 and less.
    """
    if verdicts.sha256[one] == verdicts.sha256[other]:
        return False
    greys = verdicts.thumbnails[[one, other]].astype(np.float64)
    apart = greys - greys.mean(axis=1, keepdims=True)
    return bool(np.abs(apart[0] - apart[1]).max() <= ALIKE_GREYS)


def _close(one: np.ndarray, other: np.ndarray, likeness: np.ndarray) -> set[tuple[int, ...]]:
    """Pairs whose hashes differ in at most ALIKE_BITS bits, found through the band in which they agree."""
    found: set[tuple[int, ...]] = set()
    for band in range(BANDS):
        keys = (likeness[one] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        wanted = (likeness[other] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        starts = np.searchsorted(keys[order], wanted, side="left")
        ends = np.minimum(np.searchsorted(keys[order], wanted, side="right"), starts + MOST_IN_BAND)
        for row, start, end in zip(other.tolist(), starts.tolist(), ends.tolist(), strict=True):
            near = one[order[start:end]]
            bits = np.bitwise_count(likeness[near] ^ likeness[row])
            found.update((int(candidate), row) for candidate in near[bits <= ALIKE_BITS])
    return found


def without_leaks(splits: dict[str, np.ndarray], leaks: Leaks) -> dict[str, np.ndarray]:
    """Of equal images in two splits those of the earlier one go; of one with several labels all but those of test."""
    contested = {row for group in leaks.conflicts for row in group} - set(splits["test"].tolist())
    gone = np.array(sorted({one for one, _ in leaks.shared} | contested), np.int64)
    return {name: rows[~np.isin(rows, gone)] for name, rows in splits.items()}


def sentences(leaks: Leaks, say: Callable[[int], str], label: Callable[[int], str]) -> tuple[list[str], list[str]]:
    """What is certain and what is only likely, with counts and the first names. say: row -> its name and split."""
    certain = [
        _told("image is", "images are", "in two splits", leaks.shared, say),
        _told("image has", "images have", "several labels", leaks.conflicts, lambda row: f"{say(row)} as {label(row)}"),
    ]
    likely = [
        _told("pair of images in two splits looks", "pairs of images in two splits look", "alike", leaks.alike, say)
    ]
    return list(filter(None, certain)), list(filter(None, likely))


def _told(one: str, many: str, what: str, groups: list[tuple[int, ...]], say: Callable[[int], str]) -> str:
    if not groups:
        return ""
    first = "; ".join(" and ".join(map(say, group)) for group in groups[:NAMED])
    return f"{len(groups)} {one if len(groups) == 1 else many} {what} ({first}{'; ...' if len(groups) > NAMED else ''})"
