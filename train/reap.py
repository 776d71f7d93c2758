"""`make reap`: marks the runs in MLflow whose process is gone, so that nobody takes them for running."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.config.schema import ROOT
from train.tracking import mlflow_store
from train.tracking.run_dir import open_run_dir


@dataclass
class Reap:
    """`uri`: the store, by default mlflow.db beside the Makefile; `minutes`: silence that is taken for death."""

    uri: str = ""
    minutes: int = 10


def reap(argv: list[str]) -> int:
    """Raises: ValueError if the store is away."""
    keys = arguments.parse(Reap, argv)
    uri = keys.uri or mlflow_store.default_uri(ROOT)
    if (database := mlflow_store.database_path(uri)) is not None and not database.exists():
        raise ValueError(f"uri must be a store, got {uri}, where none is; use uri=ADDRESS")
    marked = 0
    try:
        for client, run in list(mlflow_store.list_running(uri)):
            why = stale_reason(run.data.tags, run.info.start_time / 1000, 60 * keys.minutes)
            if why:
                mlflow_store.mark_stale(client, run.info.run_id)
                print(f"marked {run.info.run_name} ({run.data.tags['run_dir']}): {why}")
                marked += 1
    except Exception as fault:  # MLflow has many
        raise ValueError(f"the store must answer, got {mlflow_store.redact_passwords(str(fault), uri)}") from None
    print(f"{marked} runs marked as gone")
    return 0


def stale_reason(tags: dict[str, str], started_at: float, silence_seconds: float) -> str | None:
    """Why a run that is said to be running is not; None if it may be.

    A folder on this machine has a lock that only a living process holds; one with a summary has ended in order, and
    `make sync` completes its record. Elsewhere there is only the heartbeat, which the run's uploader leaves in MLflow.
    """
    if tags.get("host") == socket.gethostname():
        try:
            folder = open_run_dir(Path(tags["run_dir"]))
        except ValueError:
            pass
        else:
            if folder.run_id == tags[mlflow_store.RUN_ID_TAG]:
                return None if folder.is_running() or folder.status() is not None else "its process is gone"
    silent = time.time() - float(tags.get(mlflow_store.HEARTBEAT_TAG, started_at))
    return f"no sign of life for {silent / 60:.0f} minutes" if silent > silence_seconds else None


if __name__ == "__main__":
    arguments.main(reap)
