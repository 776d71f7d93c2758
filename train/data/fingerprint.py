"""Digests of splits and data sets."""

import hashlib
import os
from collections.abc import Iterable

MODULUS = 2**256


def digest(lines: Iterable[tuple[str, bytes, int]]) -> str:
    """64 hexadecimal digits over lines (id, SHA-256 of the encoded bytes, label), in whatever order they come.

    The sum of the lines' SHA-256s: it needs neither sorting nor memory. The fields are joined by NUL, which no file
    name can hold, so that no two sets write the same lines.
    Source: M. Bellare and D. Micciancio, "A New Paradigm for Collision-Free Hashing" (1997), AdHash.
    """
    total = 0
    for name, content, label in lines:
        line = b"\0".join((os.fsencode(name), content, str(label).encode()))
        total = (total + int.from_bytes(hashlib.sha256(line).digest(), "big")) % MODULUS
    return f"{total:064x}"


def fingerprint(splits: dict[str, str]) -> str:
    """64 hexadecimal digits over the digests of all splits, by name."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(splits.items())).encode()).hexdigest()
