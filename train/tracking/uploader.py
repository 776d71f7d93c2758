"""The process that uploads a run folder to MLflow: `python -m train.tracking.uploader <run folder>`.

The trainer starts it and never waits for it while training. It follows the journal, adds the run's files when the run
has ended, and retries while the store is unreachable.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from train.config.serialization import Redactor, extract_credentials
from train.storage.atomic import open_inside, write_atomically
from train.storage.json_types import JsonObject
from train.tracking import mlflow_store
from train.tracking.mlflow_store import default_uri
from train.tracking.run_dir import RunDir, open_run_dir

log = logging.getLogger(__name__)

URI_VARIABLE = "INCEPTION_TRACKING_URI"
REFUSALS_FILE = "upload_refused.txt"  # one line for each part that the store permanently rejects
REFUSED_EXIT_CODE = 3
POLL_SECONDS = 0.5
FLUSH_SECONDS = 5.0  # new journal lines are batched: uploader and server may share the trainer's cores
HEARTBEAT_SECONDS = 30.0
NICENESS = 10  # training comes first: loading MLflow alone takes seconds of a core; at 19 it would take minutes
PATIENCE_SECONDS = 600.0  # how long to retry after the run's end; later it takes `make sync`
UPLOADED_FILES = (
    "config.yaml",
    "model_summary.txt",
    "input_example.npy",
    "train.log",
    "summary.json",
    "metrics.jsonl",
    "dataset.json",
    "augmented.png",
    "cost.json",
    "report.html",
    "loss.png",
    "accuracy.png",
    "learning_rate.png",
    "filters.png",
    "parallel_coordinates.png",
    "importances.png",
    "accuracy_and_cost.png",
)
SELECTION_METRIC = "validation/accuracy"
# MLflow's table of runs shows last values only.
BEST_METRICS = {"accuracy": "best/validation_accuracy", "epoch": "best/epoch"}
EVALUATION_METRICS = (
    "accuracy",
    "top5_accuracy",
    "loss",
    "macro_f1",
    "macro_precision",
    "macro_recall",
    "roc_auc",
    "ece",
)
EXPORT_METRICS = ("accuracy", "largest_difference", "bytes", "images_per_second")

__all__ = ["Uploader", "default_uri", "start", "wait"]


def sqlite_uri_beside(uri: str | None, root: Path, name: str) -> str:
    """The address of a SQLite file beside the store's database, or beside the Makefile if the store is a server."""
    path = mlflow_store.database_path(uri or default_uri(root))
    return mlflow_store.sqlite_uri((path.parent if path else root) / name)


def start(run_dir: RunDir, uri: str) -> subprocess.Popen[bytes] | None:
    """Starts the uploader in its own session, out of reach of the terminal's Ctrl-C; None if that fails."""
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "train.tracking.uploader", str(run_dir.path)],
            env={**os.environ, URI_VARIABLE: uri, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        log.warning("could not start the MLflow uploader: %s", error)
        return None


def wait(process: subprocess.Popen[bytes] | None, run_dir: RunDir, uri: str, seconds: float) -> None:
    """Waits up to `seconds` for the uploader to finish, and prints what is missing; training is over by then."""
    if process and process.poll() not in (None, 0, REFUSED_EXIT_CODE):
        process = start(run_dir, uri)  # it died; a new one sends everything again, which adds nothing twice
    try:
        code = process.wait(seconds) if process else 1
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        code = None
    for line in read_refusals(run_dir):
        print(f"warning: {line}", file=sys.stderr)
    if code != 0:
        state = "is not complete; finish it with" if code else "continues in the background; if it fails, use"
        command = f"make sync run={shlex.quote(str(run_dir.path))}"
        print(f"the upload to MLflow {state}: {command} ({run_dir.path / 'uploader.log'})", file=sys.stderr)


def upload_and_wait(run_dir: RunDir, uri: str | None, seconds: float) -> None:
    """Uploads what was added after the run's end; uri: None if the store's address is not known."""
    if uri is None:
        command = f"make sync run={shlex.quote(str(run_dir.path))} uri=ADDRESS"
        print(f"the upload to MLflow is not complete; finish it with: {command}", file=sys.stderr)
    else:
        wait(start(run_dir, uri), run_dir, uri, seconds)


def read_refusals(run_dir: RunDir) -> list[str]:
    """The parts that the store permanently rejected in the last upload, one line each."""
    path = run_dir.path / REFUSALS_FILE
    return run_dir.read_bytes(REFUSALS_FILE).decode().splitlines() if path.exists() else []


class RefusedError(ValueError):
    """The store permanently rejects a part of the run."""


class Uploader:
    """Brings the MLflow run up to the folder's state. Every call sends only what has not been sent yet.

    A part that the store permanently rejects is reported once, not sent again, and does not block the other parts.
    """

    def __init__(self, run_dir: RunDir, uri: str):
        self.run_dir = run_dir
        self.uri = uri
        self.store: mlflow_store.Store | None = None
        self.journal_offset = 0
        self.sent: set[tuple[str | int, ...]] = set()  # parts in the store, each with mtime and size of its source file
        self.refused: dict[str, str] = {}  # rejected parts, each with the message for it
        self.best_accuracy = -1.0
        self._next_heartbeat = 0.0
        self.attempt = run_dir.attempt()
        (run_dir.path / REFUSALS_FILE).unlink(missing_ok=True)

    def sync(self) -> mlflow_store.Store:
        """Sends identity, parameters and data set, then the journal's new lines.

        Raises: RefusedError if the store rejects the run itself; whatever MLflow raises during an outage.
        """
        if self.store is None:
            self.identity = self.run_dir.identity()
            self._send("run", self._open_store)
        store = self.store
        if store is None:
            raise RefusedError(self.refused["run"])
        if time.monotonic() > self._next_heartbeat and self.run_dir.is_running():
            self._send("heartbeat", store.send_heartbeat)
            self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        sweep = self.identity["tags"].get("sweep")
        if sweep and ("sweep",) not in self.sent:
            self._send("sweep", lambda: self._set_parent(store, sweep))
        self._send_if_changed("parameters", "params.json", lambda: store.log_params(self._read_json("params.json")))
        self._send_if_changed("data set", "dataset.json", lambda: store.log_dataset(self._read_json("dataset.json")))
        self._send("metrics", self._send_metrics)
        return store

    def _open_store(self) -> None:
        self.store = mlflow_store.Store(self.uri, self.identity)

    def _set_parent(self, run_store: mlflow_store.Store, sweep_id: str) -> None:
        if run_store.set_parent(sweep_id):
            self.sent.add(("sweep",))

    def _send_metrics(self) -> None:
        assert self.store
        lines = list(self.run_dir.read_journal(self.journal_offset))
        if lines and self.run_dir.format_version() == 1:  # MLflow may hold the total loss of the run by this name
            for line, _ in lines:
                line["values"].pop("train/loss", None)
        if lines:
            self.store.log_journal_lines([self._with_best(line) for line, _ in lines])
            self.journal_offset = lines[-1][1]

    def _send_if_changed(self, part: str, name: str, send: Callable[[], None]) -> None:
        """Sends what is made from a file of the folder, unless the file is unchanged since it was last sent."""
        path = self.run_dir.path / name
        if not path.exists():
            return
        stat = path.stat()
        version = (part, name, stat.st_mtime_ns, stat.st_size)
        if version not in self.sent and self._send(part, send):
            self.sent.add(version)

    def _send(self, part: str, send: Callable[[], None]) -> bool:
        """Sends a part and returns whether that worked; a permanent rejection is reported, and never tried again.

        Raises: whatever MLflow raises during an outage.
        """
        if part in self.refused:
            return False
        try:
            send()
        except Exception as error:
            if not mlflow_store.is_permanent_error(error):
                raise
            self._report_refusal(part, error)
            return False
        return True

    def _send_end(self, send: Callable[[], None]) -> None:
        """Sends the run's end, a second time if the connection was cut: a server that could not store a file may have
        cut it, and the next request, whatever it is, fails."""
        try:
            self._send("end", send)
        except Exception as error:
            if not mlflow_store.is_connection_lost(error):
                raise
            self._send("end", send)

    def _report_refusal(self, part: str, error: Exception) -> None:
        """Writes a rejection to the refusals file, which `wait` prints, to the uploader's log and to train.log."""
        message = " ".join(mlflow_store.redact_passwords(str(error) or type(error).__name__, self.uri).split())
        self.refused[part] = f"not recorded in MLflow: {part}: {message[:500]}"
        write_atomically(self.run_dir.path / REFUSALS_FILE, "".join(f"{line}\n" for line in self.refused.values()))
        print(f"{time.strftime('%H:%M:%S')} {self.refused[part]}", flush=True)
        with suppress(OSError, ValueError), self.run_dir.inside("train.log").open("a") as log_file:
            log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} WARNING {__name__}: {self.refused[part]}\n")

    def _with_best(self, line: JsonObject) -> JsonObject:
        """The line, with the BEST_METRICS added if its validation accuracy is a new best."""
        accuracy = line["values"].get(SELECTION_METRIC, -1.0)
        if accuracy <= self.best_accuracy:
            return line
        self.best_accuracy = accuracy
        return {
            **line,
            "values": {**line["values"], BEST_METRICS["accuracy"]: accuracy, BEST_METRICS["epoch"]: line["epoch"] + 1},
        }

    def finish(self) -> None:
        """Sends everything that the run has at its end, and its final status: the summary's, or failed without one.

        Raises: RefusedError naming the rejected parts, after everything else has been sent.
        """
        store = self.sync()
        identity = self.run_dir.identity()
        status = self.run_dir.status()
        try:
            for name in UPLOADED_FILES:
                self._upload_file(store, name)
            for scores in sorted(self.run_dir.path.glob("evaluation/*/scores.json")):
                self._upload_evaluation(store, scores.parent.name)
            for summary in sorted(self.run_dir.path.glob("export/[!.]*/summary.json")):
                self._upload_export(store, summary.parent.name)
            if identity["tags"].get("kind") == "sweep":
                self._send("trials", lambda: store.set_children(identity["run_id"]))
            if identity["log_model"] and status == "finished":  # any other may still be resumed and improve
                self._send_if_changed(
                    "model", "best/model.json", lambda: self._upload_model(store, identity["requirements"])
                )
        finally:  # the status is sent even if the files cannot be
            if status is not None:
                self._send_end(lambda: store.finish(self.run_dir.summary()))
            elif not self.run_dir.is_running():
                self._send_end(lambda: mlflow_store.mark_stale(store.client, store.mlflow_id))
        if self.refused:
            raise RefusedError("; ".join(self.refused.values()))

    def _upload_model(self, run_store: mlflow_store.Store, requirements: list[str]) -> None:
        model_id = run_store.log_model(
            self.run_dir.inside("best/model.keras"), self.run_dir.best_sha256(), requirements
        )
        run_store.register_model(model_id, self.run_dir.model_info())

    def _upload_file(self, run_store: mlflow_store.Store, name: str, folder: str | None = None) -> None:
        """Uploads a copy of a file, so that the file that was checked is the one that is sent."""

        def send() -> None:
            with TemporaryDirectory(prefix="upload-") as temporary, open_inside(self.run_dir.path, name) as file:
                copy = Path(temporary, Path(name).name)
                with copy.open("wb") as target:
                    shutil.copyfileobj(file, target)
                run_store.log_file(copy, folder)

        self._send_if_changed(f"file {name}", name, send)

    def _upload_evaluation(self, run_store: mlflow_store.Store, name: str) -> None:
        """Uploads the metrics and files of one evaluation."""
        part = f"evaluation/{name}"

        def values() -> JsonObject:
            scores = self._read_json(f"{part}/scores.json")
            interval = dict(zip(("accuracy_low", "accuracy_high"), scores["accuracy_interval"], strict=True))
            return {metric: scores[metric] for metric in EVALUATION_METRICS} | interval

        self._send_if_changed(
            part, f"{part}/scores.json", lambda: self._log_metrics(run_store, name, values(), f"{part}/scores.json")
        )
        for path in sorted((self.run_dir.path / part).glob("[!.]*")):
            self._upload_file(run_store, f"{part}/{path.name}", part)

    def _upload_export(self, run_store: mlflow_store.Store, name: str) -> None:
        """Uploads metrics and card of an exported model, but not the model file itself."""
        part = f"export/{name}"
        summary = self._read_json(f"{part}/summary.json")
        if summary["network"] != self.run_dir.best_sha256():  # the run was resumed and has a better model now
            return
        values = {key: summary[key] for key in EXPORT_METRICS}
        self._send_if_changed(
            part, f"{part}/summary.json", lambda: self._log_metrics(run_store, part, values, f"{part}/summary.json")
        )
        for file in ("summary.json", "README.md"):
            self._upload_file(run_store, f"{part}/{file}", part)

    def _log_metrics(self, run_store: mlflow_store.Store, name: str, values: JsonObject, source: str) -> None:
        """Logs the metrics that are not None, with the modification time of their source file."""
        metrics = {f"{name}/{key}": value for key, value in values.items() if value is not None}
        step = self.run_dir.summary()["steps"] if self.run_dir.status() else 0
        run_store.log_changed_metrics(metrics, time=(self.run_dir.path / source).stat().st_mtime, step=step)

    def _read_json(self, name: str) -> JsonObject:
        return json.loads(self.run_dir.read_bytes(name))


def upload_until_finished(uploader: Uploader) -> int:
    """Uploads until the run has ended and everything is sent; returns exit code 0.

    1: the store was unreachable for too long after the run's end; REFUSED_EXIT_CODE: it rejected some parts.
    """
    outage_since: float | None = None
    next_sync = 0.0
    ended = False
    last_error = ""
    # A new attempt starts its own uploader, which waits for this one to end.
    while uploader.run_dir.attempt() == uploader.attempt:
        try:
            ended = uploader.run_dir.status() is not None or not uploader.run_dir.is_running()
            if ended:
                uploader.finish()
                return 0
            if time.monotonic() > next_sync:
                uploader.sync()
                next_sync = time.monotonic() + FLUSH_SECONDS
            outage_since = None
            pause = POLL_SECONDS
            last_error = ""
        except RefusedError:
            return REFUSED_EXIT_CODE
        except Exception as error:  # whatever MLflow raises: training must not notice, the upload is completed later
            if (message := f"{type(error).__name__}: {error}") != last_error:
                print(f"{time.strftime('%H:%M:%S')} could not upload yet, retrying: {message}", flush=True)
            pause = 5.0
            last_error = message
            if ended:
                outage_since = outage_since or time.monotonic()
                if time.monotonic() - outage_since > PATIENCE_SECONDS:
                    return 1
        time.sleep(pause)
    return 0


class RedactingLog(io.TextIOBase):
    """A log file without the secrets of the store's address."""

    def __init__(self, path: Path, uri: str):
        self._file = path.open("a", buffering=1)
        self._redactor = Redactor(secrets=dict.fromkeys(extract_credentials(uri), "***"))

    def write(self, text: str) -> int:
        with suppress(OSError):  # a full disk must not end the uploader
            self._file.write(self._redactor.redact(text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()


def main() -> None:
    os.nice(NICENESS)
    run_dir = open_run_dir(Path(sys.argv[1]))
    uri = os.environ.pop(URI_VARIABLE)
    sys.stdout = sys.stderr = RedactingLog(run_dir.inside("uploader.log"), uri)
    with run_dir.upload_lock(wait=True):  # the previous attempt's uploader may still be running
        sys.exit(upload_until_finished(Uploader(run_dir, uri)))


if __name__ == "__main__":
    main()
