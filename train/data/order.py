"""Keyed randomness: every draw is a function of (seed, purpose, epoch, index), never of what was drawn before."""

import hashlib

import numpy as np


def keyed_generator(seed: int, purpose: str, epoch: int) -> np.random.Generator:
    """A fresh generator for one purpose of one epoch; equal keys give equal draws in every process.

    The bit generator is named, and its key is a hash, so that neighbouring seeds and epochs are unrelated.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of an epoch: int64 [examples], every index exactly once."""
    return keyed_generator(seed, "order", epoch).permutation(examples)


def uniform_rows(seed: int, purpose: str, epoch: int, examples: int, columns: int) -> np.ndarray:
    """Draws of an epoch: float32 [examples, columns] in [0, 1); row i belongs to example i, in whatever batch it comes.

    Drawn column by column, so that one more column leaves those before it as they were.
    """
    return keyed_generator(seed, purpose, epoch).random((columns, examples), dtype=np.float32).T.copy()
