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
CONFIDENCE_LEVEL = 0.95  # of every interval
BOOTSTRAP_RESAMPLES = 10_000


def evaluate(predict: Predict, batches: Iterable[tuple], expected_examples: int) -> dict[str, float]:
    """`loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `top5_accuracy`, `examples`.

    batches: (images, one-hot labels [N, classes]). With fewer than six classes `top5_accuracy` is 1.

    Raises: ValueError if the batches do not hold `expected` examples.
    """
    losses, ranks = [], []
    for logits, truth in _predict_batches(predict, batches, expected_examples):
        losses.append(cross_entropy(logits, truth))
        ranks.append(label_rank(logits, truth))
    return _summary_metrics(np.concatenate(losses), np.concatenate(ranks))


def predict_all(predict: Predict, batches: Iterable[tuple], expected_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits float64 [N, classes] and true classes int [N] of all examples, in the order of the batches.

    Raises: ValueError if the batches do not hold `expected` examples.
    """
    logits, truth = zip(*_predict_batches(predict, batches, expected_examples), strict=True)
    return np.concatenate(logits), np.concatenate(truth)


def _predict_batches(
    predict: Predict, batches: Iterable[tuple], expected_examples: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    seen = 0
    for images, labels in batches:
        seen += len(labels)
        logits = predict(images)[: len(labels)]  # several processes answer for a whole batch
        yield logits.astype(np.float64), np.argmax(labels, axis=1)
    if seen != expected_examples:
        raise ValueError(
            f"evaluation must see every example once, got {seen} of {expected_examples}; the data set changed"
        )


def summary_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What `evaluate` gives."""
    return _summary_metrics(cross_entropy(logits, labels), label_rank(logits, labels))


def _summary_metrics(losses: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    return {
        "loss": float(losses.mean()),
        "accuracy": float((ranks < 1).mean()),
        "top5_accuracy": float((ranks < 5).mean()),
        "examples": len(ranks),
    }


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [N] in nats, of logits [N, classes] and class indices [N]."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [N, classes], logarithms of probabilities."""
    top = logits.max(axis=1, keepdims=True)
    return logits - (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))


def label_rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int [N]: how many classes stand before the true one; among equal logits the lower index stands first.

    Logits that are not finite put the true class last, so that a broken network does not look like a good one.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    ranks = before.sum(axis=1)
    return np.where(np.isfinite(logits).all(axis=1), ranks, logits.shape[1])


# ----------------------------------------------------------------------------------------------------- all there is


@dataclass(frozen=True)
class ClassificationResult:
    """What a network said of a split. logits: float64 [N, classes]; truth: int [N]; classes: names.

    Raises: ValueError where a logit is not finite.
    """

    logits: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]

    def __post_init__(self) -> None:
        broken = int((~np.isfinite(self.logits).all(axis=1)).sum())
        if broken:
            raise ValueError(
                f"the network's answers must be finite, got {broken} of {len(self.labels)} that are not; "
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
    def correct(self) -> np.ndarray:
        """bool [N]."""
        return self.predicted == self.labels

    @cached_property
    def confusion(self) -> np.ndarray:
        """int [classes, classes]: rows are true classes, columns predicted ones."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.labels, self.predicted, labels=range(len(self.classes)))


def compute_metrics(result: ClassificationResult) -> dict[str, Any]:
    """Everything, ready for JSON. What is not defined, as the recall of a class without an example, is None.

    `accuracy_interval` is the 95 % bootstrap interval over examples; `macro_...` are means over the classes where they
    are defined; `ece` is the expected calibration error and `calibration` its bins (Guo et al. 2017, equation 3);
    `roc_auc` is one-versus-rest; rows of `confusion` are true classes.
    """
    classes = per_class_metrics(result)
    bins = calibration_bins(result)
    macro = {f"macro_{name}": _mean(row[name] for row in classes) for name in ("precision", "recall", "f1")}
    return {
        **summary_metrics(result.logits, result.labels),
        "accuracy_interval": bootstrap_interval(int(result.correct.sum()), len(result.labels)),
        **macro,
        "roc_auc": _mean(row["roc_auc"] for row in classes),
        "ece": sum(row["examples"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(result.labels),
        "classes": classes,
        "calibration": bins,
        "confusion": result.confusion.tolist(),
    }


def per_class_metrics(result: ClassificationResult) -> list[dict[str, Any]]:
    """For each class its name, examples, precision, recall, F1 and area under the ROC curve against all others."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    found = precision_recall_fscore_support(
        result.labels, result.predicted, labels=range(len(result.classes)), zero_division=np.nan
    )
    rows = []
    for number, (name, *values, examples) in enumerate(zip(result.classes, *found, strict=True)):
        own = result.labels == number
        both = 0 < examples < len(own)
        area = roc_auc_score(own, result.probabilities[:, number]) if both else None
        precision, recall, f1 = (None if np.isnan(value) else float(value) for value in values)
        row = {"name": name, "examples": int(examples), "precision": precision, "recall": recall, "f1": f1}
        rows.append({**row, "roc_auc": None if area is None else float(area)})
    return rows


def calibration_bins(result: ClassificationResult) -> list[dict[str, Any]]:
    """Bins of equal width over the confidence: `low`, `high`, `examples`, mean `confidence`, `accuracy`; not empty."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.digitize(result.confidence, edges[1:-1], right=True), 0, CALIBRATION_BINS - 1)
    return [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "examples": int(inside.sum()),
            "confidence": float(result.confidence[inside].mean()),
            "accuracy": float(result.correct[inside].mean()),
        }
        for number in range(CALIBRATION_BINS)
        if (inside := place == number).any()
    ]


def bootstrap_interval(correct: int, examples: int) -> list[float]:
    """The percentile interval of the accuracy over resampled examples, always the same one.

    How many of a resample are right is binomial, so that they are drawn at once instead of example by example.
    Source: Efron & Tibshirani 1993, section 13.3.
    """
    drawn = np.random.default_rng(0).binomial(examples, correct / examples, BOOTSTRAP_RESAMPLES) / examples
    tail = (1 - CONFIDENCE_LEVEL) / 2
    return [float(value) for value in np.quantile(drawn, [tail, 1 - tail])]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
