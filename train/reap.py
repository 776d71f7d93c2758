"""`make reap`: marks runs as failed that MLflow shows as running although their process is gone.

    make reap minutes=30

A run of this machine is stale if its process is gone, one of another machine if it sends no heartbeat.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.cli.fields import setting
from train.config.schema import ROOT
from train.tracking import mlflow_store
from train.tracking.run_dir import open_run_dir


@dataclass
class Reap:
    """The keys of `make reap`."""

    uri: str = setting("", "MLflow store; none: mlflow.db beside the Makefile")
    minutes: int = setting(
        10, "time without a heartbeat after which a run on another machine is stale", unit="minutes", ge=0
    )


def reap(argv: list[str]) -> int:
    """Marks stale runs as failed. Raises: ValueError if the store does not exist or fails."""
    keys = arguments.parse(Reap, argv)
    uri = keys.uri or mlflow_store.default_uri(ROOT)
    if (database := mlflow_store.database_path(uri)) is not None and not database.exists():
        raise ValueError(f"no MLflow store at {uri}; use uri=ADDRESS")
    marked = 0
    try:
        for client, run in list(mlflow_store.list_running(uri)):
            reason = stale_reason(run.data.tags, run.info.start_time / 1000, 60 * keys.minutes)
            if reason:
                mlflow_store.mark_stale(client, run.info.run_id)
                print(f"marked {run.info.run_name} ({run.data.tags.get('run_dir', run.info.run_id)}): {reason}")
                marked += 1
    except Exception as error:  # MLflow raises many types
        raise ValueError(f"the MLflow store failed: {mlflow_store.redact_passwords(str(error), uri)}") from None
    print(f"{marked} run{'' if marked == 1 else 's'} marked as failed")
    return 0


def stale_reason(tags: dict[str, str], started_at: float, silence_seconds: float) -> str | None:
    """Why a run that MLflow shows as running is not; None if it may be running.

    On this machine only a live process holds the run's lock; a run with a summary ended in order, and `make sync`
    completes it. For other machines there is only the heartbeat, which the run's uploader writes to MLflow.
    """
    if tags.get("host") == socket.gethostname():
        try:
            run_dir = open_run_dir(Path(tags["run_dir"]))
        except ValueError:
            pass
        else:
            if run_dir.run_id == tags[mlflow_store.RUN_ID_TAG]:
                return None if run_dir.is_running() or run_dir.status() is not None else "its process is gone"
    age = time.time() - float(tags.get(mlflow_store.HEARTBEAT_TAG, started_at))
    return f"no heartbeat for {age / 60:.0f} minutes" if age > silence_seconds else None


if __name__ == "__main__":
    arguments.main(reap, Reap)
