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

from train.evaluation.metrics import Outcome, scores
from train.storage.atomic import write_atomically

COLUMNS = ("id", "class", "predicted", "confidence", "probability_of_class")
SUMMARY = (
    "loss", "accuracy", "accuracy_interval", "top5_accuracy", "macro_f1", "roc_auc", "ece", "examples",
)  # fmt: skip
MISTAKES = 24  # shown
WATCHED = 12  # examples that Grad-CAM is drawn for


def assess(place: Path, split: Any, outcome: Outcome) -> dict[str, Any]:
    """Writes scores.json and predictions.csv into `place`; what is in the first. split: what the outcome is of."""
    place.mkdir(parents=True, exist_ok=True)
    found = scores(outcome)
    write_atomically(place / "scores.json", json.dumps(found, indent=1) + "\n")
    write_atomically(place / "predictions.csv", predictions(split, outcome))
    return found


def predictions(split: Any, outcome: Outcome) -> str:
    """CSV with COLUMNS."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    own = outcome.probabilities[np.arange(len(outcome.truth)), outcome.truth]
    for index, (true, said) in enumerate(zip(outcome.truth, outcome.predicted, strict=True)):
        sure = (f"{outcome.confidence[index]:.6f}", f"{own[index]:.6f}")
        lines.writerow([split.id_of(index), outcome.classes[true], outcome.classes[said], *sure])
    return text.getvalue()


def draw(place: Path, split: Any, outcome: Outcome, found: dict[str, Any], model: Any) -> None:
    """Draws the pictures of a split into `place`. model: images -> logits, whose answers the outcome has."""
    from train.evaluation.plots import classification as charts
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import png

    names = list(outcome.classes)
    pictures: dict[str, Callable[[], Any]] = {
        "confusion.png": lambda: charts.confusion(found["confusion"], names),
        "reliability.png": lambda: charts.reliability(found["calibration"], found["ece"]),
        "classes.png": lambda: charts.per_class(found["classes"]),
        "mistakes.png": lambda: mistakes(split, outcome, image_grids),
        "attention.png": lambda: attention(split, outcome, model, image_grids),
    }
    for name, make in pictures.items():
        write_atomically(place / name, png(make()))


def draw_filters(place: Path, model: Any) -> None:
    """filters.png, of the first convolution."""
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import png
    from train.models.grad_cam import first_filters

    write_atomically(place / "filters.png", png(image_grids.filters(*first_filters(model))))


def mistakes(split: Any, outcome: Outcome, gallery: Any) -> Any:
    """The most confident ones."""
    wrong = np.flatnonzero(~outcome.right)
    chosen = wrong[np.argsort(-outcome.confidence[wrong], kind="stable")][:MISTAKES]
    return gallery.mistakes(
        images_of(split, chosen),
        named(outcome, outcome.truth[chosen]),
        list(zip(named(outcome, outcome.predicted[chosen]), outcome.confidence[chosen].tolist(), strict=True)),
        [Path(split.id_of(int(index))).name for index in chosen],
    )


def attention(split: Any, outcome: Outcome, model: Any, gallery: Any) -> Any:
    """What the network looked at in mistakes and in what it got right: half of each, as far as there are such."""
    from train.models.grad_cam import grad_cam

    wrong, right = np.flatnonzero(~outcome.right), np.flatnonzero(outcome.right)
    right = right[np.argsort(outcome.truth[right], kind="stable")]  # so that many classes are among them
    chosen = np.concatenate([spaced(wrong, WATCHED // 2), spaced(right, WATCHED)])[:WATCHED]
    images = images_of(split, chosen)
    maps, layer = grad_cam(model, images, outcome.predicted[chosen])
    said, true = named(outcome, outcome.predicted[chosen]), named(outcome, outcome.truth[chosen])
    titles = [one if one == other else f"{one}, is {other}" for one, other in zip(said, true, strict=True)]
    return gallery.attention(images, maps, titles, layer)


def spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """So many of them at most, evenly over the whole."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def images_of(split: Any, indices: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C]."""
    shape = (0, *split.view.shape)
    return np.stack([split.example(int(index)) for index in indices]) if len(indices) else np.zeros(shape, np.uint8)


def named(outcome: Outcome, numbers: np.ndarray) -> list[str]:
    """Classes."""
    return [outcome.classes[number] for number in numbers]
