"""Progress of a sweep: a live table on a terminal, and one line for each trial that has ended."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table as Rows

from train.cli.progress import print_and_log
from train.sweep.search import SearchAlgorithm
from train.sweep.trials import SweepDir, Trial
from train.sweep.workers import TrialResult, WorkerPool

REFRESH_SECONDS = 1.0


class LiveTable:
    """Running trials with their epoch, validation accuracy and remaining time."""

    def __init__(self, folder: SweepDir, algorithm: SearchAlgorithm):
        self._folder = folder
        self._algorithm = algorithm
        self._console = Console(highlight=False)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        )
        self._results: dict[int, tuple[Trial, str]] = {}
        self._first_seen: dict[int, tuple[float, int]] = {}
        self._next_refresh = 0.0

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def print_result(self, trial: Trial, result: TrialResult, will_retry: bool) -> None:
        """Prints one line about a trial that has ended."""
        description = describe_result(trial, result, will_retry)
        self._results[trial.number] = trial, description
        print_and_log(f"trial {trial.number + 1}/{self._algorithm.expected}  {trial.label}  {description}")

    def refresh(self, workers: WorkerPool) -> None:
        """Redraws the running trials, at most once a second."""
        if self._live is None or time.monotonic() < self._next_refresh:
            return
        self._next_refresh = time.monotonic() + REFRESH_SECONDS
        rows = Rows("trial", "overrides", "epoch", "validation accuracy", "time left", box=None)
        for worker in workers.busy:
            assert worker.trial
            rows.add_row(*self._row(worker.trial))
        waiting = self._algorithm.expected - len(self._results) - len(workers.busy)
        rows.caption = f"{len(self._results)} done, {max(0, waiting)} waiting"
        self._live.update(rows, refresh=True)

    def _row(self, trial: Trial) -> tuple[str, ...]:
        accuracies = trial.validation_accuracies()
        total = trial.total_epochs()
        done = len(accuracies)
        first_seen, first_done = self._first_seen.setdefault(trial.number, (time.monotonic(), done))
        time_left = ""
        if done > first_done:
            seconds = (time.monotonic() - first_seen) / (done - first_done) * (total - done)
            time_left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
        accuracy = f"{max(accuracies):.4f}" if accuracies else ""
        return str(trial.number + 1), trial.label, f"{done}/{total}", accuracy, time_left


def describe_result(trial: Trial, result: TrialResult, will_retry: bool) -> str:
    """Describes the outcome of a trial in a few words: its accuracies, or why it failed."""
    if result.exit_code:
        return result.reason + (", retrying" if will_retry else "")
    summary = trial.summary()
    accuracies = trial.validation_accuracies()
    notes = [f"validation accuracy {max(accuracies):.4f}"] if accuracies else []
    if "test" in summary:
        notes.append(f"test accuracy {summary['test']['accuracy']:.4f}")
    if trial.is_paused():
        notes.append(summary["failure"])
    return ", ".join(notes)
