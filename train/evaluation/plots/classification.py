"""Plots of classification results: confusion, calibration, per-class F1. Readable for 2 classes and for 1,000."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, COLORMAP, GREY, ORANGE, RED, make_figure, shorten
from train.storage.json_types import JsonObject

MAX_NUMBERED_CLASSES = 20  # with more classes the cells of the matrix show no counts
MAX_NAMED_CLASSES = 40  # with more classes its rows show no names
MAX_CONFUSED_PAIRS = 20  # listed beside a matrix without names
MAX_CLASS_BARS = 40  # bars in the F1 plot


def plot_confusion_matrix(matrix: list[list[int]], classes: list[str]) -> Figure:
    """Draws the confusion matrix: rows are true classes, colours shares of the row, numbers examples."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(classes) > MAX_NAMED_CLASSES:
        return _plot_large_confusion_matrix(counts, shares, classes)
    side = 2.2 + 0.34 * len(classes)
    figure, ((axes,),) = make_figure(side + 1.2, side)
    _draw_matrix(figure, axes, shares)
    names = [shorten(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), names)
    if len(classes) <= MAX_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "black" if shares[row, column] > 0.5 else "white"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def _draw_matrix(figure: Figure, axes: Axes, shares: np.ndarray) -> None:
    image = axes.imshow(shares, cmap=COLORMAP, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).set_label("share of the true class", fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("confusion matrix")


def _plot_large_confusion_matrix(counts: np.ndarray, shares: np.ndarray, classes: list[str]) -> Figure:
    """Draws the whole matrix as a map, and beside it the most confused pairs."""
    figure, ((axes, bars),) = make_figure(14, 6.5, 1, 2)
    _draw_matrix(figure, axes, shares)
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(errors, axis=None, kind="stable")[::-1][:MAX_CONFUSED_PAIRS]
    pairs = [divmod(int(index), len(classes)) for index in order if errors.flat[index]]
    labels = [f"{shorten(classes[true])} → {shorten(classes[predicted])}" for true, predicted in pairs]
    _draw_bars(bars, labels, [int(errors[pair]) for pair in pairs], RED)
    bars.set_title("most confused pairs (true → predicted), examples")
    return figure


def _draw_bars(axes: Axes, labels: list[str], values: list[float], colour: str) -> None:
    positions = np.arange(len(labels))
    axes.barh(positions, values, color=colour)
    axes.set_yticks(positions, labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def plot_reliability_diagram(bins: list[JsonObject], ece: float) -> Figure:
    """Draws accuracy against confidence, which are equal on the dotted line; below, the number of examples per bin."""
    figure, ((above,), (below,)) = make_figure(4.8, 5.2, 2, 1, height_ratios=(3, 1), sharex=True)
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
    return figure


def plot_per_class_f1(rows: list[JsonObject]) -> Figure:
    """Draws F1 by class, the lowest first; of many classes the lowest and the highest."""
    defined = sorted((row for row in rows if row["f1"] is not None), key=lambda row: row["f1"])
    half = MAX_CLASS_BARS // 2
    shown = defined if len(defined) <= MAX_CLASS_BARS else [*defined[:half], *defined[-half:]]
    figure, ((axes,),) = make_figure(6, 1.2 + 0.2 * max(len(shown), 3))
    _draw_bars(
        axes, [f"{shorten(row['name'])} ({row['examples']})" for row in shown], [row["f1"] for row in shown], BLUE
    )
    if len(shown) < len(defined):
        axes.axhline(half - 0.5, color=ORANGE, linewidth=1)
        axes.set_title(f"F1 by class (examples): the {half} lowest and the {half} highest of {len(defined)}")
    else:
        axes.set_title("F1 by class (examples)")
    axes.set_xlim(0, 1)
    for position, row in enumerate(shown):
        inside = row["f1"] > 0.15
        colour, side, shift = ("white", "right", -0.01) if inside else ("black", "left", 0.01)
        axes.text(row["f1"] + shift, position, f"{row['f1']:.3f}", va="center", ha=side, color=colour, fontsize=7)
    return figure
