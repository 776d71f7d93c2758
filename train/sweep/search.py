"""Search algorithms: each one proposes the next trial whenever a worker is free, and is notified of finished trials.

Every algorithm reads its progress from the sweep's folder, so that a killed sweep can be resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from train.cli.progress import print_and_log
from train.config.schema import Sweep
from train.storage.json_types import JsonObject
from train.sweep.search_space import Axis, Point
from train.sweep.trials import SweepDir, Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

MAX_ASK_ATTEMPTS = 20  # to find a point that has not been tried
MakeTrials = Callable[[Point], list[JsonObject]]  # a point -> its frozen trials, one per seed


class SearchAlgorithm(Protocol):
    """The methods raise no errors: the sweep has been checked before."""

    def next_trial(self) -> Trial | None:
        """Returns the next trial to run, or None if there is none until another trial has ended."""

    def on_trial_end(self, trial: Trial) -> None:
        """Takes note that a trial has finished, paused or failed."""

    def abandoned(self) -> list[Trial]:
        """Returns the trials that have been paused for good, once there is no next trial."""

    @property
    def expected(self) -> int:
        """Expected number of trials, as far as it is known."""


class GridSearch:
    """Runs all trials in order, except those that have finished."""

    def __init__(self, folder: SweepDir):
        trials = folder.trials
        self._pending = [trial for trial in trials if trial.state() != "finished"]
        self.expected = len(trials)

    def next_trial(self) -> Trial | None:
        return self._pending.pop(0) if self._pending else None

    def on_trial_end(self, trial: Trial) -> None:
        """Does nothing: a grid does not depend on results."""

    def abandoned(self) -> list[Trial]:
        return []


class OptunaSearch:
    """Points suggested by Optuna: at random, or by a tree-structured Parzen estimator (TPE).

    Source of TPE: Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (2011), section 4. Its draws depend on
    (seed, number of the point) and on the results known so far. The objective of a point is the mean over its seeds; a
    point with a failed trial has none.
    """

    def __init__(self, folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._folder = folder
        self._settings = settings
        self._make_trials = make_trials
        self._optuna = optuna
        self._study = optuna.create_study(
            storage=storage, study_name=folder.manifest["sweep_id"], direction="maximize", load_if_exists=True
        )
        self._axes = {axis["key"]: Axis(**axis) for axis in folder.manifest["axes"]}
        self._points: dict[int, list[Trial]] = {}
        for trial in folder.trials:
            self._points.setdefault(trial.point, []).append(trial)
        self._failed_points: set[int] = set()
        self._exhausted = False
        self._report_missed_results()
        self._pending = [trial for point in self._points.values() for trial in point if self._is_pending(trial)]
        self.expected = settings.trials * settings.seeds

    def _is_pending(self, trial: Trial) -> bool:
        return trial.state() != "finished"

    def _report_missed_results(self) -> None:
        """Reports to Optuna the results that a killed launcher did not report."""
        for running in self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,)):
            if running.number in self._points:
                self._tell(running.number)
            else:  # its trials were never frozen
                self._study.tell(running.number, state=self._optuna.trial.TrialState.FAIL)

    def next_trial(self) -> Trial | None:
        if not self._pending:
            self._pending += self._next_point_trials()
        return self._pending.pop(0) if self._pending else None

    def _next_point_trials(self) -> list[Trial]:
        """Returns the trials of a new point; none if there are enough points, or no new one is found."""
        if self._exhausted or len(self._points) >= self._settings.trials:
            return []
        for _ in range(MAX_ASK_ATTEMPTS):
            if trials := self._try_one_point():
                return trials
        self._exhausted = True
        print_and_log(f"found only {len(self._points)} distinct points instead of sweep.trials={self._settings.trials}")
        self.expected = len(self._points) * self._settings.seeds
        return []

    def _try_one_point(self) -> list[Trial]:
        """Asks Optuna for a point and freezes its trials; returns none if the point has been tried."""
        number = len(self._study.get_trials(deepcopy=False))
        digest = hashlib.sha256(f"{self._folder.manifest['seed']} {number}".encode()).digest()
        self._study.sampler = make_sampler(self._settings.search, int.from_bytes(digest[:4], "big"))
        asked = self._study.ask({key: to_distribution(axis) for key, axis in self._axes.items()})
        frozen = self._make_trials({key: self._axes[key].decode(sampled) for key, sampled in asked.params.items()})
        tried = {trial.key for trials in self._points.values() for trial in trials}
        if any(trial["key"] in tried for trial in frozen):
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            return []
        first = sum(map(len, self._points.values()))
        trials = [self._folder.add(first + index, **trial, point=asked.number) for index, trial in enumerate(frozen)]
        self._points[asked.number] = trials
        return trials

    def on_trial_end(self, trial: Trial) -> None:
        if trial.state() not in ("finished", "interrupted", "paused"):
            self._failed_points.add(trial.point)
        self._tell(trial.point)

    def abandoned(self) -> list[Trial]:
        return []

    def _tell(self, point: int) -> None:
        """Reports the point to Optuna as soon as all its trials have ended."""
        trials = self._points[point]
        accuracies = [accuracy for trial in trials if (accuracy := trial.objective()) is not None]
        if len(accuracies) == len(trials):
            self._study.tell(point, fmean(accuracies), skip_if_finished=True)
        elif point in self._failed_points:
            self._study.tell(point, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)


class AshaSearch(OptunaSearch):
    """Asynchronous successive halving: random points pause at each rung, and the best 1 / `reduction` are promoted.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2018), algorithm 2. When no point can be
    promoted any more, the best one on the highest rung reached is trained to the last epoch, so that one finishes.
    """

    def __init__(self, folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str):
        self._rungs = rungs(settings, folder.manifest["epochs"])
        self._running_points: set[int] = set()
        self._must_compare = True  # whether a trial has ended since the last comparison
        super().__init__(folder, settings, make_trials, storage)

    def _is_pending(self, trial: Trial) -> bool:
        """Whether the trial was between two rungs when its launcher died."""
        return trial.state() != "finished" and trial.epochs_done() not in self._rungs

    def next_trial(self) -> Trial | None:
        if not self._pending and self._must_compare:
            self._pending += self._promotable_trials() or self._next_point_trials() or self._finalist_trials()
            self._must_compare = bool(self._pending)
        if not self._pending:
            return None
        trial = self._pending.pop(0)
        self._running_points.add(trial.point)
        until = next(epochs for epochs in self._rungs if epochs > trial.epochs_done())
        return replace(trial, overrides=(f"sweep.until={until}",))

    def on_trial_end(self, trial: Trial) -> None:
        self._must_compare = True
        super().on_trial_end(trial)
        if all(other.epochs_done() in self._rungs for other in self._points[trial.point]):
            self._running_points.discard(trial.point)

    def _epochs_by_point(self) -> dict[int, int]:
        """Returns the completed epochs of every point, running or paused: the minimum over its trials."""
        return {number: min(trial.epochs_done() for trial in trials) for number, trials in self._points.items()}

    def _mean_best_accuracy(self, point: int, epochs: int) -> float:
        return fmean(max(trial.validation_accuracies()[:epochs]) for trial in self._points[point])

    def _is_idle(self, point: int) -> bool:
        return point not in self._running_points and point not in self._failed_points

    def _promotable_trials(self) -> list[Trial]:
        """Returns the trials of the best point to promote, from the highest rung possible."""
        epochs_done = self._epochs_by_point()
        for rung, next_rung in reversed(list(pairwise(self._rungs))):
            ranking = sorted(
                (-self._mean_best_accuracy(point, rung), point)
                for point, epochs in epochs_done.items()
                if epochs >= rung
            )
            for _, point in ranking[: len(ranking) // self._settings.reduction]:
                if epochs_done[point] < next_rung and self._is_idle(point):
                    return list(self._points[point])
        return []

    def _finalist_trials(self) -> list[Trial]:
        epochs_done = {
            point: epochs for point, epochs in self._epochs_by_point().items() if point not in self._failed_points
        }
        if self._running_points or not epochs_done or max(epochs_done.values()) in (0, self._rungs[-1]):
            return []
        highest = max(epochs_done.values())
        _, point = min(
            (-self._mean_best_accuracy(point, highest), point)
            for point, epochs in epochs_done.items()
            if epochs == highest
        )
        return list(self._points[point])

    def abandoned(self) -> list[Trial]:
        """Returns the trials of the points that were not promoted, and reports these to Optuna as pruned."""
        pruned = self._optuna.trial.TrialState.PRUNED
        trials = []
        for point, epochs in self._epochs_by_point().items():
            if epochs < self._rungs[-1] and self._is_idle(point) and not self._pending:
                self._study.tell(point, state=pruned, skip_if_finished=True)
                trials += self._points[point]
        return trials


def rungs(settings: Sweep, max_epochs: int) -> list[int]:
    """Returns the epochs after which points are compared, `max_epochs` included."""
    below_max = []
    epochs = settings.first_epochs
    while epochs < max_epochs:
        below_max.append(epochs)
        epochs *= settings.reduction
    return [*below_max, max_epochs]


def make_sampler(search: str, seed: int) -> BaseSampler:
    """Returns the Optuna sampler that draws one point."""
    import optuna

    if search in ("random", "asha"):
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def to_distribution(axis: Axis) -> BaseDistribution:
    """Returns the Optuna distribution of an axis."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.words)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def create_algorithm(folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str) -> SearchAlgorithm:
    """Creates the algorithm that `sweep.search` names. storage: URI of Optuna's database."""
    if settings.search == "grid":
        return GridSearch(folder)
    return (AshaSearch if settings.search == "asha" else OptunaSearch)(folder, settings, make_trials, storage)
