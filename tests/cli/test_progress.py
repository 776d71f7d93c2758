"""The progress bar on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from train.cli import progress


def test_progress_bar_shows_training_and_validation_accuracy(monkeypatch: pytest.MonkeyPatch):
    """On a pseudo-terminal: after the first epoch both accuracies stay visible."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    epoch = {"train/loss": 1.0, "train/accuracy": 0.25, "validation/accuracy": 0.75}
    with progress.TerminalProgressDisplay(epochs=2, steps=3, batch_size=8) as bar:
        bar.epoch(0, epoch | {"images_per_second": 5.0, "data_wait_fraction": 0.01})
        bar.step(1, 4, {"train/accuracy": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "epoch 2/2" in shown
    assert "4/6" in shown
    assert "accuracy train 0.5000  validation 0.7500" in shown
