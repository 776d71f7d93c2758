"""Plots of a comparison: accuracies over seeds, and accuracy against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, GREY, ORANGE, RED, make_figure, shorten
from train.evaluation.statistics import Mean

MAX_ROWS = 60  # in the plot of seeds
MAX_NAMED_POINTS = 25  # in the plot of costs


class ComparisonRow(Protocol):
    """What is drawn of a row: values by seed, costs by name (nan where unknown)."""

    @property
    def label(self) -> str: ...
    @property
    def values(self) -> dict[int, float]: ...
    @property
    def costs(self) -> dict[str, float]: ...
    @property
    def accuracy(self) -> Mean: ...
    @property
    def on_pareto_front(self) -> bool: ...


def plot_seeds(rows: Sequence[ComparisonRow], metric: str) -> Figure:
    """Draws each seed as a dot, the mean as a tick, the 95 % interval as a bar."""
    shown = rows[:MAX_ROWS]
    figure, ((axes,),) = make_figure(8, 1.1 + 0.3 * max(len(shown), 2))
    positions = np.arange(len(shown))
    for position, row in zip(positions, shown, strict=True):
        values = list(row.values.values())
        axes.plot(values, [position] * len(values), "o", color=BLUE, alpha=0.45, markersize=4, markeredgewidth=0)
        if row.accuracy.n > 1:
            axes.plot([row.accuracy.low, row.accuracy.high], [position] * 2, color=ORANGE, linewidth=3, alpha=0.8)
        axes.plot([row.accuracy.mean], [position], "|", color="black", markersize=11, markeredgewidth=1.6)
    axes.set_yticks(positions, [shorten(row.label, 46) for row in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    truncation = f" (the first {MAX_ROWS} of {len(rows)} rows)" if len(rows) > MAX_ROWS else ""
    axes.set_title(f"{metric}: seeds, mean, 95 % interval{truncation}")
    return figure


def plot_pareto_front(rows: Sequence[ComparisonRow], metric: str) -> Figure:
    """Draws accuracy against multiply-accumulates per image; a line joins the Pareto front."""
    figure, ((axes,),) = make_figure(8, 4.6)
    measured = [row for row in rows if not math.isnan(row.costs["macs"])]
    if not measured:
        axes.axis("off")
        axes.text(0, 0.5, "no run has multiply-accumulates in MLflow")
        return figure
    for row in measured:
        colour = RED if row.on_pareto_front else GREY
        if row.accuracy.n > 1:
            half = [[row.accuracy.mean - row.accuracy.low], [row.accuracy.high - row.accuracy.mean]]
            axes.errorbar(row.costs["macs"], row.accuracy.mean, half, color=colour, linewidth=1, capsize=2)
        axes.plot(row.costs["macs"], row.accuracy.mean, "o", color=colour, markersize=5)
    front = sorted((row for row in measured if row.on_pareto_front), key=lambda row: row.costs["macs"])
    axes.plot(
        [row.costs["macs"] for row in front], [row.accuracy.mean for row in front], color=RED, linewidth=1, alpha=0.6,
        label="Pareto front",
    )  # fmt: skip
    for row in [*front, *(row for row in measured if not row.on_pareto_front)][:MAX_NAMED_POINTS]:
        axes.annotate(
            shorten(row.label, 40), (row.costs["macs"], row.accuracy.mean), (5, 4), textcoords="offset points",
            fontsize=6.5,
        )  # fmt: skip
    costs = [row.costs["macs"] for row in measured]
    if max(costs) > 3 * min(costs):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("multiply-accumulates per image")
    axes.set_ylabel(metric)
    axes.set_title("accuracy against cost (bars: 95 % interval over seeds)")
    axes.legend(fontsize=7, loc="lower right")
    return figure
