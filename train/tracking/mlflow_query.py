"""Runs as they stand in an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.tracking import format_1
from train.tracking.mlflow_store import RUN_ID_TAG, connect, database_path, paginate, redact_passwords


@dataclass(frozen=True)
class RunRecord:
    """A run of ours. params: as texts, by dotted key; metrics: their last values; time: of its start, in seconds."""

    name: str
    status: str
    start_time: float
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def list_runs(uri: str, experiment: str) -> list[RunRecord]:
    """All runs of an experiment that were not deleted, the oldest first.

    Raises: ValueError if there is no such store or it is away, or it has no such experiment, naming those it has.
    """
    if (database := database_path(uri)) is not None and not database.exists():
        raise ValueError(f"uri must be a store, got {uri}, where none is; use make train, or uri=ADDRESS")
    try:
        found, known = _search_runs(uri, experiment)
    except Exception as fault:  # MLflow has many
        raise ValueError(f"the store must answer, got {redact_passwords(str(fault), uri)}; use uri=ADDRESS") from None
    if found is None:
        raise ValueError(f"experiment must be one of {known or '(there is none yet)'}, got {experiment}")
    return sorted(found, key=lambda run: run.start_time)


def _search_runs(uri: str, experiment: str) -> tuple[list[RunRecord] | None, str]:
    """The experiment's runs, None where there is no such one; and the names of all."""
    client = connect(uri)
    there = {one.name: one.experiment_id for one in paginate(client.search_experiments)}  # those that were not deleted
    runs = paginate(client.search_runs, [there[experiment]]) if experiment in there else None
    found = None if runs is None else [_to_run_record(run) for run in runs if RUN_ID_TAG in run.data.tags]
    return found, ", ".join(sorted(there.keys() - {"Default"}))


def _to_run_record(run: Any) -> RunRecord:
    data, info = run.data, run.info
    is_old = format_1.METRICS.keys() & data.metrics.keys() - {"train/loss"}
    metrics = format_1.current_metrics(data.metrics) if is_old else data.metrics
    return RunRecord(info.run_name, info.status, info.start_time / 1000, data.params, metrics, data.tags)
