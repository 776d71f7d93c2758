"""Sampling orders and keyed randomness: a draw depends on (seed, purpose, epoch, index), never on earlier draws."""

import hashlib

import numpy as np


def keyed_generator(seed: int, purpose: str, epoch: int) -> np.random.Generator:
    """Returns a new generator for one purpose in one epoch; equal keys give equal draws in every process.

    The bit generator is fixed (not NumPy's default), and its key is a hash, so that neighbouring seeds are unrelated.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of an epoch, every index exactly once: int64 [num_examples]."""
    return keyed_generator(seed, "order", epoch).permutation(num_examples)


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """Returns an order of N draws in which all classes are equally frequent: int64 [N], N examples.

    Class counts differ by at most one if N is not a multiple of the number of classes. Within a class, every example is
    drawn before any is repeated: large classes are subsampled, examples of small classes come several times.
    """
    generator = keyed_generator(seed, "balance", epoch)
    classes = np.unique(labels)
    class_sizes = np.full(len(classes), len(labels) // len(classes))
    class_sizes[generator.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, size in zip(classes, class_sizes, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = [generator.permutation(members) for _ in range(-(-size // len(members)))]
        drawn.append(np.concatenate(rounds)[:size])
    return generator.permutation(np.concatenate(drawn))


def uniform_rows(seed: int, purpose: str, epoch: int, num_examples: int, columns: int) -> np.ndarray:
    """Returns an epoch's draws: float32 [num_examples, columns] in [0, 1); row i belongs to example i in any batch.

    Drawn column by column, so that adding a column does not change the others.
    """
    generator = keyed_generator(seed, purpose, epoch)
    draws = np.empty((num_examples, columns), np.float32)
    for column in range(columns):
        draws[:, column] = generator.random(num_examples, dtype=np.float32)
    return draws
