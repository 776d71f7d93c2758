"""Runs that diverge: an error that gives advice, or a rollback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.runs import EVERY_4_STEPS, Killed, read_journal, resume_run, same_journals, start_run
from train.training import checkpoint
from train.training.loop import DivergedError

pytestmark = pytest.mark.usefixtures("no_uploads")


def test_diverging_run_stops_with_advice_and_no_bad_checkpoint(tmp_path: Path):
    overrides = ["optimizer.learning_rate=1e25", "schedule.warmup_epochs=0", "checkpoint.every_steps=1"]
    with pytest.raises(DivergedError) as caught:
        start_run(tmp_path / "run", *overrides)
    assert str(caught.value) == (
        "training diverged: non-finite loss at step 2 (epoch 1); the last good checkpoint is "
        "epoch-00000-batch-0000001; use a lower optimizer.learning_rate, a gradient_clip, on_divergence=rollback, "
        "or precision=float32"
    )
    [path] = (tmp_path / "run/checkpoints").iterdir()
    assert all(np.isfinite(array).all() for array in checkpoint.read_checkpoint(path).arrays.values())


@pytest.mark.slow
def test_rollback_lowers_the_learning_rate_and_is_recorded(tmp_path: Path, kill_at: Any):
    """A run killed after the rollback resumes to the same bits."""
    overrides = [
        "optimizer.learning_rate=1e25", "schedule=constant", "schedule.warmup_epochs=0", "on_divergence=rollback",
        "rollback.learning_rate_factor=1e-27", EVERY_4_STEPS,
    ]  # fmt: skip
    summary = start_run(tmp_path / "run", *overrides)
    assert (summary["rollbacks"], summary["steps"]) == (1, 12)
    lines = read_journal(tmp_path / "run")
    [rollback] = [line for line in lines if "rollback/number" in line["values"]]
    assert rollback["values"] == {
        "rollback/number": 1.0,
        "rollback/learning_rate_factor": 1e-27,
        "rollback/to_step": 0.0,
    }
    assert (rollback["step"], rollback["branch"]) == (2, [0, 1])
    assert lines[-3]["values"]["learning_rate"] == pytest.approx(0.01)
    kill_at("step", 9)
    with pytest.raises(Killed):
        start_run(tmp_path / "killed", *overrides)
    kill_at(None)
    second = resume_run(tmp_path / "killed")
    assert second["weights_sha256"] == summary["weights_sha256"]
    assert same_journals(tmp_path / "killed", tmp_path / "run")


def test_number_of_rollbacks_is_limited(tmp_path: Path):
    overrides = [
        "optimizer.learning_rate=1e25",
        "schedule.warmup_epochs=0",
        "on_divergence=rollback",
        "rollback.at_most=2",
    ]
    with pytest.raises(DivergedError, match=r"loss at step 2 \(epoch 1\) after 2 rollbacks; the last good check"):
        start_run(tmp_path / "run", *overrides)
    numbers = [line["values"].get("rollback/number") for line in read_journal(tmp_path / "run")]
    assert [number for number in numbers if number] == [1.0, 2.0]
