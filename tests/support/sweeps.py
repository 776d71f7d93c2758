"""Sweep folders with trials that need no training, and whole sweeps through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import ROOT, Done, run_command
from support.waiting import happens_within
from train.sweep import trials
from train.sweep.trials import SweepDir, Trial

SMALL = ("model=vgg16", "model.width=0.1")


def trial_record(number: int) -> dict[str, Any]:
    config = {"epochs": 9, "batch_size": 32}
    return {"label": f"n={number}", "key": str(number), "values": {"n": number}, "config": config, "point": number}


def make_sweep(parent: Path, count: int, overrides: tuple[str, ...] = ("seed=0,1",), **content: Any) -> SweepDir:
    """A sweep with trials that have not started. content: of sweep.json."""
    records = [trial_record(number) for number in range(count)]
    return trials.create_sweep(parent, list(overrides), str(parent / "sweep"), content, records)


def write_results(trial: Trial, epochs: int, accuracy: float, status: str | None = None) -> None:
    """Write the files of a run of the trial after this number of epochs."""
    trial.folder.mkdir(exist_ok=True)
    (trial.folder / "run.json").write_text(
        json.dumps({"format_version": 2, "run_id": str(trial.number), "log_model": False})
    )
    lines = [
        {"epoch": epoch, "step": epoch + 1, "time": 0.0, "values": {"validation/accuracy": accuracy}}
        for epoch in range(epochs)
    ]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = status or ("finished" if epochs == trial.total_epochs() else "interrupted")
    summary = {"status": status, "validation": {"accuracy": accuracy}}
    (trial.folder / "summary.json").write_text(json.dumps(summary))


OVERRIDES = [
    "model=vgg16", "model.width=0.1", "epochs=3", "steps_per_epoch=4", "batch_size=8", "checkpoint.every_steps=2",
    "gradient_accumulation=1,2,13", "precision=float32", "evaluate.report=false", "sweep.parallel=2",
]  # fmt: skip


@dataclass
class CompletedSweep:
    """A sweep that has ended. left: trials that survived their launcher, if it was killed."""

    path: Path
    uri: str
    done: Done
    left: list[str] | None = None


def running_trials(sweep: Path) -> list[str]:
    """The overrides that name the trials with a living process."""
    selectors = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        selectors += [argument for argument in arguments if argument.startswith(f"sweep.trial='{sweep}/")]
    return selectors


def run_sweep(place: Path) -> CompletedSweep:
    path = place / "sweep"
    uri = f"sqlite:///{place / 'mlflow.db'}"
    overrides = [*OVERRIDES, f"run_dir={path}", "tracking.uri=${oc.env:INCEPTION_TEST_STORE}"]
    return CompletedSweep(path, uri, run_command("make", "sweep", *overrides, env={"INCEPTION_TEST_STORE": uri}))


def run_killed_sweep(place: Path) -> CompletedSweep:
    """Kill the launcher during training, then run the same command again."""
    path = place / "sweep"
    overrides = [*OVERRIDES, f"run_dir={path}", f"tracking.uri=sqlite:///{place / 'mlflow.db'}"]
    with (place / "output.txt").open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "train", "-m", *overrides], cwd=ROOT, stdout=output, stderr=output
        )
    assert happens_within(lambda: list(path.glob("*/checkpoints/*")), 300), (place / "output.txt").read_text()
    launcher.kill()
    launcher.wait()
    happens_within(lambda: not running_trials(path), 60)
    left = running_trials(path)
    completed = run_sweep(place)
    completed.left = left
    return completed
