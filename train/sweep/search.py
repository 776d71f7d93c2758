"""Which trials a sweep has, and in which order: a plan gives one whenever there is room, and hears what became of it.

Every plan reads from the sweep's folder how far it has come, so that it goes on after any death.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

from train.cli.progress import print_and_log
from train.config.schema import Sweep
from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial

MAX_ASK_ATTEMPTS = 20  # to find a point that has not been tried
MakeTrials = Callable[
    [dict[str, Any]], list[dict[str, Any]]
]  # a point -> its trials, one for every seed, as they are frozen


class SearchAlgorithm(Protocol):
    """Raises nothing: whatever can be wrong with a sweep has been told before."""

    def next_trial(self) -> Trial | None:
        """The next trial to be run; None where there is none, at least until another one has ended."""

    def on_trial_end(self, trial: Trial) -> None:
        """A trial of this plan has come to its end, whichever it was."""

    def abandoned(self) -> list[Trial]:
        """Trials that have paused for good, when there is nothing more to follow."""

    @property
    def expected(self) -> int:
        """How many trials there will be, as far as is known."""


class GridSearch:
    """All trials in their order. Those that have finished stay as they are."""

    def __init__(self, folder: SweepDir):
        found = folder.trials
        self._pending = [trial for trial in found if trial.state() != "finished"]
        self.expected = len(found)

    def next_trial(self) -> Trial | None:
        return self._pending.pop(0) if self._pending else None

    def on_trial_end(self, trial: Trial) -> None:
        """Nothing follows from it."""

    def abandoned(self) -> list[Trial]:
        return []


class OptunaSearch:
    """Points that Optuna is asked for: drawn at random, or where good ones have been (TPE).

    Source of TPE: Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (2011), section 4. Its draws depend on
    (seed, number of the point) and on what is known when it is asked for. The objective of a point is the mean over its
    seeds; one with a failed trial has none.
    """

    def __init__(self, folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._folder, self._settings, self._make_trials, self._optuna = folder, settings, make_trials, optuna
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
        """Tells Optuna what a launcher that was killed could not."""
        for asked in self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,)):
            if asked.number in self._points:
                self._tell(asked.number)
            else:  # it never got to be frozen
                self._study.tell(asked.number, state=self._optuna.trial.TrialState.FAIL)

    def next_trial(self) -> Trial | None:
        if not self._pending:
            self._pending += self._next_point_trials()
        return self._pending.pop(0) if self._pending else None

    def _next_point_trials(self) -> list[Trial]:
        """The trials of a point that has not been tried; none where there are enough, or no other is found."""
        if self._exhausted or len(self._points) >= self._settings.trials:
            return []
        for _ in range(MAX_ASK_ATTEMPTS):
            if found := self._ask_new_point():
                return found
        self._exhausted = True
        print_and_log(
            f"no more than {len(self._points)} points are found that differ, of the {self._settings.trials} wanted"
        )
        self.expected = len(self._points) * self._settings.seeds
        return []

    def _ask_new_point(self) -> list[Trial]:
        """The trials of one more point, frozen; none if it has been tried."""
        number = len(self._study.get_trials(deepcopy=False))
        digest = hashlib.sha256(f"{self._folder.manifest['seed']} {number}".encode()).digest()
        self._study.sampler = make_sampler(self._settings.search, int.from_bytes(digest[:4], "big"))
        asked = self._study.ask({key: to_distribution(axis) for key, axis in self._axes.items()})
        made = self._make_trials({key: self._axes[key].decode(found) for key, found in asked.params.items()})
        known = {trial.key for trials in self._points.values() for trial in trials}
        if any(content["key"] in known for content in made):
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            return []
        first = sum(map(len, self._points.values()))
        trials = [self._folder.add(first + place, **content, point=asked.number) for place, content in enumerate(made)]
        self._points[asked.number] = trials
        return trials

    def on_trial_end(self, trial: Trial) -> None:
        if trial.state() not in ("finished", "interrupted"):
            self._failed_points.add(trial.point)
        self._tell(trial.point)

    def abandoned(self) -> list[Trial]:
        return []

    def _tell(self, point: int) -> None:
        """As soon as all of its trials have ended."""
        values = [trial.objective() for trial in self._points[point]]
        if None not in values:
            self._study.tell(point, fmean(values), skip_if_finished=True)  # type: ignore[arg-type]
        elif point in self._failed_points:
            self._study.tell(point, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)


class AshaSearch(OptunaSearch):
    """Points drawn at random are compared after a few epochs; one of `reduction` goes on, from where it paused.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2018), algorithm 2. When there is
    nothing left to compare, the best of those that came farthest goes on to the last epoch, so that one is finished.
    """

    def __init__(self, folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str):
        self._rungs = rungs(settings, folder.manifest["epochs"])
        self._running_points: set[int] = set()
        self._must_compare = True  # whether something has changed since the points were compared
        super().__init__(folder, settings, make_trials, storage)

    def _is_pending(self, trial: Trial) -> bool:
        """Whether it was on its way from one comparison to the next when its launcher died."""
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
        """Epochs that every point has come through; of those that are at rest and of those that run."""
        return {number: min(trial.epochs_done() for trial in trials) for number, trials in self._points.items()}

    def _mean_best_accuracy(self, point: int, epochs: int) -> float:
        return fmean(max(trial.validation_accuracies()[:epochs]) for trial in self._points[point])

    def _is_idle(self, point: int) -> bool:
        return point not in self._running_points and point not in self._failed_points

    def _promotable_trials(self) -> list[Trial]:
        """The best that may go on, of those that came farthest."""
        come = self._epochs_by_point()
        for here, there in reversed(list(pairwise(self._rungs))):
            known = sorted(
                (-self._mean_best_accuracy(point, here), point) for point, epochs in come.items() if epochs >= here
            )
            for _, point in known[: len(known) // self._settings.reduction]:
                if come[point] < there and self._is_idle(point):
                    return list(self._points[point])
        return []

    def _finalist_trials(self) -> list[Trial]:
        come = {point: epochs for point, epochs in self._epochs_by_point().items() if point not in self._failed_points}
        if self._running_points or not come or max(come.values()) in (0, self._rungs[-1]):
            return []
        most = max(come.values())
        _, point = min(
            (-self._mean_best_accuracy(point, most), point) for point, epochs in come.items() if epochs == most
        )
        return list(self._points[point])

    def abandoned(self) -> list[Trial]:
        """Those that other points have beaten."""
        pruned = self._optuna.trial.TrialState.PRUNED
        found = []
        for point, epochs in self._epochs_by_point().items():
            if epochs < self._rungs[-1] and self._is_idle(point) and not self._pending:
                self._study.tell(point, state=pruned, skip_if_finished=True)
                found += self._points[point]
        return found


def rungs(settings: Sweep, max_epochs: int) -> list[int]:
    """Epochs after which points are compared, the last one included."""
    found, epochs = [], settings.first_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= settings.reduction
    return [*found, max_epochs]


def make_sampler(search: str, seed: int) -> Any:
    """Optuna's, for one point."""
    import optuna

    if search in ("random", "asha"):
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def to_distribution(axis: Axis) -> Any:
    """Optuna's, of an axis."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.words)
    kind = IntDistribution if isinstance(axis.low, int) and isinstance(axis.high, int) else FloatDistribution
    return kind(axis.low, axis.high, log=axis.log)


def create_algorithm(folder: SweepDir, settings: Sweep, make_trials: MakeTrials, storage: str) -> SearchAlgorithm:
    """What `sweep.search` says. storage: where Optuna keeps what it is told, as an address."""
    if settings.search == "grid":
        return GridSearch(folder)
    return (AshaSearch if settings.search == "asha" else OptunaSearch)(folder, settings, make_trials, storage)
