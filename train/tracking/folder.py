"""A run's folder: what it holds, how it is made, how it is found again."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

log = logging.getLogger(__name__)


@dataclass
class RunFolder:
    """`config.yaml`, `run.json` (identity), `metrics.jsonl` (journal), `best/`, `summary.json`, `train.log`."""

    path: Path
    run_id: str

    @property
    def journal(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")

    def write_yaml(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def save_best(
        self, inference: Any, epoch: int, values: dict[str, float], classes: tuple[str, ...], fingerprint: str
    ) -> None:
        """`best/model.keras`, the inference model, and `best/model.json`, which says what it is."""
        self.best.mkdir(exist_ok=True)
        fresh = self.best / ".new.keras"
        inference.save(fresh)
        fresh.replace(self.best / "model.keras")
        content = {
            "classes": list(classes),
            "input": {"shape": list(inference.input_shape[1:]), "dtype": "uint8", "range": [0, 255]},
            "epoch": epoch,
            "validation_main_accuracy": values["validation/main_accuracy"],
            "data_fingerprint": fingerprint,
        }
        write_atomically(self.best / "model.json", json.dumps(content, indent=2) + "\n")

    def record(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Adds a line to the journal and has it on disk before returning."""
        line = json.dumps({"epoch": epoch, "step": step, "time": time.time(), "values": values}) + "\n"
        with self.journal.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line  # a full disk cut the last one off
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the run's lock; it goes with the process, however that ends.

        Raises: ValueError if another process holds it, or the folder has got a run since it was made.
        """
        with _locked(self.path / ".lock", f"run_dir must not be in use, got {self.path}, where a run is alive"):
            _refuse_used(self.path)
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One process at a time feeds the store.

        Raises: ValueError if another one does.
        """
        with _locked(self.path / ".uploader.lock", f"run must not be recorded by two, got {self.path}; wait a moment"):
            yield

    def alive(self) -> bool:
        """Whether a process holds the run's lock."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR)
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
def _locked(path: Path, refusal: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield
    finally:
        os.close(descriptor)


def _refuse_used(path: Path) -> None:
    if (path / "run.json").exists():
        raise ValueError(f"run_dir must be a folder without a run, got {path}, which holds one; use another")


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def create(run_dir: str | None, runs: Path, experiment: str, *, latest: bool) -> RunFolder:
    """Makes `run_dir`, or `<runs>/<experiment>/<time>-<short id>`, and with `latest` points `<runs>/latest` at it.

    Raises: ValueError if the folder holds a run already or can't be written.
    """
    run_id = uuid.uuid4().hex
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id[:6]}"
    path = Path(run_dir).absolute() if run_dir else runs / experiment / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_used(path)
        probe = path / ".lock"
        probe.touch()
        if latest and path.is_relative_to(runs):
            _point_latest(runs / "latest", path)
    except OSError as fault:
        raise ValueError(
            f"run_dir must be a folder that can be written, got {path} ({fault.strerror}); use run_dir=PATH"
        ) from None
    return RunFolder(path, run_id)


def open_folder(path: Path) -> RunFolder:
    """The run that lies at `path`.

    Raises: ValueError if none does.
    """
    try:
        return RunFolder(path.resolve(), json.loads((path / "run.json").read_text())["run_id"])
    except (OSError, ValueError, KeyError):
        raise ValueError(f"run must be the folder of a run, got {path}; use e.g. run=runs/latest") from None


def _point_latest(link: Path, target: Path) -> None:
    fresh = link.with_name(f".latest-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old content or the new, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from byte `offset` on, each with the offset behind it; a line being written is left for later.

    A line that a full disk cut off is reported as an empty one.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:
                log.warning("the journal's line before byte %d is cut off: %s", offset, line[:80])
                yield {}, offset
