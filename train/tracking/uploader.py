"""The process that feeds MLflow from a run's folder: `python -m train.tracking.uploader <run folder>`.

The trainer starts it and never waits for it while training. It follows the journal, and when the run has ended adds
what else there is; a store that is away is asked again.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.stored import Private, passwords
from train.tracking import store
from train.tracking.folder import RunFolder, open_folder
from train.tracking.journal import read_journal
from train.tracking.store import default_uri

log = logging.getLogger(__name__)

URI = "INCEPTION_TRACKING_URI"
POLL_SECONDS = 0.5
FLUSH_SECONDS = 5.0  # the journal's new lines go in one request: it and the server may share the trainer's cores
BEAT_SECONDS = 30.0
NICENESS = 10  # training comes first: loading MLflow alone takes seconds of a core; at 19 it would take minutes
PATIENCE_SECONDS = 600.0  # how long a store may stay away after the run's end, before `make sync` has to do it
FILES = (
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
CHOSEN_BY = "validation/main_accuracy"
BEST = {"accuracy": "best/validation_main_accuracy", "epoch": "best/epoch"}  # the runs' table shows last values
SCORES = ("accuracy", "top5_accuracy", "loss", "macro_f1", "macro_precision", "macro_recall", "roc_auc", "ece")
EXPORTED = ("accuracy", "largest_difference", "bytes", "images_per_second")

__all__ = ["Record", "default_uri", "start", "wait"]


def beside(uri: str | None, root: Path, name: str) -> str:
    """The address of a SQLite file beside that of the store, or beside the Makefile where it is a server."""
    path = store.database_path(uri or default_uri(root))
    return f"sqlite:///{(path.parent if path else root) / name}"


def start(folder: RunFolder, uri: str) -> subprocess.Popen | None:
    """Starts the uploader in a session of its own, out of reach of the terminal's Ctrl-C; None where that fails."""
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "train.tracking.uploader", str(folder.path)],
            env={**os.environ, URI: uri, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as fault:
        log.warning("no uploader: %s", fault)
        return None


def wait(process: subprocess.Popen | None, folder: RunFolder, uri: str, seconds: float) -> None:
    """Gives the uploader a while to complete the record; training is over and loses nothing by it."""
    if process and process.poll():
        process = start(folder, uri)  # it died on the way; a new one sends everything once more, which adds nothing
    try:
        code = process.wait(seconds) if process else 1
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        code = None
    if code != 0:
        state = "is not complete: make sync run=" if code else "is completed in the background, or by: make sync run="
        print(f"the MLflow record {state}{folder.path} ({folder.path / 'uploader.log'})", file=sys.stderr)


class Record:
    """Brings the MLflow run up to the folder's state, step by step; each call does what has not been done yet."""

    def __init__(self, folder: RunFolder, uri: str):
        self.folder, self.uri = folder, uri
        self.store: store.Store | None = None
        self.offset = 0
        self.logged: set[str] = set()
        self.best = -1.0
        self._next_beat = 0.0
        self.life = folder.life()

    def advance(self) -> store.Store:
        """Identity, parameters and data set, then the journal's new lines."""
        if self.store is None:
            self.identity = _read(self.folder.path / "run.json")
            self.store = store.Store(self.uri, self.identity)
            if self.folder.alive():
                self.store.beat()
                self._next_beat = time.monotonic() + BEAT_SECONDS
        elif time.monotonic() > self._next_beat and self.folder.alive():
            self.store.beat()
            self._next_beat = time.monotonic() + BEAT_SECONDS
        sweep = self.identity["tags"].get("sweep")
        if sweep and "sweep" not in self.logged and self.store.link(sweep):
            self.logged.add("sweep")
        for name, send in (("params.json", self.store.log_params), ("dataset.json", self.store.log_dataset)):
            if name not in self.logged and (self.folder.path / name).exists():
                send(_read(self.folder.path / name))
                self.logged.add(name)
        lines = list(read_journal(self.folder.journal, self.offset))
        if lines:
            self.store.log_lines([self._with_best(line) for line, _ in lines])
            self.offset = lines[-1][1]
        return self.store

    def _with_best(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line, and the best there is by now where it is a new one."""
        now = line["values"].get(CHOSEN_BY, -1.0)
        if now <= self.best:
            return line
        self.best = now
        return {**line, "values": {**line["values"], BEST["accuracy"]: now, BEST["epoch"]: line["epoch"]}}

    def finish(self) -> None:
        """All that a run has at its end, and how it ended: as its summary says, or without a word."""
        place, identity = self.advance(), _read(self.folder.path / "run.json")
        status = self.folder.status()
        try:
            for path in [self.folder.path / name for name in FILES]:
                if path.exists():
                    place.log_file(path)
            for scores in sorted(self.folder.path.glob("evaluation/*/scores.json")):
                self._evaluation(place, scores)
            for summary in sorted(self.folder.path.glob("export/[!.]*/summary.json")):
                self._export(place, summary)
            if identity["tags"].get("kind") == "sweep":
                place.adopt(identity["run_id"])
            if identity["log_model"] and status == "finished":  # others may go on to a better one
                place.log_model(self.folder.best / "model.keras", identity["requirements"])
        finally:  # the run's end is told even where its files can't be kept
            if status is not None:
                place.finish(_read(self.folder.path / "summary.json"))
            elif not self.folder.alive():
                store.mark_gone(place.client, place.mlflow_id)

    def _evaluation(self, place: store.Store, scores: Path) -> None:
        """Numbers and files of one evaluation."""
        name, found = scores.parent.name, _read(scores)
        values = {score: found[score] for score in SCORES}
        values |= dict(zip(("accuracy_low", "accuracy_high"), found["accuracy_interval"], strict=True))
        self._log(place, name, values, scores)
        for path in sorted(scores.parent.glob("[!.]*")):
            place.log_file(path, f"evaluation/{name}")

    def _export(self, place: store.Store, summary: Path) -> None:
        """Numbers and card of an exported file; the file itself stays where it is."""
        name, found = f"export/{summary.parent.name}", _read(summary)
        if found["network"] != self.folder.best_sha256():  # the run went on, to a better one
            return
        self._log(place, name, {key: found[key] for key in EXPORTED}, summary)
        for path in (summary, summary.with_name("README.md")):
            place.log_file(path, name)

    def _log(self, place: store.Store, name: str, values: dict[str, float | None], path: Path) -> None:
        """Numbers of what came of the run, at its last step. path: where they are from."""
        known = {f"{name}/{key}": value for key, value in values.items() if value is not None}
        step = _read(self.folder.path / "summary.json")["steps"] if self.folder.status() else 0
        place.log_once(known, time=path.stat().st_mtime, step=step)


def follow(record: Record) -> int:
    """Advances until the record is complete; 1 when the store stayed away for too long after the run's end."""
    away_since: float | None = None
    due, ended = 0.0, False
    while record.folder.life() == record.life:  # a new life has an uploader of its own, which waits for this one to go
        try:
            ended = record.folder.status() is not None or not record.folder.alive()
            if ended:
                record.finish()
                return 0
            if time.monotonic() > due:
                record.advance()
                due = time.monotonic() + FLUSH_SECONDS
            away_since, pause = None, POLL_SECONDS
        except Exception as fault:  # whatever MLflow raises: training must not notice, the record is completed later
            print(f"{time.strftime('%H:%M:%S')} not recorded yet: {type(fault).__name__}: {fault}", flush=True)
            pause = 5.0
            if ended:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_SECONDS:
                    return 1
        time.sleep(pause)
    return 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Scrubbed(io.TextIOBase):
    """A log that shows no secret of the store's address."""

    def __init__(self, path: Path, uri: str):
        self._file = path.open("a", buffering=1)
        self._private = Private(secrets=dict.fromkeys(passwords(uri), "***"))

    def write(self, text: str) -> int:
        return self._file.write(self._private.hide(text))

    def flush(self) -> None:
        self._file.flush()


def main() -> None:
    os.nice(NICENESS)
    folder, uri = open_folder(Path(sys.argv[1])), os.environ.pop(URI)
    sys.stdout = sys.stderr = Scrubbed(folder.path / "uploader.log", uri)
    with folder.recording(wait=True):  # that of the life before may still be at work
        sys.exit(follow(Record(folder, uri)))


if __name__ == "__main__":
    main()
