"""Learning curves: losses, accuracies and the learning rate over the epochs."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.evaluation.plots.style import BLUE, GREY, ORANGE, PALETTE, make_figure
from train.storage.json_types import JsonObject

LOSS_CURVES = {
    "train/loss": ("train", BLUE),
    "validation/loss": ("validation", ORANGE),
}
TITLES = {
    "loss": "loss of the main output, nats",
    "accuracy": "accuracy of the main output",
    "learning_rate": "learning rate",
}
ACCURACY_CURVES = {
    "train/accuracy": ("train", BLUE),
    "validation/accuracy": ("validation", ORANGE),
    "validation/top5_accuracy": ("validation, top 5", GREY),
}


def plot_learning_curves(lines: list[JsonObject], best_epoch: int | None) -> dict[str, Figure]:
    """Draws `loss`, `accuracy` and `learning_rate` over the epochs, counted from 1, and marks the best epoch.

    lines: of the journal, in order; their epochs count from 0. best_epoch: counts from 1.
    """
    epochs = [line for line in lines if "validation/loss" in line["values"]]
    seen = {name for line in epochs for name in line["values"]}
    auxiliary = sorted(name for name in seen if name.startswith("train/aux"))
    figures = {}
    for name, title in TITLES.items():
        figures[name], ((axes,),) = make_figure(4.6, 3.4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "learning_rate":
            _plot_learning_rate(axes, lines)
        else:
            _plot_metrics(axes, epochs, LOSS_CURVES if name == "loss" else ACCURACY_CURVES)
            for number, metric in enumerate(metric for metric in auxiliary if metric.endswith(f"_{name}")):
                _plot_metric(axes, epochs, metric, metric.removesuffix(f"_{name}"), PALETTE[2 + number % 6], "--")
            axes.legend(fontsize=7)
        if name != "accuracy":
            axes.set_ylim(bottom=0)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                f"best: {best_epoch}", (best_epoch, 0.02), xycoords=("data", "axes fraction"), fontsize=7,
                xytext=(-3, 0), textcoords="offset points", color="#555555", ha="right",
            )  # fmt: skip
    return figures


def _plot_metrics(axes: Axes, epochs: list[JsonObject], curves: dict[str, tuple[str, str]]) -> None:
    for name, (label, colour) in curves.items():
        _plot_metric(axes, epochs, name, label, colour, "-")


def _plot_metric(axes: Axes, epochs: list[JsonObject], name: str, label: str, colour: str, style: str) -> None:
    points = [(line["epoch"] + 1, line["values"][name]) for line in epochs if name in line["values"]]
    if points:
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), style, label=label, color=colour, linewidth=1.5, marker=marker)


def _plot_learning_rate(axes: Axes, lines: list[JsonObject]) -> None:
    """Draws the learning rate at every logged step, also within epochs."""
    ends = [line for line in lines if "validation/loss" in line["values"]]
    if not ends:
        return
    steps_per_epoch = ends[0]["step"] / (ends[0]["epoch"] + 1)
    points = [
        (line["step"] / steps_per_epoch, line["values"]["learning_rate"])
        for line in lines
        if "learning_rate" in line["values"]
    ]
    axes.plot(*zip(*points, strict=True), color=PALETTE[2], linewidth=1.5)
