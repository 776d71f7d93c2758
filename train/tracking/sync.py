"""`make sync run=<run folder>`: completes the MLflow record of a run from its journal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from train import command
from train.config import ROOT
from train.tracking import store, uploader
from train.tracking.folder import open_folder


@dataclass
class Sync:
    """`run`: the folder; `uri`: the store, where it is not the one the run was started with or needs a password."""

    run: str = "runs/latest"
    uri: str = ""


def sync(keys: Sync) -> int:
    folder = open_folder(Path(keys.run))
    if folder.alive():
        raise ValueError(f"run must have ended, got {keys.run}, which is alive and is recorded as it goes")
    stored = yaml.safe_load((folder.path / "config.yaml").read_text())["tracking"]["uri"]
    uri = keys.uri or os.path.expandvars((stored or "").replace("${oc.env:", "${")) or store.default_uri(ROOT)
    record = uploader.Record(folder, uri)
    record.advance()
    record.complete()
    print(f"the MLflow record of {keys.run} is complete")
    return 0


if __name__ == "__main__":
    command.run(Sync, sync)
