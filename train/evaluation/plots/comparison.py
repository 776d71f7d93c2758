"""Rows of a comparison: accuracies over seeds, and accuracy beside cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, GREY, ORANGE, RED, make_figure, shorten

MAX_ROWS = 60  # rows that have a line of their own
MAX_NAMED_POINTS = 25  # points that have a name


def plot_seeds(rows: list[Any], metric: str) -> Figure:
    """Every seed as a dot, the mean as a line, the 95 % interval as a bar. rows: of train.compare, in their order."""
    shown = rows[:MAX_ROWS]
    made, ((axes,),) = make_figure(8, 1.1 + 0.3 * max(len(shown), 2))
    places = np.arange(len(shown))
    for place, row in zip(places, shown, strict=True):
        values = list(row.values.values())
        axes.plot(values, [place] * len(values), "o", color=BLUE, alpha=0.45, markersize=4, markeredgewidth=0)
        if row.accuracy.n > 1:
            axes.plot([row.accuracy.low, row.accuracy.high], [place] * 2, color=ORANGE, linewidth=3, alpha=0.8)
        axes.plot([row.accuracy.mean], [place], "|", color="black", markersize=11, markeredgewidth=1.6)
    axes.set_yticks(places, [shorten(row.label, 46) for row in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    more = f" (the first {MAX_ROWS} of {len(rows)} rows)" if len(rows) > MAX_ROWS else ""
    axes.set_title(f"{metric}: seeds, mean, 95 % interval{more}")
    return made


def plot_pareto_front(rows: list[Any], metric: str) -> Figure:
    """Accuracy over the multiply-accumulates of an image; the line joins what nothing beats at its cost."""
    made, ((axes,),) = make_figure(8, 4.6)
    known = [row for row in rows if not math.isnan(row.costs["macs"])]
    if not known:
        axes.axis("off")
        axes.text(0, 0.5, "no run has its multiply-accumulates in MLflow")
        return made
    for row in known:
        colour = RED if row.on_pareto_front else GREY
        if row.accuracy.n > 1:
            half = [[row.accuracy.mean - row.accuracy.low], [row.accuracy.high - row.accuracy.mean]]
            axes.errorbar(row.costs["macs"], row.accuracy.mean, half, color=colour, linewidth=1, capsize=2)
        axes.plot(row.costs["macs"], row.accuracy.mean, "o", color=colour, markersize=5)
    best = sorted((row for row in known if row.on_pareto_front), key=lambda row: row.costs["macs"])
    axes.plot(
        [row.costs["macs"] for row in best], [row.accuracy.mean for row in best], color=RED, linewidth=1, alpha=0.6,
        label="nothing is more accurate for as little",
    )  # fmt: skip
    for row in [*best, *(row for row in known if not row.on_pareto_front)][:MAX_NAMED_POINTS]:
        axes.annotate(
            shorten(row.label, 40), (row.costs["macs"], row.accuracy.mean), (5, 4), textcoords="offset points",
            fontsize=6.5,
        )  # fmt: skip
    costs = [row.costs["macs"] for row in known]
    if max(costs) > 3 * min(costs):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("multiply-accumulates per image")
    axes.set_ylabel(metric)
    axes.set_title("what accuracy costs (bars: 95 % interval over seeds)")
    axes.legend(fontsize=7, loc="lower right")
    return made
