"""The process that feeds MLflow from a run's folder: `python -m train.tracking.uploader <run folder>`.

The trainer starts it and never waits for it while training. It follows the journal, and when the run has ended adds
what else there is; a store that is away is asked again.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train.tracking import store
from train.tracking.folder import RunFolder, open_folder, read_journal
from train.tracking.store import default_uri

URI = "INCEPTION_TRACKING_URI"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0  # how long a store may stay away after the run's end, before `make sync` has to do it
WAIT_SECONDS = 60.0
FILES = ("config.yaml", "model_summary.txt", "input_example.npy", "train.log", "summary.json", "metrics.jsonl")


__all__ = ["Record", "default_uri", "start", "wait"]


def start(folder: RunFolder, uri: str) -> subprocess.Popen:
    """Starts the uploader in a session of its own, out of reach of the terminal's Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "train.tracking.uploader", str(folder.path)],
        env={**os.environ, URI: uri, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait(process: subprocess.Popen, folder: RunFolder) -> None:
    """Gives the uploader a while to complete the record; training is over and loses nothing by it."""
    try:
        done = process.wait(WAIT_SECONDS) == 0
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        done = False
    if not done:
        alive = process.poll() is None
        state = "goes on in the background" if alive else f"is not complete: make sync run={folder.path}"
        print(f"the MLflow record {state} ({folder.path / 'uploader.log'})", file=sys.stderr)


class Record:
    """Brings the MLflow run up to the folder's state, step by step; each call does what has not been done yet."""

    def __init__(self, folder: RunFolder, uri: str):
        self.folder, self.uri = folder, uri
        self.store: store.Store | None = None
        self.offset = 0
        self.logged: set[str] = set()

    def advance(self) -> None:
        """Identity, parameters and data set, then the journal's new lines."""
        if self.store is None:
            self.store = store.Store(self.uri, _read(self.folder.path / "run.json"))
        for name, log in (("params.json", self.store.log_params), ("dataset.json", self.store.log_dataset)):
            if name not in self.logged and (self.folder.path / name).exists():
                log(_read(self.folder.path / name))
                self.logged.add(name)
        lines = list(read_journal(self.folder.journal, self.offset))
        if lines:
            self.store.log_lines([line for line, _ in lines])
            self.offset = lines[-1][1]

    def complete(self) -> bool:
        """What a run has at its end; False where it has not ended and its process still lives."""
        summary = self.folder.path / "summary.json"
        if not summary.exists() and self.folder.alive():
            return False
        ended = summary.exists()
        self.advance()
        assert self.store is not None
        for path in [self.folder.path / name for name in FILES]:
            if path.exists():
                self.store.log_file(path)
        model, plan = self.folder.best / "model.keras", _read(self.folder.path / "run.json")
        if plan["log_model"] and model.exists():
            self.store.log_model(model, plan["requirements"])
        if ended:
            self.store.finish(_read(summary))
        else:
            self.store.set_status_gone()
        return True


def follow(record: Record) -> int:
    """Advances until the record is complete; 1 when the store stayed away for too long after the end."""
    away_since: float | None = None
    while True:
        try:
            record.advance()
            if record.complete():
                return 0
            away_since, pause = None, POLL_SECONDS
        except Exception as fault:  # whatever MLflow raises: training must not notice, the record is completed later
            print(f"{time.strftime('%H:%M:%S')} not recorded yet: {type(fault).__name__}: {fault}", flush=True)
            now = time.monotonic()
            away_since, pause = away_since or now, 5.0
            if not record.folder.alive() and now - away_since > PATIENCE_SECONDS:
                return 1
        time.sleep(pause)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Scrubbed(io.TextIOBase):
    """A log that shows no secret of the store's address."""

    def __init__(self, path: Path, uri: str):
        self._file = path.open("a", buffering=1)
        parts = urlsplit(uri)
        self._secrets = [s for s in (uri if parts.username else "", parts.username, parts.password, parts.query) if s]

    def write(self, text: str) -> int:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return self._file.write(text)

    def flush(self) -> None:
        self._file.flush()


def main() -> None:
    folder, uri = open_folder(Path(sys.argv[1])), os.environ.pop(URI)
    sys.stdout = sys.stderr = Scrubbed(folder.path / "uploader.log", uri)
    sys.exit(follow(Record(folder, uri)))


if __name__ == "__main__":
    main()
