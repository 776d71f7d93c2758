"""MLflow: the only module that talks to it. Everything here may be called again without adding anything twice."""

from __future__ import annotations

import atexit
import fcntl
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
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from train.config.serialization import Redactor, extract_credentials

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
# A server that is away is asked again by the uploader, which knows when to give up; MLflow's own retries would hold
# it for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # between the lines of our commands


def _avoid_percent_in_the_path_of_mlflow() -> str | None:
    """Makes Python find MLflow by another path where the one of the environment has a `%` in it; that path.

    MLflow hands the path of its migrations to Alembic unquoted, which takes `%` for the start of a variable and fails:
    no database could be opened from a project in a folder with such a name.
    """
    for number, entry in enumerate(sys.path):
        if "%" in entry and Path(entry, "mlflow").is_dir():
            link = Path(mkdtemp(prefix="site-packages-"), "site-packages")
            link.symlink_to(entry)
            atexit.register(shutil.rmtree, link.parent)
            sys.path[number] = str(link)
            return str(link)
    return None


SITE_PACKAGES = _avoid_percent_in_the_path_of_mlflow()

CHAMPION = "champion"  # alias of a registered model
ACCURACY_TAG = "validation_accuracy"  # tag of a model version: what the champion is chosen by
OLD_ACCURACY_TAG = "validation_main_accuracy"  # its name in versions that were registered for runs of format 1
WEIGHTS_TAG = "weights_sha256"  # tag of a logged model
ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
RETRYABLE_STATUS_CODES = (408, 409, 429)  # of the statuses from 400 to 499: too slow, in conflict, too many
# What keeps SQLite from answering now and may be mended meanwhile: in use, full, gone, not writable.
SQLITE_OUTAGES = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_PERM,
)  # fmt: skip
MAX_METRICS_PER_REQUEST = 1000  # most metrics that one request may hold
MAX_PARAMS_PER_REQUEST = 100  # most parameters that one request may hold
RUN_ID_TAG = "run_id"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI shows runs and charts, not prompts
HEARTBEAT_TAG = "heartbeat"
PARENT_TAG = "mlflow.parentRunId"  # the UI shows a run with it below the other
SUMMARY_TAGS = (
    "config_hash", "data_fingerprint", "weights_sha256", "status", "attempts", "rollbacks", "changes", "pruned",
    "best_trial",
)  # fmt: skip
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class Store:
    """One run in an MLflow store."""

    def __init__(self, uri: str, identity: dict[str, Any]):
        """Finds the run by its `run_id` tag, or makes it, with all tags in the one call that creates it."""
        import mlflow

        self._mlflow, self.uri = mlflow, use_credentials(uri)
        with _exclusive(self.uri):
            mlflow.set_tracking_uri(self.uri)
            self.client = connect(uri)
            self.mlflow_id = self._get_or_create_run(self._get_or_create_experiment(identity["experiment"]), identity)

    def _get_or_create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location(self.uri, name), EXPERIMENT_TAGS)
            except MlflowException as error:  # another run on the same server was faster
                found = self.client.get_experiment_by_name(name)
                if error.error_code != ALREADY_EXISTS or found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _get_or_create_run(self, experiment_id: str, identity: dict[str, Any]) -> str:
        found = self.client.search_runs([experiment_id], f"tags.{RUN_ID_TAG} = '{identity['run_id']}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {**identity["tags"], RUN_ID_TAG: identity["run_id"]}
        run = self.client.create_run(
            experiment_id, start_time=int(identity["time"] * 1000), tags=tags, run_name=identity["name"]
        )
        return run.info.run_id

    def set_parent(self, sweep_id: str) -> bool:
        """Makes the run a child of the sweep's; whether that is there already."""
        run = self.client.get_run(self.mlflow_id)
        found = self.client.search_runs([run.info.experiment_id], f"tags.{RUN_ID_TAG} = '{sweep_id}'", max_results=1)
        if found and run.data.tags.get(PARENT_TAG) != found[0].info.run_id:
            self.client.set_tag(self.mlflow_id, PARENT_TAG, found[0].info.run_id)
        return bool(found)

    def set_children(self, sweep_id: str) -> None:
        """Makes all runs of the sweep children of this one; some may have come before it."""
        experiment = self.client.get_run(self.mlflow_id).info.experiment_id
        for run in paginate(self.client.search_runs, [experiment], f"tags.sweep = '{sweep_id}'"):
            if run.data.tags.get(PARENT_TAG) != self.mlflow_id:
                self.client.set_tag(run.info.run_id, PARENT_TAG, self.mlflow_id)

    def log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:6000]) for name, value in sorted(params.items())]
        for start in range(0, len(entries), MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.mlflow_id, params=entries[start : start + MAX_PARAMS_PER_REQUEST])

    def log_journal_lines(self, lines: list[dict[str, Any]]) -> None:
        """Journal lines with their own steps and times; the same line twice is stored once."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(line["time"] * 1000), line["step"])
            for line in lines
            for name, value in line["values"].items()
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_REQUEST):
            self.client.log_batch(self.mlflow_id, metrics=metrics[start : start + MAX_METRICS_PER_REQUEST])

    def log_changed_metrics(self, values: dict[str, float], *, time: float, step: int) -> None:
        """Metrics, without those that have this value already."""
        known = self.client.get_run(self.mlflow_id).data.metrics
        fresh = {name: value for name, value in values.items() if known.get(name) != value}
        self.log_journal_lines([{"values": fresh, "time": time, "step": step}])

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

    def log_model(self, path: Path, weights_sha256: str, requirements: list[str]) -> str:
        """Uploads the inference model with its signature, once; its id in the store.

        An upload that was cut off is completed in its place, so that no second copy is stored. weights: the SHA-256
        that tells this model from others of the run. requirements: named, because MLflow takes long to find them.
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

    def _get_or_create_logged_model(self, weights_sha256: str) -> Any:
        """The store's entry for these weights of the run, which is made if there is none."""
        run = self.client.get_run(self.mlflow_id)
        experiments = [run.info.experiment_id]
        wanted = f"source_run_id = '{self.mlflow_id}' AND tags.{WEIGHTS_TAG} = '{weights_sha256}'"
        matches = list(self.client.search_logged_models(experiments, wanted, max_results=1))
        if matches:
            return matches[0]
        return self.client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=self.mlflow_id, tags={WEIGHTS_TAG: weights_sha256},
            params=run.data.params,
        )  # fmt: skip

    def _save_model(self, path: Path, target: Path, logged_model: Any, requirements: list[str]) -> None:
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

    def register_model(self, model_id: str, model_info: dict[str, Any]) -> None:
        """A version of the experiment's model, once; CHAMPION names the most accurate one on the data of this run.

        card: of best/model.json.
        """
        run = self.client.get_run(self.mlflow_id)
        experiment = self.client.get_experiment(run.info.experiment_id).name
        name = f"{experiment}-{run.data.tags['data']}".replace(":", "-")  # which names may not have
        name = name.replace('"', "'")  # which a filter can't hold: MLflow's grammar has no escapes
        with _exclusive(self.uri):
            self._create_registered_model(name, f"inference models of {experiment}")
            source = f"models:/{model_id}"
            if source not in {version.source for version in self._versions(name)}:
                tags = {ACCURACY_TAG: str(model_info["validation"]["accuracy"]), "data": model_info["data_fingerprint"]}
                self.client.create_model_version(name, source, self.mlflow_id, tags=tags, model_id=model_id)
            # Of two runs that end at once on a server each may have read before the other one wrote: so until it holds.
            while (best := self._best_version(name, model_info["data_fingerprint"])) != self._champion_version(name):
                self.client.set_registered_model_alias(name, CHAMPION, best)

    def _create_registered_model(self, name: str, description: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, description=description)
        except MlflowException as error:
            if error.error_code != ALREADY_EXISTS:
                raise

    def _versions(self, name: str) -> list[Any]:
        return list(paginate(self.client.search_model_versions, f'name = "{name}"'))

    def _best_version(self, name: str, data_fingerprint: str) -> str:
        """The number of the version with the highest validation accuracy on that data, of equal ones the first."""
        versions = [version for version in self._versions(name) if version.tags.get("data") == data_fingerprint]

        def rank(version: Any) -> tuple[float, int]:
            accuracy = version.tags.get(ACCURACY_TAG) or version.tags[OLD_ACCURACY_TAG]
            return -float(accuracy), int(version.version)

        return min(versions, key=rank).version

    def _champion_version(self, name: str) -> str | None:
        return self.client.get_registered_model(name).aliases.get(CHAMPION)

    def send_heartbeat(self) -> None:
        """The run's process is alive, whatever was said of its last life."""
        self.client.set_tag(self.mlflow_id, HEARTBEAT_TAG, f"{time.time():.0f}")
        if self.client.get_run(self.mlflow_id).info.status != "RUNNING":
            self.client.update_run(self.mlflow_id, status="RUNNING")
        self._delete_tags("failure", "status")

    def _delete_tags(self, *names: str) -> None:
        for name in set(names) & set(self.client.get_run(self.mlflow_id).data.tags):
            self.client.delete_tag(self.mlflow_id, name)

    def finish(self, summary: dict[str, Any]) -> None:
        """Tags from the summary, and the run's end."""
        if not summary.get("failure"):
            self._delete_tags("failure")
        for name in (*SUMMARY_TAGS, "failure"):
            if summary.get(name):
                self.client.set_tag(self.mlflow_id, name, str(summary[name])[:5000])
        self.client.set_terminated(self.mlflow_id, MLFLOW_STATUS[summary["status"]], int(summary["time"] * 1000))


def is_permanent_error(error: Exception) -> bool:
    """Whether asking again will be answered in the same way: not an outage, but a permanent no.

    The server's own answers are told by their status, SQLite's by its result code. What no library of ours classifies
    is taken for an outage: retries end after a while, and add nothing twice.
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


def _is_permanent_status(status: int) -> bool:
    return 400 <= status < 500 and status not in RETRYABLE_STATUS_CODES


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came from, and the database driver's own that SQLAlchemy wraps."""
    while error is not None:
        yield error
        if isinstance(driver := getattr(error, "orig", None), BaseException):
            yield driver
        error = error.__cause__ or error.__context__


def mark_stale(client: Any, mlflow_id: str) -> None:
    """The run's process died without a word."""
    client.set_tag(mlflow_id, "status", "failed")
    client.set_tag(mlflow_id, "failure", "the training process is gone")
    client.set_terminated(mlflow_id, "FAILED")


def list_running(uri: str) -> Iterator[tuple[Any, Any]]:
    """A client, and every run of ours that the store takes for running."""
    client = connect(uri)
    experiments = [found.experiment_id for found in paginate(client.search_experiments)]
    wanted = "attributes.status = 'RUNNING'"
    for run in paginate(client.search_runs, experiments, wanted) if experiments else ():
        if RUN_ID_TAG in run.data.tags:
            yield client, run


def paginate(search: Callable, *arguments: Any) -> Iterator[Any]:
    """All that a search finds; it gives a page at a time."""
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def connect(uri: str) -> Any:
    """An MLflow client, with the credentials of the address in the environment."""
    from mlflow import MlflowClient

    if (path := database_path(uri)) is None:
        return MlflowClient(use_credentials(uri))
    with _without_stray_folder(uri, path):
        _make_default_experiment(uri, path)
        client = MlflowClient(uri)
        if quote_sqlite_path(str(path)) != str(path):
            client.search_registered_models(max_results=1)  # the registry, too, opens the address when first asked
        return client


def _make_default_experiment(uri: str, path: Path) -> None:
    """MLflow's own first experiment, in a new database: it would name the working directory, unquoted, in SQL."""
    if not path.exists() or "'" in str(Path.cwd()):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())


@contextmanager
def _without_stray_folder(uri: str, path: Path) -> Iterator[None]:
    """MLflow makes the folder that an address names before it is unquoted; it is removed again."""
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
    """A path as it stands in the address of a SQLite file, where `%` and `?` mean something else."""
    return path.replace("%", "%25").replace("?", "%3F")


def redact_passwords(text: str, uri: str) -> str:
    """A message of MLflow's about the store at `uri`, as it may be shown."""
    return Redactor(secrets=dict.fromkeys(extract_credentials(uri), "***")).redact(text)


def artifact_location(uri: str, experiment: str) -> str | None:
    """For SQLite, a folder beside the database; a server has its own place."""
    path = database_path(uri)
    return (path.parent / "mlartifacts" / experiment).as_uri() if path else None


def database_path(uri: str) -> Path | None:
    """The file of a SQLite address."""
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
    """One process at a time makes the database and the experiment: their first creation races."""
    path = database_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
