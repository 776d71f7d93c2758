"""`make sync run=<run folder>`: completes the MLflow record of a run from its journal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.tracking import address, mlflow_store, uploader
from train.tracking.run_dir import open_run_dir


@dataclass
class Sync:
    """`run`: the folder; `uri`: the store, where it is not the one the run was started with or needs a password."""

    run: str = "runs/latest"
    uri: str = ""


def sync(argv: list[str]) -> int:
    """Raises: ValueError if the run is alive, its store unknown or away."""
    keys = arguments.parse(Sync, argv)
    folder = open_run_dir(Path(keys.run))
    if folder.is_running():
        raise ValueError(f"run must have ended, got {keys.run}, which is alive and is recorded as it goes")
    uri = keys.uri or address.stored_uri(folder)
    try:
        with folder.upload_lock(wait=False):
            uploader.Uploader(folder, uri).finish()
    except ValueError:
        raise
    except Exception as fault:  # MLflow has many
        raise ValueError(
            f"the store must answer, got {mlflow_store.redact_passwords(str(fault), uri)}; use uri=ADDRESS"
        ) from None
    print(f"the MLflow record of {keys.run} is complete")
    return 0


if __name__ == "__main__":
    arguments.main(sync)
