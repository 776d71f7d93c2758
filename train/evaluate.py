"""Evaluation on a whole split: every example exactly once, and the count is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def evaluate(predict: Callable[..., np.ndarray], batches: Iterable[tuple], expected: int) -> dict[str, float]:
    """`loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `top5_accuracy`, `examples`.

    predict: images -> logits float32 [N, classes] of the main output; batches: (images, one-hot labels [N, classes]).
    With fewer than six classes `top5_accuracy` is 1.

    Raises: ValueError if the batches do not hold `expected` examples.
    """
    losses, ranks = [], []
    for images, labels in batches:
        logits, truth = predict(images).astype(np.float64), np.argmax(labels, axis=1)
        losses.append(cross_entropy(logits, truth))
        ranks.append(rank_of_truth(logits, truth))
    loss, rank = np.concatenate(losses), np.concatenate(ranks)
    if len(rank) != expected:
        raise ValueError(f"evaluation must see every example once, got {len(rank)} of {expected}; the data set changed")
    return {
        "loss": float(loss.mean()),
        "accuracy": float((rank < 1).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "examples": len(rank),
    }


def cross_entropy(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 [N] in nats, of logits [N, classes] and class indices [N]."""
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return log_sum - logits[np.arange(len(truth)), truth]


def rank_of_truth(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """int [N]: how many classes stand before the true one; among equal logits the lower index stands first.

    Logits that are not finite put the true class last, so that a broken network does not look like a good one.
    """
    own = logits[np.arange(len(truth)), truth][:, None]
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < truth[:, None]))
    ranks = before.sum(axis=1)
    return np.where(np.isfinite(logits).all(axis=1), ranks, logits.shape[1])
