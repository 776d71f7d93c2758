"""Shows the progress of a run: a live bar on a terminal, one plain line per epoch otherwise."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

REFRESH_PER_SECOND = 2  # drawing takes time from training


def print_and_log(*messages: str) -> None:
    """Prints each message that is not empty, and logs it to train.log."""
    for message in filter(None, messages):
        log.info(message)
        print(message, flush=True)


class NoProgressDisplay:
    """Shows nothing: the display of the processes other than the first."""

    def __enter__(self) -> NoProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None:
        pass

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        pass


class TerminalProgressDisplay:
    """Shows epochs, images per second, time left, and the training and validation accuracy."""

    def __init__(self, epochs: int, steps: int, batch_size: int):
        self._epochs = epochs
        self._batch_size = batch_size
        self._console = Console(file=sys.stdout, highlight=False)
        self._bar: Progress | None = None
        self._rate_start: tuple[float, int] | None = None
        self._accuracy_text = ""
        self._latest_values: dict[str, float] = {}
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[accuracies]}"),
                console=self._console,
                transient=True,
                refresh_per_second=REFRESH_PER_SECOND,
            )
            self._task = self._bar.add_task(
                "train", total=epochs * steps, epoch=f"1/{epochs}", rate="", accuracies="compiling"
            )

    def __enter__(self) -> TerminalProgressDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Updates the bar after step number `step` of the run."""
        if not self._bar:
            return
        self._rate_start = self._rate_start or (time.perf_counter(), step)
        seconds = time.perf_counter() - self._rate_start[0]
        rate = (step - self._rate_start[1]) * self._batch_size / seconds if seconds > 0.5 else 0
        if values:
            self._latest_values |= values
            self._accuracy_text = _format_accuracies(self._latest_values)
        self._bar.update(
            self._task,
            completed=step,
            epoch=f"{epoch + 1}/{self._epochs}",
            rate=f"{rate:.0f} images/s" if rate else "",
            accuracies=self._accuracy_text,
        )

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Prints and logs one line after an epoch."""
        self._latest_values |= values
        self._accuracy_text = _format_accuracies(self._latest_values)
        self._rate_start = None
        line = (
            f"epoch {epoch + 1:>{len(str(self._epochs))}}/{self._epochs}  loss {values['train/loss']:.4f}  "
            f"{self._accuracy_text}  {values['images_per_second']:.0f} images/s  "
            f"waited for data {values['data_wait_fraction']:.1%}"
        )
        log.info(line)
        self._console.print(line, markup=False, soft_wrap=True)


def _format_accuracies(values: dict[str, float]) -> str:
    shown = [
        f"{name} {values[key]:.4f}"
        for name, key in (("train", "train/accuracy"), ("validation", "validation/accuracy"))
        if key in values
    ]
    return "accuracy " + "  ".join(shown) if shown else ""
