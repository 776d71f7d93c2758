"""MLflow: the only module that talks to it. Everything here may be called again without adding anything twice."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from train.stored import Private, passwords

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
# A server that is away is asked again by the uploader, which knows when to give up; MLflow's own retries would hold
# it for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

CHAMPION = "champion"  # alias of a registered model
BATCH = 1000  # most metrics that one request may hold
PARAMS = 100  # most parameters that one request may hold
RUN_ID = "run_id"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs and charts, not prompts
HEARTBEAT = "heartbeat"
PARENT = "mlflow.parentRunId"  # the UI shows a run with it below the other
SUMMARY_TAGS = (
    "config_hash", "data_fingerprint", "weights_sha256", "status", "lives", "rollbacks", "changes", "pruned",
    "best_trial",
)  # fmt: skip
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class Store:
    """One run in an MLflow store."""

    def __init__(self, uri: str, identity: dict[str, Any]):
        """Finds the run by its `run_id` tag, or makes it, with all tags in the one call that creates it."""
        import mlflow
        from mlflow import MlflowClient

        self._mlflow, self.uri = mlflow, use_credentials(uri)
        with _alone(self.uri):
            mlflow.set_tracking_uri(self.uri)
            self.client = MlflowClient(self.uri)
            self.mlflow_id = self._run(self._experiment(identity["experiment"]), identity)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            return self.client.create_experiment(name, artifact_location(self.uri, name), KIND)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _run(self, experiment_id: str, identity: dict[str, Any]) -> str:
        found = self.client.search_runs([experiment_id], f"tags.{RUN_ID} = '{identity['run_id']}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {**identity["tags"], RUN_ID: identity["run_id"]}
        run = self.client.create_run(
            experiment_id, start_time=int(identity["time"] * 1000), tags=tags, run_name=identity["name"]
        )
        return run.info.run_id

    def link(self, sweep: str) -> bool:
        """Makes the run a child of the sweep's; whether that is there already."""
        run = self.client.get_run(self.mlflow_id)
        found = self.client.search_runs([run.info.experiment_id], f"tags.{RUN_ID} = '{sweep}'", max_results=1)
        if found and run.data.tags.get(PARENT) != found[0].info.run_id:
            self.client.set_tag(self.mlflow_id, PARENT, found[0].info.run_id)
        return bool(found)

    def adopt(self, sweep: str) -> None:
        """Makes all runs of the sweep children of this one; some may have come before it."""
        experiment = self.client.get_run(self.mlflow_id).info.experiment_id
        for run in pages(self.client.search_runs, [experiment], f"tags.sweep = '{sweep}'"):
            if run.data.tags.get(PARENT) != self.mlflow_id:
                self.client.set_tag(run.info.run_id, PARENT, self.mlflow_id)

    def log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:6000]) for name, value in sorted(params.items())]
        for start in range(0, len(entries), PARAMS):
            self.client.log_batch(self.mlflow_id, params=entries[start : start + PARAMS])

    def log_lines(self, lines: list[dict[str, Any]]) -> None:
        """Journal lines with their own steps and times; the same line twice is stored once."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(line["time"] * 1000), line["step"])
            for line in lines
            for name, value in line["values"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.mlflow_id, metrics=metrics[start : start + BATCH])

    def log_once(self, values: dict[str, float], *, time: float, step: int) -> None:
        """Metrics, without those that have this value already."""
        known = self.client.get_run(self.mlflow_id).data.metrics
        fresh = {name: value for name, value in values.items() if known.get(name) != value}
        self.log_lines([{"values": fresh, "time": time, "step": step}])

    def log_dataset(self, dataset: dict[str, Any]) -> None:
        """The data set with our own digest; MLflow's would walk the whole of it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=dataset["name"],
            digest=dataset["fingerprint"][:32],
            source_type="local",
            source=json.dumps({"uri": dataset["source"]}),
            profile=json.dumps({"fingerprint": dataset["fingerprint"], **dataset["counts"]}),
        )
        self.client.log_inputs(self.mlflow_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.mlflow_id, str(path), folder)

    def log_model(self, path: Path, requirements: list[str]) -> None:
        """The inference model with its signature, once; `requirements` are explicit because finding them takes long."""
        which = hashlib.sha256(path.with_name("model.json").read_bytes()).hexdigest()
        if self.client.get_run(self.mlflow_id).data.tags.get("model_logged") == which:
            return
        import keras
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        model = keras.models.load_model(path)
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *model.input_shape[1:]), model.input.name)]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, *model.output_shape[1:]), "logits")]),
        )
        with self._mlflow.start_run(run_id=self.mlflow_id, log_system_metrics=False):
            logged = self._mlflow.keras.log_model(
                model, name="model", signature=signature, pip_requirements=requirements
            )
        # log_model's context has marked the run finished; the caller says how it really ended.
        self.client.update_run(self.mlflow_id, status="RUNNING")
        self._register(logged.model_uri, json.loads(path.with_name("model.json").read_text()))
        self.client.set_tag(self.mlflow_id, "model_logged", which)

    def _register(self, source: str, card: dict[str, Any]) -> None:
        """A version of the experiment's model; CHAMPION is the one with the highest validation accuracy on its data."""
        from mlflow.exceptions import MlflowException

        run = self.client.get_run(self.mlflow_id)
        experiment = self.client.get_experiment(run.info.experiment_id).name
        name = f"{experiment}-{run.data.tags['data']}".replace(":", "-")  # which names of models may not have
        own = {"validation_main_accuracy": str(card["validation_main_accuracy"]), "data": card["data_fingerprint"]}
        with _alone(self.uri):  # two that end at once must not both find that they are better
            with suppress(MlflowException):  # it is there
                self.client.create_registered_model(name, description=f"inference models of {experiment}")
            version = self.client.create_model_version(name, source, self.mlflow_id, tags=own).version
            try:
                champion = self.client.get_model_version_by_alias(name, CHAMPION).tags
            except MlflowException:  # none yet
                champion = {}
            better = float(own["validation_main_accuracy"]) > float(champion.get("validation_main_accuracy", -1))
            if better or champion.get("data") != own["data"]:
                self.client.set_registered_model_alias(name, CHAMPION, version)

    def beat(self) -> None:
        """The run's process is alive, whatever was said of its last life."""
        self.client.set_tag(self.mlflow_id, HEARTBEAT, f"{time.time():.0f}")
        if self.client.get_run(self.mlflow_id).info.status != "RUNNING":
            self.client.update_run(self.mlflow_id, status="RUNNING")
        self._forget("failure", "status")

    def _forget(self, *names: str) -> None:
        for name in set(names) & set(self.client.get_run(self.mlflow_id).data.tags):
            self.client.delete_tag(self.mlflow_id, name)

    def finish(self, summary: dict[str, Any]) -> None:
        """Tags from the summary, and the run's end."""
        if not summary.get("failure"):
            self._forget("failure")
        for name in (*SUMMARY_TAGS, "failure"):
            if summary.get(name):
                self.client.set_tag(self.mlflow_id, name, str(summary[name])[:5000])
        self.client.set_terminated(self.mlflow_id, STATUS[summary["status"]], int(summary["time"] * 1000))


def mark_gone(client: Any, mlflow_id: str) -> None:
    """The run's process died without a word."""
    client.set_tag(mlflow_id, "status", "failed")
    client.set_tag(mlflow_id, "failure", "the training process is gone")
    client.set_terminated(mlflow_id, "FAILED")


def running(uri: str) -> Iterator[tuple[Any, Any]]:
    """A client, and every run of ours that the store takes for running."""
    from mlflow import MlflowClient

    client = MlflowClient(use_credentials(uri))
    experiments = [found.experiment_id for found in pages(client.search_experiments)]
    wanted = "attributes.status = 'RUNNING'"
    for run in pages(client.search_runs, experiments, wanted) if experiments else ():
        if RUN_ID in run.data.tags:
            yield client, run


def pages(search: Callable, *words: Any) -> Iterator[Any]:
    """All that a search finds; it gives a page at a time."""
    token = None
    while True:
        page = search(*words, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def default_uri(root: Path) -> str:
    """`mlflow.db` beside the Makefile, as an absolute address: a relative one would follow the working directory."""
    return f"sqlite:///{(root / 'mlflow.db').absolute()}"


def without_passwords(text: str, uri: str) -> str:
    """A message of MLflow's about the store at `uri`, as it may be shown."""
    return Private(secrets=dict.fromkeys(passwords(uri), "***")).hide(text)


def artifact_location(uri: str, experiment: str) -> str | None:
    """For SQLite, a folder beside the database; a server has its own place."""
    path = database_path(uri)
    return (path.parent / "mlartifacts" / experiment).as_uri() if path else None


def database_path(uri: str) -> Path | None:
    """The file of a SQLite address."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def use_credentials(uri: str) -> str:
    """Moves user and password of a web address into the environment, so that no message of MLflow can show them."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.username:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time makes the database and the experiment: their first creation races."""
    path = database_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
