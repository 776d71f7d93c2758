"""The only module that writes to MLflow. Every call may be repeated without storing anything twice."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from train.config.serialization import Redactor, extract_credentials
from train.storage import locks
from train.storage.json_types import JsonObject

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.entities import PagedList

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
# The uploader retries an unreachable server itself and knows when to give up; MLflow's retries would block it for
# minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would mix with our own output


def _avoid_percent_in_the_path_of_mlflow() -> str | None:
    """Makes Python import MLflow through a link if its path contains a `%`; returns the link.

    MLflow passes the path of its migrations to Alembic unquoted, which fails on `%` as the start of a variable: no
    database could be opened from a project in a folder with such a name.
    """
    for index, entry in enumerate(sys.path):
        if "%" in entry and Path(entry, "mlflow").is_dir():
            link = Path(mkdtemp(prefix="site-packages-"), "site-packages")
            link.symlink_to(entry)
            atexit.register(shutil.rmtree, link.parent)
            sys.path[index] = str(link)
            return str(link)
    return None


SITE_PACKAGES = _avoid_percent_in_the_path_of_mlflow()

CHAMPION = "champion"  # alias of a registered model
ACCURACY_TAG = "validation_accuracy"  # tag of a model version, by which the champion is chosen
OLD_ACCURACY_TAG = "validation_main_accuracy"  # the same tag on versions registered from runs of format 1
WEIGHTS_TAG = "weights_sha256"  # tag of a logged model
ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
RETRYABLE_STATUS_CODES = (408, 409, 429)  # of 400 to 499: timeout, conflict, too many requests
# SQLite result codes that may be temporary: in use, full, missing, not writable.
SQLITE_OUTAGES = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_PERM,
)  # fmt: skip
# Limits of MLflow's log_batch.
MAX_METRICS_PER_REQUEST = 1000
MAX_PARAMS_PER_REQUEST = 100
RUN_ID_TAG = "run_id"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs, not prompts
HEARTBEAT_TAG = "heartbeat"
PARENT_TAG = "mlflow.parentRunId"  # the UI nests the run below its parent
SUMMARY_TAGS = (
    "config_hash", "data_fingerprint", "weights_sha256", "status", "attempts", "rollbacks", "changes", "pruned",
    "best_trial",
)  # fmt: skip
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "paused": "KILLED"}


class Store:
    """One run in an MLflow store."""

    def __init__(self, uri: str, identity: JsonObject):
        """Finds the run by its `run_id` tag, or creates it, with all its tags in the same request."""
        import mlflow

        self._mlflow = mlflow
        self.uri = use_credentials(uri)
        with _exclusive(self.uri):
            mlflow.set_tracking_uri(self.uri)
            self.client = connect(uri)
            self.mlflow_id = self._get_or_create_run(self._get_or_create_experiment(identity["experiment"]), identity)

    def _get_or_create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name, artifact_location(self.uri, name), EXPERIMENT_TAGS)
            except MlflowException as error:  # another run has just created it
                experiment = self.client.get_experiment_by_name(name)
                if error.error_code != ALREADY_EXISTS or experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _get_or_create_run(self, experiment_id: str, identity: JsonObject) -> str:
        runs = self.client.search_runs([experiment_id], f"tags.{RUN_ID_TAG} = '{identity['run_id']}'", max_results=1)
        if runs:
            return runs[0].info.run_id
        tags = {**identity["tags"], RUN_ID_TAG: identity["run_id"]}
        run = self.client.create_run(
            experiment_id, start_time=int(identity["time"] * 1000), tags=tags, run_name=identity["name"]
        )
        return run.info.run_id

    def set_parent(self, sweep_id: str) -> bool:
        """Makes the run a child of the sweep's run; returns whether that exists already."""
        run = self.client.get_run(self.mlflow_id)
        parents = self.client.search_runs([run.info.experiment_id], f"tags.{RUN_ID_TAG} = '{sweep_id}'", max_results=1)
        if parents and run.data.tags.get(PARENT_TAG) != parents[0].info.run_id:
            self.client.set_tag(self.mlflow_id, PARENT_TAG, parents[0].info.run_id)
        return bool(parents)

    def set_children(self, sweep_id: str) -> None:
        """Makes all runs of the sweep children of this one; some may have been created before it."""
        experiment = self.client.get_run(self.mlflow_id).info.experiment_id
        for run in paginate(self.client.search_runs, [experiment], f"tags.sweep = '{sweep_id}'"):
            if run.data.tags.get(PARENT_TAG) != self.mlflow_id:
                self.client.set_tag(run.info.run_id, PARENT_TAG, self.mlflow_id)

    def log_params(self, params: dict[str, object]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:6000]) for name, value in sorted(params.items())]
        for start in range(0, len(entries), MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.mlflow_id, params=entries[start : start + MAX_PARAMS_PER_REQUEST])

    def log_journal_lines(self, lines: list[JsonObject]) -> None:
        """Logs journal lines with their own steps and times; MLflow stores a repeated line once."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(line["time"] * 1000), line["step"])
            for line in lines
            for name, value in line["values"].items()
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_REQUEST):
            self.client.log_batch(self.mlflow_id, metrics=metrics[start : start + MAX_METRICS_PER_REQUEST])

    def log_changed_metrics(self, values: dict[str, float], *, time: float, step: int) -> None:
        """Logs the metrics whose value in MLflow differs."""
        current = self.client.get_run(self.mlflow_id).data.metrics
        changed = {name: value for name, value in values.items() if current.get(name) != value}
        self.log_journal_lines([{"values": changed, "time": time, "step": step}])

    def log_dataset(self, dataset: JsonObject) -> None:
        """Logs the data set with our own digest; MLflow would read all of it to compute one."""
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

    def log_model(self, path: Path, weights_sha256: str, requirements: list[str]) -> str:
        """Uploads the inference model with its signature, once; returns its id in the store.

        An interrupted upload is completed in place, so that no second copy is stored. weights_sha256: identifies the
        model among those of the run. requirements: passed because MLflow takes long to infer them.
        """
        model = self._get_or_create_logged_model(weights_sha256)
        if model.status != "READY":
            with TemporaryDirectory(prefix="mlflow-model-") as saved:
                self._save_model(path, Path(saved, "model"), model, requirements)
                self.client.log_model_artifacts(model.model_id, f"{saved}/model")
            self.client.finalize_logged_model(model.model_id, "READY")
        outputs = self.client.get_run(self.mlflow_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(self.mlflow_id, [LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def _get_or_create_logged_model(self, weights_sha256: str) -> LoggedModel:
        """The store's entry for these weights of the run, created if missing."""
        run = self.client.get_run(self.mlflow_id)
        experiments = [run.info.experiment_id]
        query = f"source_run_id = '{self.mlflow_id}' AND tags.{WEIGHTS_TAG} = '{weights_sha256}'"
        matches = list(self.client.search_logged_models(experiments, query, max_results=1))
        if matches:
            return matches[0]
        return self.client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=self.mlflow_id, tags={WEIGHTS_TAG: weights_sha256},
            params=run.data.params,
        )  # fmt: skip

    def _save_model(self, path: Path, target: Path, logged_model: LoggedModel, requirements: list[str]) -> None:
        import keras
        import numpy as np
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        model = keras.models.load_model(path)
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *model.input_shape[1:]), model.input.name)]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, *model.output_shape[1:]), "logits")]),
        )
        self._mlflow.keras.save_model(
            model, str(target), signature=signature, pip_requirements=requirements,
            mlflow_model=Model(logged_model.artifact_location, self.mlflow_id, model_id=logged_model.model_id),
        )  # fmt: skip

    def register_model(self, model_id: str, model_info: JsonObject) -> None:
        """Registers a version of the experiment's model, once; CHAMPION is the most accurate one on this run's data.

        model_info: the content of best/model.json.
        """
        run = self.client.get_run(self.mlflow_id)
        experiment = self.client.get_experiment(run.info.experiment_id).name
        name = f"{experiment}-{run.data.tags['data']}".replace(":", "-")  # not allowed in names
        name = name.replace('"', "'")  # MLflow's filter grammar has no escapes
        with _exclusive(self.uri):
            self._create_registered_model(name, f"inference models of {experiment}")
            source = f"models:/{model_id}"
            if source not in {version.source for version in self._versions(name)}:
                tags = {ACCURACY_TAG: str(model_info["validation"]["accuracy"]), "data": model_info["data_fingerprint"]}
                self.client.create_model_version(name, source, self.mlflow_id, tags=tags, model_id=model_id)
            # Two runs that end at once on a server may each read before the other writes, so repeat until it is stable.
            while (best := self._best_version(name, model_info["data_fingerprint"])) != self._champion_version(name):
                self.client.set_registered_model_alias(name, CHAMPION, best)

    def _create_registered_model(self, name: str, description: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, description=description)
        except MlflowException as error:
            if error.error_code != ALREADY_EXISTS:
                raise

    def _versions(self, name: str) -> list[ModelVersion]:
        return list(paginate(self.client.search_model_versions, f'name = "{name}"'))

    def _best_version(self, name: str, data_fingerprint: str) -> str:
        """The version with the highest validation accuracy on that data; the oldest of equal ones."""
        versions = [version for version in self._versions(name) if version.tags.get("data") == data_fingerprint]

        def rank(version: ModelVersion) -> tuple[float, int]:
            accuracy = version.tags.get(ACCURACY_TAG) or version.tags[OLD_ACCURACY_TAG]
            return -float(accuracy), int(version.version)

        return min(versions, key=rank).version

    def _champion_version(self, name: str) -> str | None:
        return self.client.get_registered_model(name).aliases.get(CHAMPION)

    def send_heartbeat(self) -> None:
        """Marks the run as running now, and clears the failure of an earlier attempt."""
        self.client.set_tag(self.mlflow_id, HEARTBEAT_TAG, f"{time.time():.0f}")
        if self.client.get_run(self.mlflow_id).info.status != "RUNNING":
            self.client.update_run(self.mlflow_id, status="RUNNING")
        self._delete_tags("failure", "status")

    def _delete_tags(self, *names: str) -> None:
        for name in set(names) & set(self.client.get_run(self.mlflow_id).data.tags):
            self.client.delete_tag(self.mlflow_id, name)

    def finish(self, summary: JsonObject) -> None:
        """Sets tags from the summary, and the run's final status and end time."""
        if not summary.get("failure"):
            self._delete_tags("failure")
        for name in (*SUMMARY_TAGS, "failure"):
            if summary.get(name):
                self.client.set_tag(self.mlflow_id, name, str(summary[name])[:5000])
        self.client.set_terminated(self.mlflow_id, MLFLOW_STATUS[summary["status"]], int(summary["time"] * 1000))


def is_permanent_error(error: Exception) -> bool:
    """Whether a retry would fail in the same way, as for a rejected request and unlike during an outage.

    Errors of a server are classified by HTTP status, SQLite's by result code, programming errors by type. Anything else
    counts as an outage: retries end after a while, and store nothing twice.
    """
    import requests
    from mlflow.exceptions import InvalidUrlException, MlflowException

    for cause in _error_chain(error):
        if isinstance(cause, requests.HTTPError) and cause.response is not None:
            return _is_permanent_status(cause.response.status_code)
        if isinstance(cause, sqlite3.Error) and hasattr(cause, "sqlite_errorcode"):
            return cause.sqlite_errorcode & 0xFF not in SQLITE_OUTAGES
    if isinstance(error, MlflowException):
        return isinstance(error, InvalidUrlException) or _is_permanent_status(error.get_http_status_code())
    return isinstance(error, ValueError | TypeError | LookupError | AttributeError | ImportError) and not isinstance(
        error, OSError
    )


def is_connection_lost(error: Exception) -> bool:
    """Whether there was no connection to the server, or it was cut."""
    import requests

    return any(isinstance(cause, requests.ConnectionError) for cause in _error_chain(error))


def _is_permanent_status(status: int) -> bool:
    return 400 <= status < 500 and status not in RETRYABLE_STATUS_CODES


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, its causes, and the database driver's errors that SQLAlchemy wraps."""
    while error is not None:
        yield error
        if isinstance(driver := getattr(error, "orig", None), BaseException):
            yield driver
        error = error.__cause__ or error.__context__


def mark_stale(client: MlflowClient, mlflow_id: str) -> None:
    """Marks a run as failed whose process is gone and left no summary."""
    client.set_tag(mlflow_id, "status", "failed")
    client.set_tag(mlflow_id, "failure", "the training process is gone")
    client.set_terminated(mlflow_id, "FAILED")


def list_running(uri: str) -> Iterator[tuple[MlflowClient, Run]]:
    """Yields a client with every run of this project that the store shows as running."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in paginate(client.search_experiments)]
    query = "attributes.status = 'RUNNING'"
    for run in paginate(client.search_runs, experiments, query) if experiments else ():
        if RUN_ID_TAG in run.data.tags:
            yield client, run


Entity = TypeVar("Entity")


def paginate(search: Callable[..., PagedList[Entity]], *arguments: object) -> Iterator[Entity]:
    """Yields all results of a search that returns one page at a time."""
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def connect(uri: str) -> MlflowClient:
    """An MLflow client; credentials in the address are moved to the environment."""
    from mlflow import MlflowClient

    if (path := database_path(uri)) is None:
        return MlflowClient(use_credentials(uri))
    with _without_stray_folder(uri, path):
        _make_default_experiment(uri, path)
        client = MlflowClient(uri)
        if quote_sqlite_path(str(path)) != str(path):
            client.search_registered_models(max_results=1)  # the registry opens the address on first use only
        return client


def _make_default_experiment(uri: str, path: Path) -> None:
    """Creates MLflow's default experiment; MLflow itself would put the unquoted working directory into SQL."""
    if not path.exists() or "'" in str(Path.cwd()):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())


@contextmanager
def _without_stray_folder(uri: str, path: Path) -> Iterator[None]:
    """Removes the empty folder that MLflow creates from the still quoted address."""
    stray = Path(uri.removeprefix("sqlite:///")).parent
    is_stray = stray.absolute() != path.parent and not stray.exists()
    yield
    while is_stray and stray.is_dir() and not any(stray.iterdir()):
        stray.rmdir()
        stray = stray.parent


def default_uri(root: Path) -> str:
    """`mlflow.db` beside the Makefile, as an absolute address: a relative one would follow the working directory."""
    return sqlite_uri(root / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    return f"sqlite:///{quote_sqlite_path(str(path.absolute()))}"


def quote_sqlite_path(path: str) -> str:
    """Quotes a path for the address of a SQLite file, where `%` and `?` are special."""
    return path.replace("%", "%25").replace("?", "%3F")


def redact_passwords(text: str, uri: str) -> str:
    """A message of MLflow's without the credentials of `uri`."""
    return Redactor(secrets=dict.fromkeys(extract_credentials(uri), "***")).redact(text)


def artifact_location(uri: str, experiment: str) -> str | None:
    """A folder beside a SQLite database; None for a server, which has its own location."""
    path = database_path(uri)
    return (path.parent / "mlartifacts" / experiment).as_uri() if path else None


def database_path(uri: str) -> Path | None:
    """The file of a SQLite address; None for any other address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def use_credentials(uri: str) -> str:
    """Moves user and password of a web address into the environment, so that no message of MLflow can show them."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.username:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def _exclusive(uri: str) -> Iterator[None]:
    """Serialises processes that create the database, an experiment or a model version, which would race."""
    path = database_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.acquire(path.with_name(path.name + ".lock")):
        yield
