"""`make sync run=<run folder>`: completes a run in MLflow from its journal.

    make sync run=runs/latest

A run uploads itself; this is for one whose MLflow store was not reachable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.cli.fields import setting
from train.tracking import address, mlflow_store, uploader
from train.tracking.run_dir import open_run_dir


@dataclass
class Sync:
    """The keys of `make sync`."""

    run: str = setting("runs/latest", "folder of the run")
    uri: str = setting("", "MLflow store, if the run's stored address is another one or lacks its password")


def sync(argv: list[str]) -> int:
    """Uploads what MLflow lacks. Raises: ValueError if the run is still running, or its store is unknown or fails."""
    keys = arguments.parse(Sync, argv)
    run_dir = open_run_dir(Path(keys.run))
    if run_dir.is_running():
        raise ValueError(f"run {keys.run} is still running and uploads by itself; wait for it or stop it first")
    uri = keys.uri or address.stored_uri(run_dir)
    try:
        with run_dir.upload_lock(wait=False):
            uploader.Uploader(run_dir, uri).finish()
    except ValueError:
        raise
    except Exception as error:  # MLflow raises many types
        message = mlflow_store.redact_passwords(str(error), uri)
        raise ValueError(f"the MLflow store failed: {message}; use uri=ADDRESS") from None
    print(f"the upload of {keys.run} to MLflow is complete")
    return 0


if __name__ == "__main__":
    arguments.main(sync, Sync)
