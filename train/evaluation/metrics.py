"""From logits and true classes to numbers: how often right, how sure of itself, and on what.

Every example counts once, and the count is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Predict = Callable[[Any], np.ndarray]  # images -> logits float32 [N, classes]

CALIBRATION_BINS = 15  # Guo et al. 2017 (On Calibration of Modern Neural Networks), section 5
CONFIDENCE = 0.95  # of every interval
RESAMPLES = 10_000


def evaluate(predict: Predict, batches: Iterable[tuple], expected: int) -> dict[str, float]:
    """`loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `top5_accuracy`, `examples`.

    batches: (images, one-hot labels [N, classes]). With fewer than six classes `top5_accuracy` is 1.

    Raises: ValueError if the batches do not hold `expected` examples.
    """
    losses, ranks = [], []
    for logits, truth in _answered(predict, batches, expected):
        losses.append(cross_entropy(logits, truth))
        ranks.append(rank_of_truth(logits, truth))
    return _headline(np.concatenate(losses), np.concatenate(ranks))


def answers(predict: Predict, batches: Iterable[tuple], expected: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits float64 [N, classes] and true classes int [N] of all examples, in the order of the batches.

    Raises: ValueError if the batches do not hold `expected` examples.
    """
    logits, truth = zip(*_answered(predict, batches, expected), strict=True)
    return np.concatenate(logits), np.concatenate(truth)


def _answered(predict: Predict, batches: Iterable[tuple], expected: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    seen = 0
    for images, labels in batches:
        seen += len(labels)
        logits = predict(images)[: len(labels)]  # several processes answer for a whole batch
        yield logits.astype(np.float64), np.argmax(labels, axis=1)
    if seen != expected:
        raise ValueError(f"evaluation must see every example once, got {seen} of {expected}; the data set changed")


def headline(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What `evaluate` gives."""
    return _headline(cross_entropy(logits, truth), rank_of_truth(logits, truth))


def _headline(loss: np.ndarray, rank: np.ndarray) -> dict[str, float]:
    return {
        "loss": float(loss.mean()),
        "accuracy": float((rank < 1).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "examples": len(rank),
    }


def cross_entropy(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 [N] in nats, of logits [N, classes] and class indices [N]."""
    return -log_softmax(logits)[np.arange(len(truth)), truth]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [N, classes], logarithms of probabilities."""
    top = logits.max(axis=1, keepdims=True)
    return logits - (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))


def rank_of_truth(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """int [N]: how many classes stand before the true one; among equal logits the lower index stands first.

    Logits that are not finite put the true class last, so that a broken network does not look like a good one.
    """
    own = logits[np.arange(len(truth)), truth][:, None]
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < truth[:, None]))
    ranks = before.sum(axis=1)
    return np.where(np.isfinite(logits).all(axis=1), ranks, logits.shape[1])


# ----------------------------------------------------------------------------------------------------- all there is


@dataclass(frozen=True)
class Outcome:
    """What a network said of a split. logits: float64 [N, classes]; truth: int [N]; classes: names.

    Raises: ValueError where a logit is not finite.
    """

    logits: np.ndarray
    truth: np.ndarray
    classes: Sequence[str]

    def __post_init__(self) -> None:
        broken = int((~np.isfinite(self.logits).all(axis=1)).sum())
        if broken:
            raise ValueError(
                f"the network's answers must be finite, got {broken} of {len(self.truth)} that are not; "
                "use a run that did not diverge, or evaluate with precision=float32"
            )

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float64 [N, classes]."""
        return np.exp(log_softmax(self.logits))

    @cached_property
    def predicted(self) -> np.ndarray:
        """int [N]; among equal logits the lower index."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """float64 [N]: the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @property
    def right(self) -> np.ndarray:
        """bool [N]."""
        return self.predicted == self.truth

    @cached_property
    def confusion(self) -> np.ndarray:
        """int [classes, classes]: rows are true classes, columns predicted ones."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.truth, self.predicted, labels=range(len(self.classes)))


def scores(outcome: Outcome) -> dict[str, Any]:
    """Everything, ready for JSON. What is not defined, as the recall of a class without an example, is None.

    `accuracy_interval` is the 95 % bootstrap interval over examples; `macro_...` are means over the classes where they
    are defined; `ece` is the expected calibration error and `calibration` its bins (Guo et al. 2017, equation 3);
    `roc_auc` is one-versus-rest; rows of `confusion` are true classes.
    """
    classes = of_classes(outcome)
    bins = calibration(outcome)
    macro = {f"macro_{name}": _mean(row[name] for row in classes) for name in ("precision", "recall", "f1")}
    return {
        **headline(outcome.logits, outcome.truth),
        "accuracy_interval": bootstrap_interval(int(outcome.right.sum()), len(outcome.truth)),
        **macro,
        "roc_auc": _mean(row["roc_auc"] for row in classes),
        "ece": sum(row["examples"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(outcome.truth),
        "classes": classes,
        "calibration": bins,
        "confusion": outcome.confusion.tolist(),
    }


def of_classes(outcome: Outcome) -> list[dict[str, Any]]:
    """For each class its name, examples, precision, recall, F1 and area under the ROC curve against all others."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    found = precision_recall_fscore_support(
        outcome.truth, outcome.predicted, labels=range(len(outcome.classes)), zero_division=np.nan
    )
    rows = []
    for number, (name, *values, examples) in enumerate(zip(outcome.classes, *found, strict=True)):
        own = outcome.truth == number
        both = 0 < examples < len(own)
        area = roc_auc_score(own, outcome.probabilities[:, number]) if both else None
        precision, recall, f1 = (None if np.isnan(value) else float(value) for value in values)
        row = {"name": name, "examples": int(examples), "precision": precision, "recall": recall, "f1": f1}
        rows.append({**row, "roc_auc": None if area is None else float(area)})
    return rows


def calibration(outcome: Outcome) -> list[dict[str, Any]]:
    """Bins of equal width over the confidence: `low`, `high`, `examples`, mean `confidence`, `accuracy`; not empty."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.digitize(outcome.confidence, edges[1:-1], right=True), 0, CALIBRATION_BINS - 1)
    return [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "examples": int(inside.sum()),
            "confidence": float(outcome.confidence[inside].mean()),
            "accuracy": float(outcome.right[inside].mean()),
        }
        for number in range(CALIBRATION_BINS)
        if (inside := place == number).any()
    ]


def bootstrap_interval(right: int, examples: int) -> list[float]:
    """The percentile interval of the accuracy over resampled examples, always the same one.

    How many of a resample are right is binomial, so that they are drawn at once instead of example by example.
    Source: Efron & Tibshirani 1993, section 13.3.
    """
    drawn = np.random.default_rng(0).binomial(examples, right / examples, RESAMPLES) / examples
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(drawn, [tail, 1 - tail])]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
