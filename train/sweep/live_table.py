"""What a person sees of a sweep: a live table on a terminal, one line per trial that has ended otherwise."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table as Rows

from train.cli.progress import say
from train.sweep.search import Plan
from train.sweep.trials import SweepFolder, Trial
from train.sweep.workers import Ended, Slots

EVERY_SECONDS = 1.0
ENDED_SHOWN = 8  # the newest of those that have ended


class Table:
    """Trial, state, epoch, validation accuracy, time left."""

    def __init__(self, folder: SweepFolder, plan: Plan):
        self._folder, self._plan = folder, plan
        self._console = Console(highlight=False)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        )
        self._ended: dict[int, tuple[Trial, str]] = {}
        self._begun: dict[int, tuple[float, int]] = {}
        self._due = 0.0

    def __enter__(self) -> Table:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def tell(self, trial: Trial, ended: Ended, again: bool) -> None:
        """A trial has ended."""
        told = what_became_of(trial, ended, again)
        self._ended[trial.number] = trial, told
        say(f"trial {trial.number + 1}/{self._plan.expected}  {trial.label}  {told}")

    def show(self, slots: Slots) -> None:
        """What runs now; at most once a second."""
        if self._live is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY_SECONDS
        rows = Rows("trial", "what", "epoch", "validation accuracy", "left", box=None)
        for slot in slots.busy:
            assert slot.trial
            rows.add_row(*self._row(slot.trial))
        waiting = self._plan.expected - len(self._ended) - len(slots.busy)
        rows.caption = f"{len(self._ended)} ended, {max(0, waiting)} waiting"
        self._live.update(rows, refresh=True)

    def _row(self, trial: Trial) -> tuple[str, ...]:
        accuracies, total = trial.accuracies(), trial.epochs()
        done = len(accuracies)
        began, before = self._begun.setdefault(trial.number, (time.monotonic(), done))
        left = ""
        if done > before:
            seconds = (time.monotonic() - began) / (done - before) * (total - done)
            left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
        accuracy = f"{max(accuracies):.4f}" if accuracies else ""
        return str(trial.number + 1), trial.label, f"{done}/{total}", accuracy, left


def what_became_of(trial: Trial, ended: Ended, again: bool) -> str:
    """In a few words."""
    if ended.code:
        return ended.why + (", again" if again else "")
    summary, found = trial.summary(), trial.accuracies()
    told = [f"validation accuracy {max(found):.4f}"] if found else []
    if "test" in summary:
        told.append(f"test accuracy {summary['test']['accuracy']:.4f}")
    if trial.paused():
        told.append(summary["failure"])
    return ", ".join(told)
