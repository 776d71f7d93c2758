"""Classification metrics from logits and labels: accuracy, calibration, per-class metrics.

Every example counts once, and the count is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.evaluation.statistics import accuracy_interval
from train.storage.json_types import JsonObject

Predict = Callable[[object], np.ndarray]  # images, of the backend or NumPy -> logits float32 [N, classes]
Batches = Iterable[tuple[object, np.ndarray]]  # (images, one-hot labels [N, classes])

CALIBRATION_BINS = 15  # Guo et al. 2017 (On Calibration of Modern Neural Networks), section 5


def evaluate(predict: Predict, batches: Batches, expected_examples: int) -> dict[str, float]:
    """Returns `loss` (mean cross-entropy in nats, without smoothing), `accuracy`, `top5_accuracy` and `examples`.

    With fewer than six classes `top5_accuracy` is 1.

    Raises: ValueError if the batches do not hold `expected_examples` examples.
    """
    losses = []
    ranks = []
    for logits, labels in _predict_batches(predict, batches, expected_examples):
        losses.append(cross_entropy(logits, labels))
        ranks.append(label_rank(logits, labels))
    return _summary_metrics(np.concatenate(losses), np.concatenate(ranks))


def predict_all(predict: Predict, batches: Batches, expected_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits float64 [N, classes] and labels int [N] of all examples, in the order of the batches.

    Raises: ValueError if the batches do not hold `expected_examples` examples.
    """
    logits, labels = zip(*_predict_batches(predict, batches, expected_examples), strict=True)
    return np.concatenate(logits), np.concatenate(labels)


def _predict_batches(
    predict: Predict, batches: Batches, expected_examples: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    seen = 0
    for images, labels in batches:
        seen += len(labels)
        logits = predict(images)[: len(labels)]  # several processes pad the last batch
        yield logits.astype(np.float64), np.argmax(labels, axis=1)
    if seen != expected_examples:
        raise ValueError(
            f"evaluation saw {seen} examples instead of {expected_examples}; the data set has changed, restore it"
        )


def summary_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes the metrics that `evaluate` returns, from logits float64 [N, classes] and labels int [N]."""
    return _summary_metrics(cross_entropy(logits, labels), label_rank(logits, labels))


def _summary_metrics(losses: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    return {
        "loss": float(losses.mean()),
        "accuracy": float((ranks < 1).mean()),
        "top5_accuracy": float((ranks < 5).mean()),
        "examples": len(ranks),
    }


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each example's cross-entropy in nats, float64 [N], from logits [N, classes] and labels int [N]."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the probabilities, float64 [N, classes]."""
    top = logits.max(axis=1, keepdims=True)
    return logits - (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))


def label_rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how many classes rank before the true one, int [N]; among equal logits the lower index ranks first.

    If any logit is not finite the true class ranks last, so that a diverged network does not look like a good one.
    """
    label_logits = logits[np.arange(len(labels)), labels][:, None]
    before = (logits > label_logits) | ((logits == label_logits) & (np.arange(logits.shape[1]) < labels[:, None]))
    ranks = before.sum(axis=1)
    return np.where(np.isfinite(logits).all(axis=1), ranks, logits.shape[1])


# -------------------------------------------------------------------------------------------------- full evaluation


@dataclass(frozen=True)
class ClassificationResult:
    """A network's predictions on a split. logits: float64 [N, classes]; labels: int [N]; classes: their names.

    Raises: ValueError if a logit is not finite.
    """

    logits: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]

    def __post_init__(self) -> None:
        non_finite = int((~np.isfinite(self.logits).all(axis=1)).sum())
        if non_finite:
            raise ValueError(
                f"the network's output is not finite for {non_finite} of {len(self.labels)} examples; "
                "use a run that did not diverge, or evaluate with precision=float32"
            )

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float64 [N, classes]."""
        return np.exp(log_softmax(self.logits))

    @cached_property
    def predicted(self) -> np.ndarray:
        """int [N]: the class with the largest logit; among equal ones the lower index."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """float64 [N]: the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: whether the prediction is right."""
        return self.predicted == self.labels

    @cached_property
    def confusion(self) -> np.ndarray:
        """int [classes, classes]: rows are true classes, columns predicted ones."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.labels, self.predicted, labels=range(len(self.classes)))


def compute_metrics(result: ClassificationResult) -> JsonObject:
    """Computes all metrics, ready for JSON; one that is undefined, as the recall of an empty class, is None.

    `accuracy_interval` is Wilson's 95 % interval; `macro_...` are means over the classes in which the metric is
    defined; `ece` is the expected calibration error and `calibration` its bins (Guo et al. 2017, equation 3);
    `roc_auc` is one-versus-rest; rows of `confusion` are true classes.
    """
    classes = per_class_metrics(result)
    bins = calibration_bins(result)
    macro = {f"macro_{name}": _mean(row[name] for row in classes) for name in ("precision", "recall", "f1")}
    return {
        **summary_metrics(result.logits, result.labels),
        "accuracy_interval": accuracy_interval(int(result.correct.sum()), len(result.labels)),
        **macro,
        "roc_auc": _mean(row["roc_auc"] for row in classes),
        "ece": sum(row["examples"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(result.labels),
        "classes": classes,
        "calibration": bins,
        "confusion": result.confusion.tolist(),
    }


def per_class_metrics(result: ClassificationResult) -> list[JsonObject]:
    """Returns each class's name, examples, precision, recall, F1 and one-versus-rest area under the ROC curve."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    scores = precision_recall_fscore_support(
        result.labels, result.predicted, labels=range(len(result.classes)), zero_division=np.nan
    )
    rows = []
    for index, (name, *values, examples) in enumerate(zip(result.classes, *scores, strict=True)):
        is_class = result.labels == index
        has_both = 0 < examples < len(is_class)
        area = roc_auc_score(is_class, result.probabilities[:, index]) if has_both else None
        precision, recall, f1 = (None if np.isnan(value) else float(value) for value in values)
        row = {"name": name, "examples": int(examples), "precision": precision, "recall": recall, "f1": f1}
        rows.append({**row, "roc_auc": None if area is None else float(area)})
    return rows


def calibration_bins(result: ClassificationResult) -> list[JsonObject]:
    """Returns the non-empty bins of equal width: `low`, `high`, `examples`, mean `confidence`, `accuracy`."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bin_indices = np.clip(np.digitize(result.confidence, edges[1:-1], right=True), 0, CALIBRATION_BINS - 1)
    return [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "examples": int(inside.sum()),
            "confidence": float(result.confidence[inside].mean()),
            "accuracy": float(result.correct[inside].mean()),
        }
        for number in range(CALIBRATION_BINS)
        if (inside := bin_indices == number).any()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
