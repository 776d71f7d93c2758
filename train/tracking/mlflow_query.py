"""Reads this project's runs from an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.tracking import format_1
from train.tracking.mlflow_store import RUN_ID_TAG, connect, database_path, paginate, redact_passwords

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class RunRecord:
    """A run of this project. params: texts by dotted key; metrics: last values; start_time: Unix time in seconds."""

    name: str
    status: str
    start_time: float
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def list_runs(uri: str, experiment: str) -> list[RunRecord]:
    """All runs of an experiment that were not deleted, oldest first.

    Raises: ValueError if the store does not exist or fails, or for an unknown experiment, naming the existing ones.
    """
    if (database := database_path(uri)) is not None and not database.exists():
        raise ValueError(f"no MLflow store at {uri}; use make train, or uri=ADDRESS")
    try:
        runs, experiments = _search_runs(uri, experiment)
    except Exception as error:  # MLflow raises many types
        raise ValueError(f"the MLflow store failed: {redact_passwords(str(error), uri)}; use uri=ADDRESS") from None
    if runs is None:
        raise ValueError(f"unknown experiment {experiment}; experiments in the store: {experiments or '(none yet)'}")
    return sorted(runs, key=lambda run: run.start_time)


def _search_runs(uri: str, experiment: str) -> tuple[list[RunRecord] | None, str]:
    """The experiment's runs, None if it does not exist; and the names of all experiments, comma-separated."""
    client = connect(uri)
    ids = {entry.name: entry.experiment_id for entry in paginate(client.search_experiments)}  # without deleted ones
    experiments = ", ".join(sorted(ids.keys() - {"Default"}))
    if experiment not in ids:
        return None, experiments
    runs = paginate(client.search_runs, [ids[experiment]])
    return [_to_run_record(run) for run in runs if RUN_ID_TAG in run.data.tags], experiments


def _to_run_record(run: Run) -> RunRecord:
    data, info = run.data, run.info
    is_old = format_1.METRICS.keys() & data.metrics.keys() - {"train/loss"}
    metrics = format_1.current_metrics(data.metrics) if is_old else data.metrics
    return RunRecord(info.run_name, info.status, info.start_time / 1000, data.params, metrics, data.tags)
