"""Runs as they stand in an MLflow store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.tracking.store import RUN_ID, _pages, use_credentials


@dataclass(frozen=True)
class Recorded:
    """A run of ours. params: as texts, by dotted key; metrics: their last values; time: of its start, in seconds."""

    id: str
    name: str
    status: str
    time: float
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def runs_of(uri: str, experiment: str) -> list[Recorded]:
    """All runs of an experiment that were not deleted, the oldest first.

    Raises: ValueError if the store has no such experiment, naming those it has.
    """
    from mlflow import MlflowClient

    client = MlflowClient(use_credentials(uri))
    found = client.get_experiment_by_name(experiment)
    if found is None or found.lifecycle_stage == "deleted":
        known = ", ".join(sorted(one.name for one in _pages(client.search_experiments) if one.name != "Default"))
        raise ValueError(f"experiment must be one of {known or '(there is none yet)'}, got {experiment}")
    runs = [_recorded(run) for run in _pages(client.search_runs, [found.experiment_id]) if RUN_ID in run.data.tags]
    return sorted(runs, key=lambda run: run.time)


def _recorded(run: Any) -> Recorded:
    data, info = run.data, run.info
    return Recorded(
        data.tags[RUN_ID], info.run_name, info.status, info.start_time / 1000, data.params, data.metrics, data.tags
    )
