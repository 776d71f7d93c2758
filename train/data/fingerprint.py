"""Digests of splits and data sets."""

import hashlib
import os
from collections.abc import Iterable

MODULUS = 2**256


def digest(lines: Iterable[tuple[str, bytes, int]]) -> str:
    """Order-independent digest, 64 hexadecimal digits, over lines (id, SHA-256 of the encoded bytes, label).

    It is the sum of the lines' SHA-256s, which takes neither sorting nor memory. NUL, which no file name contains,
    separates the fields, so that different sets give different lines.
    Source: M. Bellare and D. Micciancio, "A New Paradigm for Collision-Free Hashing" (1997), AdHash.
    """
    total = 0
    for name, sha256, label in lines:
        line = b"\0".join((os.fsencode(name), sha256, str(label).encode()))
        total = (total + int.from_bytes(hashlib.sha256(line).digest(), "big")) % MODULUS
    return f"{total:064x}"


def fingerprint(splits: dict[str, str]) -> str:
    """Digest of a data set, 64 hexadecimal digits, from the digests of its splits by name."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(splits.items())).encode()).hexdigest()
