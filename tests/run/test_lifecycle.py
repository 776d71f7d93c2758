"""What surrounds a run: exit codes, and the summary of an attempt that did not finish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.commands import ROOT, THREADS
from support.runs import TINY, same_journals, start_run
from train.config import composition
from train.config.serialization import Redactor
from train.run import lifecycle
from train.sweep.trials import Trial
from train.tracking.run_dir import create_run_dir, open_run_dir

pytestmark = pytest.mark.usefixtures("no_uploads")


def attempt(folder: Path, *overrides: str) -> tuple[int, dict]:
    """Start a run, or make another attempt at it; return the exit code and the summary."""
    config = composition.compose([f"run_dir='{folder}'", f"threads={THREADS}", *TINY, *overrides])
    exists = (folder / "run.json").exists()
    run_dir = open_run_dir(folder) if exists else create_run_dir(str(folder), ROOT / "runs", "tests", latest=False)
    exit_code = lifecycle.continue_run(run_dir, config, Redactor(), frozenset())
    return exit_code, json.loads((folder / "summary.json").read_text())


def test_a_paused_trial_has_its_own_status_and_goes_on_to_the_same_bits(tmp_path: Path):
    exit_code, summary = attempt(tmp_path / "trial", "sweep.until=1")
    assert exit_code == 0
    assert (summary["status"], summary["failure"]) == ("paused", "paused after epoch 1 of 2")
    assert (summary["epochs"], "test" in summary) == (1, False)
    trial = Trial(0, tmp_path / "trial", tmp_path / "000.json", "x", "x", {}, {"epochs": 2}, 0)
    assert (trial.state(), trial.is_paused()) == ("paused", True)

    exit_code, summary = attempt(tmp_path / "trial")
    assert (exit_code, summary["status"], summary["epochs"]) == (0, "finished", 2)
    assert (trial.state(), trial.is_paused()) == ("finished", False)
    undisturbed = start_run(tmp_path / "undisturbed")
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert same_journals(tmp_path / "trial", tmp_path / "undisturbed")


def test_a_failed_run_leaves_a_summary_with_the_reason(tmp_path: Path):
    exit_code, summary = attempt(tmp_path / "run", "batch_size=5000")
    assert exit_code == 2
    assert (summary["status"], summary["config_error"], summary["steps"]) == ("failed", False, 0)
    assert summary["failure"].startswith("ValueError: batch_size must be in 1..")
