"""Writes the results of an evaluation: metrics, one prediction per example, and plots.

evaluation/test/scores.json        the metrics of train.evaluation.metrics
evaluation/test/predictions.csv    a line for each example
evaluation/test/*.png              confusion, reliability, classes, mistakes, attention
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.evaluation.metrics import ClassificationResult, compute_metrics
from train.storage.atomic import write_atomically
from train.storage.json_types import JsonObject

if TYPE_CHECKING:
    import keras
    from matplotlib.figure import Figure

CSV_COLUMNS = ("id", "class", "predicted", "confidence", "probability_of_class")
SUMMARY_METRICS = (
    "loss", "accuracy", "accuracy_interval", "top5_accuracy", "macro_f1", "roc_auc", "ece", "examples",
)  # fmt: skip
MAX_TOP_ERRORS = 24  # in the plot
GRAD_CAM_EXAMPLES = 12  # in the plot


class ImageShape(Protocol):
    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""


class EvaluatedSplit(Protocol):
    """What the results need of a split; `train.data.dataset.Split` is one."""

    @property
    def image_spec(self) -> ImageShape: ...

    def example_id(self, index: int) -> str: ...

    def load_example(self, index: int) -> np.ndarray: ...


def write_results(output_dir: Path, split: EvaluatedSplit, result: ClassificationResult) -> JsonObject:
    """Writes scores.json and predictions.csv into `output_dir`; returns the metrics. split: the one evaluated."""
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = compute_metrics(result)
    write_atomically(output_dir / "scores.json", json.dumps(metrics, indent=1) + "\n")
    write_atomically(output_dir / "predictions.csv", predictions_csv(split, result))
    return metrics


def predictions_csv(split: EvaluatedSplit, result: ClassificationResult) -> str:
    """Formats the predictions as CSV with CSV_COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    label_probabilities = result.probabilities[np.arange(len(result.labels)), result.labels]
    for index, (label, predicted) in enumerate(zip(result.labels, result.predicted, strict=True)):
        probabilities = (f"{result.confidence[index]:.6f}", f"{label_probabilities[index]:.6f}")
        writer.writerow([split.example_id(index), result.classes[label], result.classes[predicted], *probabilities])
    return text.getvalue()


def write_plots(
    output_dir: Path, split: EvaluatedSplit, result: ClassificationResult, metrics: JsonObject, model: keras.Model
) -> None:
    """Draws all plots of an evaluation into `output_dir`. model: images -> logits, the one evaluated."""
    from train.evaluation.plots import classification
    from train.evaluation.plots.style import to_png

    names = list(result.classes)
    plots: dict[str, Callable[[], Figure]] = {
        "confusion.png": lambda: classification.plot_confusion_matrix(metrics["confusion"], names),
        "reliability.png": lambda: classification.plot_reliability_diagram(metrics["calibration"], metrics["ece"]),
        "classes.png": lambda: classification.plot_per_class_f1(metrics["classes"]),
        "mistakes.png": lambda: top_errors(split, result),
        "attention.png": lambda: grad_cam_examples(split, result, model),
    }
    for name, plot in plots.items():
        write_atomically(output_dir / name, to_png(plot()))


def write_filters_plot(output_dir: Path, model: keras.Model) -> None:
    """Draws the filters of the first convolution into filters.png."""
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import to_png
    from train.models.grad_cam import first_conv_kernel

    write_atomically(output_dir / "filters.png", to_png(image_grids.plot_filters(*first_conv_kernel(model))))


def top_errors(split: EvaluatedSplit, result: ClassificationResult) -> Figure:
    """Plots the most confident errors."""
    from train.evaluation.plots import image_grids

    wrong = np.flatnonzero(~result.correct)
    chosen = wrong[np.argsort(-result.confidence[wrong], kind="stable")][:MAX_TOP_ERRORS]
    return image_grids.plot_top_errors(
        load_images(split, chosen),
        class_names(result, result.labels[chosen]),
        list(zip(class_names(result, result.predicted[chosen]), result.confidence[chosen].tolist(), strict=True)),
        [Path(split.example_id(int(index))).name for index in chosen],
    )


def grad_cam_examples(split: EvaluatedSplit, result: ClassificationResult, model: keras.Model) -> Figure:
    """Plots Grad-CAM maps, half of them of errors if there are enough, the others of correct predictions."""
    from train.evaluation.plots import image_grids
    from train.models.grad_cam import grad_cam

    wrong = np.flatnonzero(~result.correct)
    right = np.flatnonzero(result.correct)
    right = right[np.argsort(result.labels[right], kind="stable")]  # by class: evenly spaced ones span many
    chosen = np.concatenate([evenly_spaced(wrong, GRAD_CAM_EXAMPLES // 2), evenly_spaced(right, GRAD_CAM_EXAMPLES)])[
        :GRAD_CAM_EXAMPLES
    ]
    images = load_images(split, chosen)
    maps, layer = grad_cam(model, images, result.predicted[chosen])
    predictions = class_names(result, result.predicted[chosen])
    labels = class_names(result, result.labels[chosen])
    titles = [
        predicted if predicted == label else f"{predicted}, is {label}"
        for predicted, label in zip(predictions, labels, strict=True)
    ]
    return image_grids.plot_grad_cam(images, maps, titles, layer)


def evenly_spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """Takes at most `count` of the indices, evenly spaced."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def load_images(split: EvaluatedSplit, indices: np.ndarray) -> np.ndarray:
    """Loads examples of a split, uint8 [N, S, S, C]."""
    if not len(indices):
        return np.zeros((0, *split.image_spec.shape), np.uint8)
    return np.stack([split.load_example(int(index)) for index in indices])


def class_names(result: ClassificationResult, indices: np.ndarray) -> list[str]:
    """Returns the names of the classes with these indices."""
    return [result.classes[index] for index in indices]
