"""Plots of a sweep: parallel coordinates, hyperparameter importances and accuracy over cost; mostly Optuna's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from matplotlib.axes import Axes

PLOT_FILES = ("parallel_coordinates.png", "importances.png", "accuracy_and_cost.png")
MIN_TO_COMPARE = 2  # trials, and axes, that a comparison needs
WIDTH, HEIGHT, DPI = 9, 5, 110  # inches, inches, dots per inch
OBJECTIVE_LABEL = "validation accuracy"


def write_plots(folder: SweepDir, output_dir: Path) -> None:
    """Writes those PLOT_FILES to `output_dir` for which there are enough finished trials."""
    import matplotlib as mpl

    mpl.use("Agg")
    import optuna
    from optuna.visualization import matplotlib as plots

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = [
        (trial, max(accuracies))
        for trial in folder.trials
        if (accuracies := trial.validation_accuracies()) and "macs" in trial.summary()
    ]
    if len(done) < MIN_TO_COMPARE:
        return
    study = make_study([Axis(**axis) for axis in folder.manifest["axes"]], done)
    save_figure(plots.plot_parallel_coordinate(study, target_name=OBJECTIVE_LABEL), output_dir / PLOT_FILES[0])
    varied = {name for trial in study.trials for name in trial.params}
    if len({value for _, value in done}) > 1 and len(varied) >= MIN_TO_COMPARE:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        save_figure(
            plots.plot_param_importances(study, evaluator=evaluator, target_name=OBJECTIVE_LABEL),
            output_dir / PLOT_FILES[1],
        )
    save_figure(plot_accuracy_vs_cost(done), output_dir / PLOT_FILES[2])


def make_study(axes: list[Axis], completed: list[tuple[Trial, float]]) -> optuna.Study:
    """Builds an Optuna study from all trials with an accuracy, pruned ones included, whichever search made them."""
    import optuna

    from train.sweep.search import to_distribution

    study = optuna.create_study(direction="maximize")
    for trial, value in completed:
        params = {axis.key: to_distribution_value(axis, trial.values[axis.key]) for axis in axes}
        distributions = {axis.key: to_distribution(axis) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return study


def to_distribution_value(axis: Axis, value: object) -> object:
    """Returns a value of the axis as its Optuna distribution represents it."""
    return value if axis.is_range else axis.words[[*axis.values].index(value)]


def plot_accuracy_vs_cost(completed: list[tuple[Trial, float]]) -> Axes:
    """Plots every trial's best validation accuracy over its multiply-accumulates per image."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
    costs = [trial.summary()["macs"] for trial, _ in completed]
    axes.scatter(costs, [value for _, value in completed], s=30, alpha=0.8)
    if max(costs) > 2 * min(costs):
        axes.set_xscale("log")
    best, value = max(completed, key=lambda pair: (pair[1], -pair[0].number))
    axes.annotate(best.label, (best.summary()["macs"], value), (6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel("multiply-accumulates per image")
    axes.set_ylabel(OBJECTIVE_LABEL)
    axes.grid(alpha=0.3)
    return axes


def save_figure(axes: Axes | np.ndarray, path: Path) -> None:
    """Saves the figure of `axes`, which is one Axes or an array of them, depending on the Optuna plot."""
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    first: Axes = axes if isinstance(axes, Axes) else axes.flat[0]
    figure = first.get_figure(root=True)
    assert figure is not None  # the axes are drawn in one
    figure.set_size_inches(WIDTH, HEIGHT)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
