"""Exporting a copy of a run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from support.commands import Done, run_command


def ship(folder: Path, run: Path, *overrides: str) -> tuple[Done, Path]:
    """`make export` in a copy of the run, which has a store of its own."""
    copy = folder / "run"
    if not copy.exists():
        shutil.copytree(run, copy, symlinks=True)
    uri = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    return run_command(sys.executable, "-m", "train.export", f"run={copy}", uri, *overrides), copy
