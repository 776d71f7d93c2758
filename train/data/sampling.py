"""Keyed randomness: every draw is a function of (seed, purpose, epoch, index), never of what was drawn before."""

import hashlib

import numpy as np


def keyed_generator(seed: int, purpose: str, epoch: int) -> np.random.Generator:
    """A fresh generator for one purpose of one epoch; equal keys give equal draws in every process.

    The bit generator is named, and its key is a hash, so that neighbouring seeds and epochs are unrelated.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of an epoch: int64 [examples], every index exactly once."""
    return keyed_generator(seed, "order", epoch).permutation(num_examples)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """An order of as many examples in which every class comes equally often: int64 [N].

    Classes differ by one example at most where N is no multiple of them. Within a class every example comes before one
    comes again, so that of a large class some are left out and of a small one each comes several times.
    """
    generator = keyed_generator(seed, "balance", epoch)
    classes = np.unique(labels)
    shares = np.full(len(classes), len(labels) // len(classes))
    shares[generator.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = [generator.permutation(members) for _ in range(-(-share // len(members)))]
        drawn.append(np.concatenate(rounds)[:share])
    return generator.permutation(np.concatenate(drawn))


def uniform_rows(seed: int, purpose: str, epoch: int, num_examples: int, columns: int) -> np.ndarray:
    """Draws of an epoch: float32 [examples, columns] in [0, 1); row i belongs to example i, in whatever batch it comes.

    Drawn column by column, so that one more column leaves those before it as they were.
    """
    generator, draws = keyed_generator(seed, purpose, epoch), np.empty((num_examples, columns), np.float32)
    for column in range(columns):
        draws[:, column] = generator.random(num_examples, dtype=np.float32)
    return draws
