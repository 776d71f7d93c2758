"""What a sweep found, drawn: parallel coordinates, importances, accuracy against cost; most of it by Optuna."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial

PLOT_FILES = ("parallel_coordinates.png", "importances.png", "accuracy_and_cost.png")
MIN_TO_COMPARE = 2  # trials and axes, for what compares them
WIDTH, HEIGHT, DPI = 9, 5, 110  # inches, and dots for each
OBJECTIVE_LABEL = "validation accuracy"


def write_plots(folder: SweepDir, output_dir: Path) -> None:
    """Draws as many of NAMES into `place` as there is something to be seen in."""
    import matplotlib as mpl

    mpl.use("Agg")
    import optuna
    from optuna.visualization import matplotlib as plots

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    done = [
        (trial, max(found))
        for trial in folder.trials
        if (found := trial.validation_accuracies()) and "macs" in trial.summary()
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


def make_study(axes: list[Axis], completed: list[tuple[Trial, float]]) -> Any:
    """All that has come to a value as a study of Optuna's, whichever search it was; what was pruned has one, too."""
    import optuna

    from train.sweep.search import to_distribution

    study = optuna.create_study(direction="maximize")
    for trial, value in completed:
        params = {axis.key: to_distribution_value(axis, trial.values[axis.key]) for axis in axes}
        spread = {axis.key: to_distribution(axis) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=value))
    return study


def to_distribution_value(axis: Axis, value: Any) -> Any:
    """A value as it stands in the axis's distribution."""
    return value if axis.is_range else axis.words[[*axis.values].index(value)]


def plot_accuracy_vs_cost(completed: list[tuple[Trial, float]]) -> Any:
    """Every trial's best validation accuracy over the multiply-accumulates of an image."""
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


def save_figure(axes: Any, path: Path) -> None:
    """Whatever of a figure Optuna returns."""
    from matplotlib import pyplot

    axes = axes.flat[0] if hasattr(axes, "flat") else axes
    figure = axes.get_figure()
    figure.set_size_inches(WIDTH, HEIGHT)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
