"""What surrounds a run: exit codes, and the summary of an attempt that did not finish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

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


def test_values_from_the_environment_are_used_and_stored_as_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config in the folder keeps the references; what lists the run has their values."""
    monkeypatch.setenv("INCEPTION_TEST_SEED", "3")
    monkeypatch.setenv("INCEPTION_TEST_NAME", "mine")
    words = ["seed=${oc.env:INCEPTION_TEST_SEED}", "tracking.experiment=${oc.env:INCEPTION_TEST_NAME}"]
    overrides = [f"run_dir='{tmp_path / 'run'}'", f"threads={THREADS}", *TINY, "epochs=1", "evaluate.test=false"]
    config = composition.compose([*overrides, "seed=3", "tracking.experiment=mine"])
    redactor = Redactor({word.partition("=")[0]: word.partition("=")[2] for word in words})
    assert lifecycle.start_run(config, redactor, latest=False) == 0
    identity = json.loads((tmp_path / "run/run.json").read_text())
    assert (identity["experiment"], identity["tags"]["seed"], identity["name"]) == ("mine", "3", "vgg16 seed 3")
    assert json.loads((tmp_path / "run/summary.json").read_text())["seed"] == 3
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert [f"seed={stored['seed']}", f"tracking.experiment={stored['tracking']['experiment']}"] == words
