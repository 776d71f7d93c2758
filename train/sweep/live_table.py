"""What a person sees of a sweep: a live table on a terminal, one line per trial that has ended otherwise."""

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
MAX_ENDED_SHOWN = 8  # the newest of those that have ended


class LiveTable:
    """Trial, state, epoch, validation accuracy, time left."""

    def __init__(self, folder: SweepDir, algorithm: SearchAlgorithm):
        self._folder, self._algorithm = folder, algorithm
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
        """A trial has ended."""
        told = describe_result(trial, result, will_retry)
        self._results[trial.number] = trial, told
        print_and_log(f"trial {trial.number + 1}/{self._algorithm.expected}  {trial.label}  {told}")

    def refresh(self, workers: WorkerPool) -> None:
        """What runs now; at most once a second."""
        if self._live is None or time.monotonic() < self._next_refresh:
            return
        self._next_refresh = time.monotonic() + REFRESH_SECONDS
        rows = Rows("trial", "what", "epoch", "validation accuracy", "left", box=None)
        for slot in workers.busy:
            assert slot.trial
            rows.add_row(*self._row(slot.trial))
        waiting = self._algorithm.expected - len(self._results) - len(workers.busy)
        rows.caption = f"{len(self._results)} ended, {max(0, waiting)} waiting"
        self._live.update(rows, refresh=True)

    def _row(self, trial: Trial) -> tuple[str, ...]:
        accuracies, total = trial.validation_accuracies(), trial.total_epochs()
        done = len(accuracies)
        began, before = self._first_seen.setdefault(trial.number, (time.monotonic(), done))
        left = ""
        if done > before:
            seconds = (time.monotonic() - began) / (done - before) * (total - done)
            left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
        accuracy = f"{max(accuracies):.4f}" if accuracies else ""
        return str(trial.number + 1), trial.label, f"{done}/{total}", accuracy, left


def describe_result(trial: Trial, result: TrialResult, will_retry: bool) -> str:
    """In a few words."""
    if result.exit_code:
        return result.reason + (", again" if will_retry else "")
    summary, found = trial.summary(), trial.validation_accuracies()
    told = [f"validation accuracy {max(found):.4f}"] if found else []
    if "test" in summary:
        told.append(f"test accuracy {summary['test']['accuracy']:.4f}")
    if trial.is_paused():
        told.append(summary["failure"])
    return ", ".join(told)
