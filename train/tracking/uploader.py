"""The process that feeds MLflow from a run's folder: `python -m train.tracking.uploader <run folder>`.

The trainer starts it and never waits for it while training. It follows the journal, and when the run has ended adds
what else there is; a store that is away is asked again.
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
from typing import Any

from train.config.serialization import Redactor, extract_credentials
from train.storage.atomic import open_inside, write_atomically
from train.tracking import mlflow_store
from train.tracking.mlflow_store import default_uri
from train.tracking.run_dir import RunDir, open_run_dir

log = logging.getLogger(__name__)

URI_VARIABLE = "INCEPTION_TRACKING_URI"
REFUSALS_FILE = "upload_refused.txt"  # a line for each part of the record that the store refuses for good
REFUSED_EXIT_CODE = 3  # exit code
POLL_SECONDS = 0.5
FLUSH_SECONDS = 5.0  # the journal's new lines go in one request: it and the server may share the trainer's cores
HEARTBEAT_SECONDS = 30.0
NICENESS = 10  # training comes first: loading MLflow alone takes seconds of a core; at 19 it would take minutes
PATIENCE_SECONDS = 600.0  # how long a store may stay away after the run's end, before `make sync` has to do it
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
BEST_METRICS = {"accuracy": "best/validation_accuracy", "epoch": "best/epoch"}  # the runs' table shows last values
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
    """The address of a SQLite file beside that of the store, or beside the Makefile where it is a server."""
    path = mlflow_store.database_path(uri or default_uri(root))
    return mlflow_store.sqlite_uri((path.parent if path else root) / name)


def start(folder: RunDir, uri: str) -> subprocess.Popen | None:
    """Starts the uploader in a session of its own, out of reach of the terminal's Ctrl-C; None where that fails."""
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "train.tracking.uploader", str(folder.path)],
            env={**os.environ, URI_VARIABLE: uri, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as fault:
        log.warning("no uploader: %s", fault)
        return None


def wait(process: subprocess.Popen | None, folder: RunDir, uri: str, seconds: float) -> None:
    """Gives the uploader a while to complete the record; training is over and loses nothing by it."""
    if process and process.poll() not in (None, 0, REFUSED_EXIT_CODE):
        process = start(folder, uri)  # it died on the way; a new one sends everything once more, which adds nothing
    try:
        code = process.wait(seconds) if process else 1
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        code = None
    for line in read_refusals(folder):
        print(f"warning: {line}", file=sys.stderr)
    if code != 0:
        state = "is not complete" if code else "is completed in the background, or by"
        again = f"make sync run={shlex.quote(str(folder.path))}"
        print(f"the MLflow record {state}: {again} ({folder.path / 'uploader.log'})", file=sys.stderr)


def upload_and_wait(folder: RunDir, uri: str | None, seconds: float) -> None:
    """Adds to the record what has come since the run's end; uri: None where nobody knows the store."""
    if uri is None:
        again = f"make sync run={shlex.quote(str(folder.path))} uri=ADDRESS"
        print(f"the MLflow record is not complete: {again}", file=sys.stderr)
    else:
        wait(start(folder, uri), folder, uri, seconds)


def read_refusals(folder: RunDir) -> list[str]:
    """What the store has refused for good of the record, a line for each part, since it was last tried."""
    path = folder.path / REFUSALS_FILE
    return folder.read_bytes(REFUSALS_FILE).decode().splitlines() if path.exists() else []


class RefusedError(ValueError):
    """The store will never take a part of the record as it is."""


class Uploader:
    """Brings the MLflow run up to the folder's state. Each part is sent once: a call does what has not been done yet.

    A part that the store refuses for good is not sent again, told once, and does not keep back the other parts.
    """

    def __init__(self, folder: RunDir, uri: str):
        self.folder, self.uri = folder, uri
        self.store: mlflow_store.Store | None = None
        self.journal_offset = 0
        self.sent: set[tuple] = set()  # parts that are in the store, each with what it was made from
        self.refused: dict[str, str] = {}  # parts that it refused, and why
        self.best_accuracy = -1.0
        self._next_heartbeat = 0.0
        self.attempt = folder.attempt()
        (folder.path / REFUSALS_FILE).unlink(missing_ok=True)

    def sync(self) -> mlflow_store.Store:
        """Identity, parameters and data set, then the journal's new lines.

        Raises: RefusedError if the store does not take the run at all; whatever MLflow raises where it is away.
        """
        if self.store is None:
            self.identity = self.folder.identity()
            self._send("run", self._open_store)
        place = self.store
        if place is None:
            raise RefusedError(self.refused["run"])
        if time.monotonic() > self._next_heartbeat and self.folder.is_running():
            self._send("heartbeat", place.send_heartbeat)
            self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        sweep = self.identity["tags"].get("sweep")
        if sweep and ("sweep",) not in self.sent:
            self._send("sweep", lambda: self._set_parent(place, sweep))
        self._send_if_changed("parameters", "params.json", lambda: place.log_params(self._read_json("params.json")))
        self._send_if_changed("data set", "dataset.json", lambda: place.log_dataset(self._read_json("dataset.json")))
        self._send("metrics", self._send_metrics)
        return place

    def _open_store(self) -> None:
        self.store = mlflow_store.Store(self.uri, self.identity)

    def _set_parent(self, run_store: mlflow_store.Store, sweep_id: str) -> None:
        if run_store.set_parent(sweep_id):
            self.sent.add(("sweep",))

    def _send_metrics(self) -> None:
        assert self.store
        lines = list(self.folder.read_journal(self.journal_offset))
        if lines:
            self.store.log_journal_lines([self._with_best(line) for line, _ in lines])
            self.journal_offset = lines[-1][1]

    def _send_if_changed(self, part: str, name: str, send: Callable[[], None]) -> None:
        """Sends what is made from a file of the folder, unless that file has been sent as it is now."""
        path = self.folder.path / name
        if not path.exists():
            return
        status = path.stat()
        mark = (part, name, status.st_mtime_ns, status.st_size)
        if mark not in self.sent and self._send(part, send):
            self.sent.add(mark)

    def _send(self, part: str, send: Callable[[], Any]) -> bool:
        """Whether a part of the record was sent; one that is refused for good is told, and never sent again.

        Raises: whatever MLflow raises where the store is away.
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

    def _report_refusal(self, part: str, error: Exception) -> None:
        """Keeps it in the folder for whoever waits or asks later, and in train.log."""
        said = " ".join(mlflow_store.redact_passwords(str(error) or type(error).__name__, self.uri).split())
        self.refused[part] = f"not recorded in MLflow: {part}: {said[:500]}"
        write_atomically(self.folder.path / REFUSALS_FILE, "".join(f"{line}\n" for line in self.refused.values()))
        print(f"{time.strftime('%H:%M:%S')} {self.refused[part]}", flush=True)
        with suppress(OSError, ValueError), self.folder.inside("train.log").open("a") as log_file:
            log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} WARNING {__name__}: {self.refused[part]}\n")

    def _with_best(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line, and the best there is by now where it is a new one."""
        now = line["values"].get(SELECTION_METRIC, -1.0)
        if now <= self.best_accuracy:
            return line
        self.best_accuracy = now
        return {
            **line,
            "values": {**line["values"], BEST_METRICS["accuracy"]: now, BEST_METRICS["epoch"]: line["epoch"] + 1},
        }

    def finish(self) -> None:
        """All that a run has at its end, and how it ended: as its summary says, or without a word.

        Raises: RefusedError naming what was refused, after everything else has been sent.
        """
        place, identity = self.sync(), self.folder.identity()
        status = self.folder.status()
        try:
            for name in UPLOADED_FILES:
                self._upload_file(place, name)
            for scores in sorted(self.folder.path.glob("evaluation/*/scores.json")):
                self._upload_evaluation(place, scores.parent.name)
            for summary in sorted(self.folder.path.glob("export/[!.]*/summary.json")):
                self._upload_export(place, summary.parent.name)
            if identity["tags"].get("kind") == "sweep":
                self._send("trials", lambda: place.set_children(identity["run_id"]))
            if identity["log_model"] and status == "finished":  # others may go on to a better one
                self._send_if_changed(
                    "model", "best/model.json", lambda: self._upload_model(place, identity["requirements"])
                )
        finally:  # the run's end is told even where its files can't be kept
            if status is not None:
                self._send("end", lambda: place.finish(self.folder.summary()))
            elif not self.folder.is_running():
                self._send("end", lambda: mlflow_store.mark_stale(place.client, place.mlflow_id))
        if self.refused:
            raise RefusedError("; ".join(self.refused.values()))

    def _upload_model(self, run_store: mlflow_store.Store, requirements: list[str]) -> None:
        model_id = run_store.log_model(self.folder.inside("best/model.keras"), self.folder.best_sha256(), requirements)
        run_store.register_model(model_id, self.folder.model_info())

    def _upload_file(self, run_store: mlflow_store.Store, name: str, folder: str | None = None) -> None:
        """Uploads a file of the folder: a copy, so that what was checked is what is sent."""

        def send() -> None:
            with TemporaryDirectory(prefix="upload-") as copies, open_inside(self.folder.path, name) as file:
                copy = Path(copies, Path(name).name)
                with copy.open("wb") as target:
                    shutil.copyfileobj(file, target)
                run_store.log_file(copy, folder)

        self._send_if_changed(f"file {name}", name, send)

    def _upload_evaluation(self, run_store: mlflow_store.Store, name: str) -> None:
        """Numbers and files of one evaluation."""
        part = f"evaluation/{name}"

        def values() -> dict[str, Any]:
            scores = self._read_json(f"{part}/scores.json")
            interval = dict(zip(("accuracy_low", "accuracy_high"), scores["accuracy_interval"], strict=True))
            return {score: scores[score] for score in EVALUATION_METRICS} | interval

        self._send_if_changed(
            part, f"{part}/scores.json", lambda: self._log_metrics(run_store, name, values(), f"{part}/scores.json")
        )
        for path in sorted((self.folder.path / part).glob("[!.]*")):
            self._upload_file(run_store, f"{part}/{path.name}", part)

    def _upload_export(self, run_store: mlflow_store.Store, name: str) -> None:
        """Numbers and card of an exported file; the file itself stays where it is."""
        part = f"export/{name}"
        summary = self._read_json(f"{part}/summary.json")
        if summary["network"] != self.folder.best_sha256():  # the run went on, to a better one
            return
        values = {key: summary[key] for key in EXPORT_METRICS}
        self._send_if_changed(
            part, f"{part}/summary.json", lambda: self._log_metrics(run_store, part, values, f"{part}/summary.json")
        )
        for file in ("summary.json", "README.md"):
            self._upload_file(run_store, f"{part}/{file}", part)

    def _log_metrics(self, run_store: mlflow_store.Store, name: str, values: dict[str, Any], source: str) -> None:
        """Metrics of something that a file tells of, with the time of that file."""
        known = {f"{name}/{key}": value for key, value in values.items() if value is not None}
        step = self.folder.summary()["steps"] if self.folder.status() else 0
        run_store.log_changed_metrics(known, time=(self.folder.path / source).stat().st_mtime, step=step)

    def _read_json(self, name: str) -> dict[str, Any]:
        return json.loads(self.folder.read_bytes(name))


def upload_until_finished(uploader: Uploader) -> int:
    """Advances until the record is complete. 1: the store stayed away for too long after the run's end; REFUSED: it
    does not take all of it.
    """
    away_since: float | None = None
    due, ended, said = 0.0, False, ""
    while (
        uploader.folder.attempt() == uploader.attempt
    ):  # a new attempt has its own uploader, which waits for this one to go
        try:
            ended = uploader.folder.status() is not None or not uploader.folder.is_running()
            if ended:
                uploader.finish()
                return 0
            if time.monotonic() > due:
                uploader.sync()
                due = time.monotonic() + FLUSH_SECONDS
            away_since, pause, said = None, POLL_SECONDS, ""
        except RefusedError:
            return REFUSED_EXIT_CODE
        except Exception as fault:  # whatever MLflow raises: training must not notice, the record is completed later
            if (outage := f"{type(fault).__name__}: {fault}") != said:
                print(f"{time.strftime('%H:%M:%S')} not recorded yet: {outage}", flush=True)
            pause, said = 5.0, outage
            if ended:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_SECONDS:
                    return 1
        time.sleep(pause)
    return 0


class RedactingLog(io.TextIOBase):
    """A log that shows no secret of the store's address."""

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
    folder, uri = open_run_dir(Path(sys.argv[1])), os.environ.pop(URI_VARIABLE)
    sys.stdout = sys.stderr = RedactingLog(folder.inside("uploader.log"), uri)
    with folder.upload_lock(wait=True):  # that of the life before may still be at work
        sys.exit(upload_until_finished(Uploader(folder, uri)))


if __name__ == "__main__":
    main()
