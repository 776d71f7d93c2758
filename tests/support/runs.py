"""Tiny runs within this process, and their resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from support.commands import ROOT, THREADS
from train.config import composition
from train.config.schema import Config
from train.config.serialization import Redactor
from train.distributed.process_group import ProcessGroup
from train.run.recorder import RunRecorder
from train.run.train_and_evaluate import RunSession, train_and_evaluate
from train.tracking.journal import comparable
from train.tracking.run_dir import RunDir, create_run_dir, open_run_dir
from train.training.signals import SignalHandler

# The network that is built fastest.
TINY = [
    "model=vgg16",
    "model.head=fc",
    "model.width=0.1",
    "batch_size=16",
    "steps_per_epoch=6",
    "epochs=2",
    "tracking.every_steps=2",
    "evaluate.report=false",
]
EVERY_4_STEPS = "checkpoint.every_steps=4"


class Killed(BaseException):
    """Simulates SIGKILL within the test process: no handler catches it, nothing more is saved."""


def start_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train a new run; return its summary."""
    config = composition.compose([f"run_dir='{folder}'", f"threads={THREADS}", *TINY, *overrides])
    return train_session(create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False), config, Redactor())


def resume_run(folder: Path, *overrides: str, accepted: str = "") -> dict[str, Any]:
    """Resume a run with its stored config and these overrides; return its summary."""
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    node = composition.from_stored(stored, list(overrides))
    return train_session(
        open_run_dir(folder),
        composition.to_config(node),
        composition.make_redactor(node),
        frozenset(filter(None, accepted.split(","))),
    )


def train_session(
    run_dir: RunDir, config: Config, redactor: Redactor, accepted: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Train or resume a run within this process, without the lifecycle around it; return its summary."""
    recorder = RunRecorder(run_dir, config, redactor, accepted)
    train_and_evaluate(RunSession(config, redactor, SignalHandler(), ProcessGroup(0, 1), recorder))
    return recorder.summary


def read_journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_journals(first: Path, second: Path) -> bool:
    """Whether two runs have written the same lines, up to their times."""
    return list(map(comparable, read_journal(first))) == list(map(comparable, read_journal(second)))
