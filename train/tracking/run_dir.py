"""A run's folder: what it holds, how it is made, how it is found again."""

from __future__ import annotations

import fcntl
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
from typing import Any

import yaml

from train.config.serialization import FormatVersionError, check_format_version, format_version
from train.storage import fault_injection
from train.storage.atomic import UnsafePathError, read_inside, replace_symlink, resolve_inside, write_atomically
from train.tracking import format_1
from train.tracking.journal import read_journal

log = logging.getLogger(__name__)


@dataclass
class RunDir:
    """`config.yaml`, `run.json` (identity), `metrics.jsonl` (journal), `best/`, `summary.json`, `train.log`."""

    path: Path
    run_id: str

    def inside(self, name: str) -> Path:
        """The real path of what the folder holds by that name.

        Raises: OutsideError if a link leads out of the folder.
        """
        return resolve_inside(self.path, name)

    def read_bytes(self, name: str) -> bytes:
        """Raises: OutsideError for what is not a regular file of the folder; OSError."""
        return read_inside(self.path, name)

    @property
    def journal(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def write_json(self, name: str, payload: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(payload, indent=2) + "\n")

    def read_json(self, name: str, default: dict[str, Any]) -> dict[str, Any]:
        """What `write_json` wrote, or `otherwise` where it has not come to that.

        Raises: ValueError naming a file that is none of ours.
        """
        try:
            return json.loads(self.read_bytes(name))
        except FileNotFoundError:
            return default
        except UnsafePathError:
            raise
        except ValueError:
            raise ValueError(f"{self.path / name} must hold JSON, as it was written; put it back") from None

    def write_yaml(self, name: str, payload: dict[str, Any]) -> None:
        write_atomically(self.path / name, yaml.safe_dump(payload, sort_keys=False, allow_unicode=True))

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def save_best(
        self, inference: Any, epoch: int, values: dict[str, float], classes: tuple[str, ...], fingerprint: str
    ) -> None:
        """`best/model.keras`, the inference model, and `best/model.json`, which says what it is.

        Both at once: `best` is a link to one of two folders, and is turned when the other one is whole.
        """
        old = self.best.resolve()
        fresh = self.path / next(name for name in (".best-a", ".best-b") if name != old.name)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            inference.save(fresh / "model.keras")
            with (fresh / "model.keras").open("rb") as file:
                os.fsync(file.fileno())
            fault_injection.fail_point("best/model")
            content = {
                "classes": list(classes),
                "input": {"shape": list(inference.input_shape[1:]), "dtype": "uint8", "range": [0, 255]},
                "epoch": epoch + 1,
                "validation": {name: values[f"validation/{name}"] for name in ("accuracy", "loss")},
                "data_fingerprint": fingerprint,
            }
            write_atomically(fresh / "model.json", json.dumps(content, indent=2) + "\n")
            fault_injection.fail_point("best/card")
            replace_symlink(self.best, fresh)
        except Exception:  # h5py has its own for a full disk
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        fault_injection.fail_point("best/turned")
        if old.name in (".best-a", ".best-b"):
            shutil.rmtree(old, ignore_errors=True)

    def identity(self) -> dict[str, Any]:
        """run.json."""
        return json.loads(self.read_bytes("run.json"))

    def config(self) -> dict[str, Any]:
        """config.yaml as it stands there: whatever looks like a reference in it is text.

        Raises: ValueError for a file that holds no config.
        """
        try:
            content = yaml.safe_load(self.read_bytes("config.yaml"))
        except yaml.YAMLError:
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{self.path / 'config.yaml'} does not hold a config; put back the file of the run")
        return format_1.current_config(content) if self.format_version() == 1 else content

    def sweep_id(self) -> str | None:
        """The id of the sweep in whose folder it lies."""
        try:
            return json.loads((self.path.parent / "sweep.json").read_text())["sweep_id"]
        except FileNotFoundError:
            return None

    def trial_label(self) -> str | None:
        """What makes it differ from the other trials of its sweep."""
        if self.sweep_id() is None:
            return None
        number = self.path.name.partition("-")[0]
        return json.loads((self.path.parent / "trials" / f"{number}.json").read_text())["label"]

    def attempt(self) -> int:
        """The number of the run's newest life."""
        return read_heartbeat(self.path / "heartbeat")[1]

    def model_info(self) -> dict[str, Any]:
        """best/model.json in today's form; empty as long as there is none."""
        return format_1.current_model_info(self.read_json("best/model.json", {}))

    def summary(self) -> dict[str, Any]:
        """summary.json in today's form; empty as long as there is none."""
        summary = self.read_json("summary.json", {})
        return format_1.current_summary(summary) if summary and self.format_version() == 1 else summary

    def read_journal(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The journal's lines as `journal.read_journal` gives them, with today's names of metrics."""
        is_old = self.journal.exists() and self.format_version() == 1
        for line, end in read_journal(self.journal, offset):
            yield (line | {"values": format_1.current_metrics(line["values"])} if is_old else line), end

    def format_version(self) -> int:
        return format_version(self.identity())

    def best_sha256(self) -> str:
        """Says which network is in best/: of model.json, which names its epoch, accuracy and data."""
        return hashlib.sha256(self.read_bytes("best/model.json")).hexdigest()

    def status(self) -> str | None:
        """How the run's last life ended: finished, failed or interrupted; None if it lives, or died without a word."""
        return self.summary().get("status")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run's lock; it goes with the process, however that ends.

        Raises: ValueError if another process holds it, or the folder has got another run since it was made.
        """
        with _file_lock(self.path / ".lock", f"run_dir must not be in use, got {self.path}, where a run is alive"):
            if (self.path / "run.json").exists() and self.identity()["run_id"] != self.run_id:
                raise ValueError(f"run_dir must be a folder without a run, got {self.path}, which holds one")
            yield

    @contextmanager
    def upload_lock(self, *, wait: bool) -> Iterator[None]:
        """One process at a time feeds the store.

        `wait`: for the one that does to end; otherwise raises ValueError.
        """
        refusal = f"run must not be recorded by two, got {self.path}; wait a moment"
        with _file_lock(self.path / ".uploader.lock", None if wait else refusal):
            yield

    def is_running(self) -> bool:
        """Whether a process holds the run's lock."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            # Shared: two that ask at the same time don't take each other for the run.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)


@contextmanager
def _file_lock(path: Path, busy_message: str | None) -> Iterator[None]:
    """Holds a lock; without a `refusal` it waits for it.

    Raises: ValueError with the refusal if another process holds it, or saying that the file can't be written or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as fault:
        raise ValueError(f"{path.parent} must be a folder that can be written ({fault.strerror})") from None
    try:
        try:
            taken = _try_lock(descriptor, seconds=math.inf if busy_message is None else 0.5)
        except OSError as fault:
            raise ValueError(
                f"{path.parent} must be on storage where files can be locked ({fault.strerror}); use another run_dir"
            ) from None
        if not taken:
            raise ValueError(busy_message)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, seconds: float) -> bool:
    """Whether the lock could be had; somebody who only asks about it holds it for a moment, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


class Heartbeat:
    """The file `heartbeat`: steps executed in all lives, and lives; its time is that of the last step.

    Rewritten in place at every step, which needs no room on the disk and survives the process.
    """

    def __init__(self, path: Path):
        """A new life begins."""
        self.steps, self.attempts = read_heartbeat(path)
        self.attempts += 1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._write()

    def tick(self) -> None:
        """One more step."""
        self.steps += 1
        self._write()

    def ensure(self, steps: int) -> None:
        """What a checkpoint knows, where the machine went down before the file was on disk."""
        self.steps = max(self.steps, steps)
        self._write()

    def _write(self) -> None:
        os.pwrite(self._descriptor, f"{self.steps:19} {self.attempts:6}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def read_heartbeat(path: Path) -> tuple[int, int]:
    """Steps executed and lives begun so far; noughts where no life has begun."""
    words = path.read_text().split() if path.exists() else []
    return (int(words[0]), int(words[1])) if len(words) == 2 and "".join(words).isdigit() else (0, 0)


def create_run_dir(run_dir: str | None, runs: Path, experiment: str, *, latest: bool) -> RunDir:
    """Makes `run_dir`, or `<runs>/<experiment>/<time>-<short id>`, and with `latest` points `<runs>/latest` at it.

    Raises: ValueError if the folder can't be written.
    """
    run_id = uuid.uuid4().hex
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id[:6]}"
    path = Path(run_dir).absolute() if run_dir else runs / experiment / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
        if latest and path.is_relative_to(runs):
            replace_symlink(runs / "latest", path)
    except OSError as fault:
        raise ValueError(
            f"run_dir must be a folder that can be written, got {path} ({fault.strerror}); use run_dir=PATH"
        ) from None
    return RunDir(path, run_id)


def open_run_dir(path: Path) -> RunDir:
    """The run that lies at `path`.

    Raises: ValueError if none does, or one that a newer version has written.
    """
    try:
        identity = json.loads(read_inside(path, "run.json"))
        check_format_version(path, identity)
        return RunDir(path.resolve(), identity["run_id"])
    except (FormatVersionError, UnsafePathError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"run must be the folder of a run, got {path}; use e.g. run=runs/latest") from None


def latest_unfinished(runs: Path) -> RunDir:
    """The run below `runs` that began last of those that are neither finished nor alive.

    Raises: ValueError if there is none.
    """
    paths = {path.resolve() for pattern in ("*/run.json", "*/*/run.json") for path in runs.glob(pattern)}
    waiting = [folder for path in paths if (folder := _open_if_unfinished(path.parent))]
    if not waiting:
        raise ValueError(f"there must be an unfinished run, got none below {runs}; use run=FOLDER")
    return max(waiting, key=lambda folder: folder.identity()["time"])


def _open_if_unfinished(path: Path) -> RunDir | None:
    """The run, if it waits to be gone on with. One that can't be read must not stand in the way of the others."""
    try:
        folder = open_run_dir(path)
        return folder if folder.status() != "finished" and not folder.is_running() else None
    except ValueError as fault:
        log.warning("left out: %s", fault)
        return None
