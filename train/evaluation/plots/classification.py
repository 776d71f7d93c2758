"""What a network said of a split: confusions, calibration, classes. Readable for 2 classes and for 1,000."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, COLORMAP, GREY, ORANGE, RED, make_figure, shorten

MAX_NUMBERED_CLASSES = 20  # up to so many classes every cell of the matrix has its number
MAX_NAMED_CLASSES = 40  # and up to so many every row its name
MAX_CONFUSED_PAIRS = 20  # so many of the most confused pairs are named where rows have none
MAX_CLASS_BARS = 40  # so many classes at most have a bar of their own


def plot_confusion_matrix(matrix: list[list[int]], classes: list[str]) -> Figure:
    """Rows are true classes; a cell's colour is its share of the row, its number the examples."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(classes) > MAX_NAMED_CLASSES:
        return _plot_large_confusion_matrix(counts, shares, classes)
    side = 2.2 + 0.34 * len(classes)
    made, ((axes,),) = make_figure(side + 1.2, side)
    _draw_matrix(made, axes, shares)
    names = [shorten(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), names)
    if len(classes) <= MAX_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "black" if shares[row, column] > 0.5 else "white"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    return made


def _draw_matrix(figure: Figure, axes: Any, shares: np.ndarray) -> None:
    image = axes.imshow(shares, cmap=COLORMAP, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).set_label("share of the true class", fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("confusion matrix")


def _plot_large_confusion_matrix(counts: np.ndarray, shares: np.ndarray, classes: list[str]) -> Figure:
    """The whole matrix as a map, and beside it the pairs that are confused most."""
    made, ((axes, bars),) = make_figure(14, 6.5, 1, 2)
    _draw_matrix(made, axes, shares)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:MAX_CONFUSED_PAIRS]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    labels = [f"{shorten(classes[true])} → {shorten(classes[said])}" for true, said in pairs]
    _draw_bars(bars, labels, [int(wrong[pair]) for pair in pairs], RED)
    bars.set_title("confused most often (true → predicted), examples")
    return made


def _draw_bars(axes: Any, labels: list[str], values: list[float], colour: str) -> None:
    places = np.arange(len(labels))
    axes.barh(places, values, color=colour)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def plot_reliability_diagram(bins: list[dict[str, Any]], ece: float) -> Figure:
    """Accuracy over confidence; on the dotted line the network is as often right as it says. Below: how many."""
    made, ((above,), (below,)) = make_figure(4.8, 5.2, 2, 1, height_ratios=(3, 1), sharex=True)
    centres = [(row["low"] + row["high"]) / 2 for row in bins]
    width = bins[0]["high"] - bins[0]["low"]
    above.bar(centres, [row["accuracy"] for row in bins], width * 0.92, color=BLUE, label="accuracy")
    gaps = [row["confidence"] - row["accuracy"] for row in bins]
    bottoms = [row["accuracy"] for row in bins]
    above.bar(
        centres, gaps, width * 0.92, bottom=bottoms, color="none", edgecolor=RED, hatch="///", linewidth=0.8,
        label="confidence minus accuracy",
    )  # fmt: skip
    above.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    above.set_ylim(0, 1.02)
    above.set_ylabel("accuracy")
    above.set_title(f"reliability (expected calibration error {ece:.3f})")
    above.legend(loc="upper left", fontsize=7)
    below.bar(centres, [row["examples"] for row in bins], width * 0.92, color=GREY)
    below.set_xlabel("confidence")
    below.set_ylabel("examples")
    below.set_xlim(0, 1)
    return made


def plot_per_class_f1(rows: list[dict[str, Any]]) -> Figure:
    """F1 by class, the lowest first; of many classes the lowest and the highest."""
    known = sorted((row for row in rows if row["f1"] is not None), key=lambda row: row["f1"])
    half = MAX_CLASS_BARS // 2
    shown = known if len(known) <= MAX_CLASS_BARS else [*known[:half], *known[-half:]]
    made, ((axes,),) = make_figure(6, 1.2 + 0.2 * max(len(shown), 3))
    _draw_bars(
        axes, [f"{shorten(row['name'])} ({row['examples']})" for row in shown], [row["f1"] for row in shown], BLUE
    )
    if len(shown) < len(known):
        axes.axhline(half - 0.5, color=ORANGE, linewidth=1)
        axes.set_title(f"F1 by class (examples): the {half} lowest and the {half} highest of {len(known)}")
    else:
        axes.set_title("F1 by class (examples)")
    axes.set_xlim(0, 1)
    for place, row in enumerate(shown):
        inside = row["f1"] > 0.15
        colour, side, shift = ("white", "right", -0.01) if inside else ("black", "left", 0.01)
        axes.text(row["f1"] + shift, place, f"{row['f1']:.3f}", va="center", ha=side, color=colour, fontsize=7)
    return made
