"""The run folder: its files, its lock, and functions to create it and find it again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from train.config.serialization import RUN_FORMAT_VERSION, FormatVersionError, check_format_version, run_format_version
from train.storage import fault_injection, locks
from train.storage.atomic import (
    UnsafePathError,
    fsync_file,
    read_inside,
    replace_symlink,
    resolve_inside,
    write_atomically,
)
from train.storage.json_types import JsonObject
from train.tracking import format_1
from train.tracking.journal import read_journal

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

BEST_MODEL_INFO = "best/model.json"
PROBE_SECONDS = 0.5  # to wait for a lock that another process only tests: `is_running` holds it for a moment


@dataclass
class RunDir:
    """`config.yaml`, `run.json` (identity), `metrics.jsonl` (journal), `best/`, `summary.json`, `train.log`."""

    path: Path
    run_id: str

    def inside(self, name: str) -> Path:
        """The real path of `name` in the folder.

        Raises: UnsafePathError for a link out of the folder.
        """
        return resolve_inside(self.path, name)

    def read_bytes(self, name: str) -> bytes:
        """Raises: UnsafePathError for anything but a regular file of the folder; OSError."""
        return read_inside(self.path, name)

    @property
    def journal(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def write_json(self, name: str, payload: JsonObject) -> None:
        write_atomically(self.path / name, json.dumps(payload, indent=2) + "\n")

    def read_json(self, name: str, default: JsonObject) -> JsonObject:
        """The object that `write_json` wrote, or `default` if the file does not exist.

        Raises: ValueError naming a file that is not JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except FileNotFoundError:
            return default
        except UnsafePathError:
            raise
        except ValueError:
            raise ValueError(f"{self.path / name} is not valid JSON; restore the original file") from None

    def write_yaml(self, name: str, payload: JsonObject) -> None:
        write_atomically(self.path / name, yaml.safe_dump(payload, sort_keys=False, allow_unicode=True))

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def save_best(
        self, inference: keras.Model, epoch: int, values: dict[str, float], classes: tuple[str, ...], fingerprint: str
    ) -> None:
        """Writes `best/model.keras`, the inference model, and `best/model.json`, which describes it, atomically.

        `best` is a link to one of two folders, and is switched when the other one is complete.
        """
        previous = self.best.resolve()
        target = self.path / next(name for name in (".best-a", ".best-b") if name != previous.name)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            inference.save(target / "model.keras")
            fsync_file(target / "model.keras")
            fault_injection.fail_point("best/model")
            model_info = {
                "classes": list(classes),
                "input": {"shape": list(inference.input_shape[1:]), "dtype": "uint8", "range": [0, 255]},
                "epoch": epoch + 1,
                "validation": {name: values[f"validation/{name}"] for name in ("accuracy", "loss")},
                "data_fingerprint": fingerprint,
            }
            write_atomically(target / "model.json", json.dumps(model_info, indent=2) + "\n")
            fault_injection.fail_point("best/card")
            replace_symlink(self.best, target)
        except Exception:  # h5py raises its own types for a full disk
            shutil.rmtree(target, ignore_errors=True)
            raise
        fault_injection.fail_point("best/turned")
        if previous.name in (".best-a", ".best-b"):
            shutil.rmtree(previous, ignore_errors=True)

    def identity(self) -> JsonObject:
        """run.json."""
        return json.loads(self.read_bytes("run.json"))

    def config(self) -> JsonObject:
        """config.yaml without interpolation: a `${...}` in it is plain text.

        Raises: ValueError if the file does not hold a config.
        """
        try:
            config = yaml.safe_load(self.read_bytes("config.yaml"))
        except yaml.YAMLError:
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"{self.path / 'config.yaml'} is not the config of a run; restore the original file")
        return format_1.current_config(config) if self.format_version() == 1 else config

    def sweep_id(self) -> str | None:
        """The id of the sweep that the run is a trial of; None outside a sweep folder."""
        try:
            return json.loads((self.path.parent / "sweep.json").read_text())["sweep_id"]
        except FileNotFoundError:
            return None

    def trial_label(self) -> str | None:
        """The overrides that tell the run from the other trials of its sweep; None outside a sweep."""
        if self.sweep_id() is None:
            return None
        number = self.path.name.partition("-")[0]
        return json.loads((self.path.parent / "trials" / f"{number}.json").read_text())["label"]

    def attempt(self) -> int:
        """The number of the run's latest attempt."""
        return read_heartbeat(self.path / "heartbeat")[1]

    def model_info(self) -> JsonObject:
        """best/model.json in today's form; empty if the file does not exist."""
        return format_1.current_model_info(self.read_json(BEST_MODEL_INFO, {}))

    def summary(self) -> JsonObject:
        """summary.json in today's form; empty if the file does not exist."""
        summary = self.read_json("summary.json", {})
        return format_1.current_summary(summary) if summary and self.format_version() == 1 else summary

    def read_journal(self, offset: int = 0) -> Iterator[tuple[JsonObject, int]]:
        """The lines and offsets of `journal.read_journal`, under today's metric names."""
        is_old = self.journal.exists() and self.format_version() == 1
        for line, end in read_journal(self.journal, offset):
            yield (line | {"values": format_1.current_metrics(line["values"])} if is_old else line), end

    def format_version(self) -> int:
        """The run format of its files; today's as long as nothing is written."""
        return run_format_version(self.identity()) if (self.path / "run.json").exists() else RUN_FORMAT_VERSION

    def best_sha256(self) -> str:
        return best_sha256(self.path)

    def status(self) -> str | None:
        """How the last attempt ended: finished, failed, interrupted or paused; None if it is running or was killed."""
        return self.summary().get("status")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run's lock, which the kernel releases when the process ends.

        Raises: ValueError if another process holds it, or if the folder meanwhile holds another run.
        """
        with _acquire_lock(self.path / ".lock", f"run_dir {self.path} is in use by a running process"):
            if (self.path / "run.json").exists() and self.identity()["run_id"] != self.run_id:
                raise ValueError(f"run_dir {self.path} already holds another run; use another run_dir")
            yield

    def upload_lock(self, *, wait: bool) -> locks.FileLock:
        """Acquires the lock of the one process that may upload the run.

        `wait`: whether to wait for another process to release it, or to raise ValueError.
        """
        taken_message = f"another process is uploading run {self.path}; try again in a moment"
        return _acquire_lock(self.path / ".uploader.lock", taken_message, math.inf if wait else PROBE_SECONDS)

    def is_running(self) -> bool:
        """Whether a process holds the run's lock."""
        return locks.is_locked(self.path / ".lock")


def best_sha256(run: Path) -> str:
    """SHA-256 of a run's best/model.json, which identifies the best model by its epoch, accuracy and data.

    Raises: UnsafePathError; OSError.
    """
    return hashlib.sha256(read_inside(run, BEST_MODEL_INFO)).hexdigest()


def _acquire_lock(path: Path, taken_message: str, wait_seconds: float = PROBE_SECONDS) -> locks.FileLock:
    """Raises: ValueError, with `taken_message` if another process holds it; or if it cannot be written or locked."""
    try:
        return locks.acquire(path, wait_seconds=wait_seconds)
    except locks.LockTakenError:
        raise ValueError(taken_message) from None
    except locks.LocksUnsupportedError as error:
        raise ValueError(
            f"cannot lock files in {path.parent} ({error.strerror}); use a run_dir on storage with file locks"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent} ({error.strerror}); use another run_dir") from None


class Heartbeat:
    """The file `heartbeat`: steps executed over all attempts, and number of attempts; its mtime is the last step's.

    It is rewritten in place at every step, which needs no disk space and survives the process.
    """

    def __init__(self, path: Path):
        """Counts a new attempt."""
        self.steps, self.attempts = read_heartbeat(path)
        self.attempts += 1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._write()

    def tick(self) -> None:
        """Counts one more step."""
        self.steps += 1
        self._write()

    def ensure(self, steps: int) -> None:
        """Raises the count to a checkpoint's, in case the machine crashed before the file reached the disk."""
        self.steps = max(self.steps, steps)
        self._write()

    def _write(self) -> None:
        os.pwrite(self._descriptor, f"{self.steps:19} {self.attempts:6}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def read_heartbeat(path: Path) -> tuple[int, int]:
    """Steps executed and attempts started so far; zeros before the first attempt."""
    counts = path.read_text().split() if path.exists() else []
    return (int(counts[0]), int(counts[1])) if len(counts) == 2 and "".join(counts).isdigit() else (0, 0)


def create_run_dir(run_dir: str | None, runs: Path, experiment: str, *, latest: bool) -> RunDir:
    """Creates `run_dir`, or `<runs>/<experiment>/<time>-<short id>`; `latest` also links `<runs>/latest` to it.

    Raises: ValueError if the folder cannot be written.
    """
    run_id = uuid.uuid4().hex
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id[:6]}"
    path = Path(run_dir).absolute() if run_dir else runs / experiment / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
        if latest and path.is_relative_to(runs):
            replace_symlink(runs / "latest", path)
    except OSError as error:
        raise ValueError(f"cannot write to run_dir {path} ({error.strerror}); use run_dir=PATH") from None
    return RunDir(path, run_id)


def open_run_dir(path: Path) -> RunDir:
    """Opens the run folder at `path`.

    Raises: ValueError if it is not a run folder, or was written by a newer version.
    """
    try:
        identity = json.loads(read_inside(path, "run.json"))
        check_format_version(path, identity)
        return RunDir(path.resolve(), identity["run_id"])
    except (FormatVersionError, UnsafePathError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a run folder; use e.g. run=runs/latest") from None


def latest_unfinished(runs: Path) -> RunDir:
    """The run below `runs` that started last, of those that are neither finished nor running.

    Raises: ValueError if there is none.
    """
    paths = {path.resolve() for pattern in ("*/run.json", "*/*/run.json") for path in runs.glob(pattern)}
    unfinished = [run_dir for path in paths if (run_dir := _open_if_unfinished(path.parent))]
    if not unfinished:
        raise ValueError(f"no unfinished run below {runs}; use run=FOLDER")
    return max(unfinished, key=lambda run_dir: run_dir.identity()["time"])


def _open_if_unfinished(path: Path) -> RunDir | None:
    """The run, if it can be resumed. One that cannot be read is logged and does not block the others."""
    try:
        run_dir = open_run_dir(path)
        return run_dir if run_dir.status() != "finished" and not run_dir.is_running() else None
    except ValueError as error:
        log.warning("skipped an unreadable run: %s", error)
        return None
