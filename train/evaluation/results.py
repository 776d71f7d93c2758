"""What a network says of a split, written down: numbers, every single answer, and pictures.

evaluation/test/scores.json        what train.evaluation.metrics gives
evaluation/test/predictions.csv    a line for each example
evaluation/test/*.png              confusion, reliability, classes, mistakes, attention
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.evaluation.metrics import ClassificationResult, compute_metrics
from train.storage.atomic import write_atomically

CSV_COLUMNS = ("id", "class", "predicted", "confidence", "probability_of_class")
SUMMARY_METRICS = (
    "loss", "accuracy", "accuracy_interval", "top5_accuracy", "macro_f1", "roc_auc", "ece", "examples",
)  # fmt: skip
MAX_TOP_ERRORS = 24  # shown
GRAD_CAM_EXAMPLES = 12  # examples that Grad-CAM is drawn for


def write_results(output_dir: Path, split: Any, result: ClassificationResult) -> dict[str, Any]:
    """Writes scores.json and predictions.csv into `place`; what is in the first. split: what the outcome is of."""
    output_dir.mkdir(parents=True, exist_ok=True)
    found = compute_metrics(result)
    write_atomically(output_dir / "scores.json", json.dumps(found, indent=1) + "\n")
    write_atomically(output_dir / "predictions.csv", predictions_csv(split, result))
    return found


def predictions_csv(split: Any, result: ClassificationResult) -> str:
    """CSV with COLUMNS."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(CSV_COLUMNS)
    own = result.probabilities[np.arange(len(result.labels)), result.labels]
    for index, (true, said) in enumerate(zip(result.labels, result.predicted, strict=True)):
        sure = (f"{result.confidence[index]:.6f}", f"{own[index]:.6f}")
        lines.writerow([split.example_id(index), result.classes[true], result.classes[said], *sure])
    return text.getvalue()


def write_plots(
    output_dir: Path, split: Any, result: ClassificationResult, metrics: dict[str, Any], model: Any
) -> None:
    """Draws the pictures of a split into `place`. model: images -> logits, whose answers the outcome has."""
    from train.evaluation.plots import classification as charts
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import to_png

    names = list(result.classes)
    pictures: dict[str, Callable[[], Any]] = {
        "confusion.png": lambda: charts.plot_confusion_matrix(metrics["confusion"], names),
        "reliability.png": lambda: charts.plot_reliability_diagram(metrics["calibration"], metrics["ece"]),
        "classes.png": lambda: charts.plot_per_class_f1(metrics["classes"]),
        "mistakes.png": lambda: top_errors(split, result, image_grids),
        "attention.png": lambda: grad_cam_examples(split, result, model, image_grids),
    }
    for name, make in pictures.items():
        write_atomically(output_dir / name, to_png(make()))


def write_filters_plot(output_dir: Path, model: Any) -> None:
    """filters.png, of the first convolution."""
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import to_png
    from train.models.grad_cam import first_conv_kernel

    write_atomically(output_dir / "filters.png", to_png(image_grids.plot_filters(*first_conv_kernel(model))))


def top_errors(split: Any, result: ClassificationResult, image_grids: Any) -> Any:
    """The most confident ones."""
    wrong = np.flatnonzero(~result.correct)
    chosen = wrong[np.argsort(-result.confidence[wrong], kind="stable")][:MAX_TOP_ERRORS]
    return image_grids.plot_top_errors(
        load_images(split, chosen),
        class_names(result, result.labels[chosen]),
        list(zip(class_names(result, result.predicted[chosen]), result.confidence[chosen].tolist(), strict=True)),
        [Path(split.example_id(int(index))).name for index in chosen],
    )


def grad_cam_examples(split: Any, result: ClassificationResult, model: Any, image_grids: Any) -> Any:
    """What the network looked at in mistakes and in what it got right: half of each, as far as there are such."""
    from train.models.grad_cam import grad_cam

    wrong, right = np.flatnonzero(~result.correct), np.flatnonzero(result.correct)
    right = right[np.argsort(result.labels[right], kind="stable")]  # so that many classes are among them
    chosen = np.concatenate([evenly_spaced(wrong, GRAD_CAM_EXAMPLES // 2), evenly_spaced(right, GRAD_CAM_EXAMPLES)])[
        :GRAD_CAM_EXAMPLES
    ]
    images = load_images(split, chosen)
    maps, layer = grad_cam(model, images, result.predicted[chosen])
    said, true = class_names(result, result.predicted[chosen]), class_names(result, result.labels[chosen])
    titles = [one if one == other else f"{one}, is {other}" for one, other in zip(said, true, strict=True)]
    return image_grids.plot_grad_cam(images, maps, titles, layer)


def evenly_spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """So many of them at most, evenly over the whole."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def load_images(split: Any, indices: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C]."""
    shape = (0, *split.image_spec.shape)
    return (
        np.stack([split.load_example(int(index)) for index in indices]) if len(indices) else np.zeros(shape, np.uint8)
    )


def class_names(result: ClassificationResult, indices: np.ndarray) -> list[str]:
    """Classes."""
    return [result.classes[number] for number in indices]
