"""Runs as they stand in an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.tracking.mlflow_store import RUN_ID, connect, database_path, pages, without_passwords


@dataclass(frozen=True)
class Recorded:
    """A run of ours. params: as texts, by dotted key; metrics: their last values; time: of its start, in seconds."""

    name: str
    status: str
    time: float
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def runs_of(uri: str, experiment: str) -> list[Recorded]:
    """All runs of an experiment that were not deleted, the oldest first.

    Raises: ValueError if there is no such store or it is away, or it has no such experiment, naming those it has.
    """
    if (database := database_path(uri)) is not None and not database.exists():
        raise ValueError(f"uri must be a store, got {uri}, where none is; use make train, or uri=ADDRESS")
    try:
        found, known = _found(uri, experiment)
    except Exception as fault:  # MLflow has many
        raise ValueError(f"the store must answer, got {without_passwords(str(fault), uri)}; use uri=ADDRESS") from None
    if found is None:
        raise ValueError(f"experiment must be one of {known or '(there is none yet)'}, got {experiment}")
    return sorted(found, key=lambda run: run.time)


def _found(uri: str, experiment: str) -> tuple[list[Recorded] | None, str]:
    """The experiment's runs, None where there is no such one; and the names of all."""
    client = connect(uri)
    there = {one.name: one.experiment_id for one in pages(client.search_experiments)}  # those that were not deleted
    runs = pages(client.search_runs, [there[experiment]]) if experiment in there else None
    found = None if runs is None else [_recorded(run) for run in runs if RUN_ID in run.data.tags]
    return found, ", ".join(sorted(there.keys() - {"Default"}))


def _recorded(run: Any) -> Recorded:
    data, info = run.data, run.info
    return Recorded(info.run_name, info.status, info.start_time / 1000, data.params, data.metrics, data.tags)
