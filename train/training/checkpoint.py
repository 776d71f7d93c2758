"""Checkpoints: all state of a run between two batches. Each is a folder that is whole or is not there:

checkpoints/epoch-00003-batch-0000120/
    arrays.npz      every state tensor once; arrays only, nothing that could run
    manifest.json   counters, the ground the run stands on, SHA-256 of arrays.npz and of the manifest itself
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.storage import fault_injection
from train.storage.atomic import fsync_folder, write_and_fsync

log = logging.getLogger(__name__)

ARRAYS, MANIFEST = "arrays.npz", "manifest.json"
MISSING_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
UNFINISHED_PREFIX, QUARANTINE_PREFIX = ".new-", "damaged-"
PREEMPTION_SUFFIX = "-stop"  # ends the name of one that was made because somebody stopped the run


@dataclass
class Checkpoint:
    """What one checkpoint holds. `arrays`: state tensors by name; `content`: everything else, as JSON."""

    name: str
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run; written in the background, one at a time."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self._keep = folder, keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self.stall_seconds = 0.0  # how long training has waited for checkpoints
        self.latest_started: str | None = None  # the newest that is written, or is being written
        self.latest_complete: str | None = None  # the newest that is known to be whole

    @contextmanager
    def measure_stall(self) -> Iterator[None]:
        """Counts the time within as time that training waits for a checkpoint."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    def save(self, name: str, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
        """Begins to write; `arrays` must not change any more. Waits only for the one before to be written."""
        self.wait()
        self.latest_started = name
        self._pending = self._executor.submit(self._write, name, arrays, metadata)

    def wait(self) -> None:
        """Until what was begun is on disk. A disk that is full costs the checkpoint, not the run; the log says so."""
        writing, self._pending = self._pending, None
        if writing is None:
            return
        try:
            self.latest_complete = writing.result()
        except OSError as fault:
            self.latest_started = self.latest_complete
            log.warning(
                "a checkpoint could not be written to %s (%s); the one before stays: %s",
                self.folder, fault.strerror or fault, self.latest_complete or "none",
            )  # fmt: skip

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def load_latest(self, *, periodic_only: bool = False) -> Checkpoint | None:
        """The newest that is whole. Those found damaged on the way are put aside under another name, with a warning.

        `planned`: only those that every run of the same config makes, stopped or not.
        """
        for path in reversed(self._paths()):
            if periodic_only and path.name.endswith(PREEMPTION_SUFFIX):
                continue
            try:
                found = read_checkpoint(path)
            except CorruptCheckpointError as fault:
                log.warning("checkpoint %s is damaged: %s; taking the one before", path.name, fault)
                _quarantine(path)
            else:
                self.latest_complete = found.name
                return found
        return None

    def _paths(self) -> list[Path]:
        """Whole checkpoints by their names, the oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if path.is_dir())

    def _write(self, name: str, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
        target, fresh = self.folder / name, self.folder / f"{UNFINISHED_PREFIX}{name}"
        if target.exists():  # an earlier life came to this very place
            return name
        try:
            self._clear_unfinished()
            fresh.mkdir(parents=True)
            fault_injection.fail_point("save/begun")
            with (fresh / ARRAYS).open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                fault_injection.fail_point("save/written")
                file.flush()
                os.fsync(file.fileno())
            fault_injection.fail_point("save/arrays")
            write_and_fsync(fresh / MANIFEST, _manifest(metadata, fresh / ARRAYS))
            fsync_folder(fresh)
            fault_injection.fail_point("save/manifest")
            fresh.rename(target)
            fault_injection.fail_point("save/renamed")
            fsync_folder(self.folder)
            fsync_folder(self.folder.parent)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        self._prune()
        fault_injection.fail_point("save/done")
        return name

    def _prune(self) -> None:
        """The newest planned ones stay, and whatever is newer than all of them."""
        paths = self._paths()
        planned = [path for path in paths if not path.name.endswith(PREEMPTION_SUFFIX)]
        staying = planned[-self._keep :]
        for old in [path for path in paths if path not in staying and planned and path < planned[-1]]:
            try:
                shutil.rmtree(old)
            except OSError as fault:  # the new one is whole all the same
                log.warning("an old checkpoint could not be removed: %s (%s)", old, fault.strerror)
            fault_injection.fail_point("save/pruned")

    def _clear_unfinished(self) -> None:
        for path in self.folder.glob(f"{UNFINISHED_PREFIX}*"):
            shutil.rmtree(path)


class CorruptCheckpointError(ValueError):
    """A checkpoint is not what was written."""


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, every byte verified.

    Raises: DamagedError saying what is wrong, OSError where that can't be told.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        content, expected = manifest["content"], manifest["arrays_sha256"]
        if manifest["sha256"] != _digest(content, expected):
            raise CorruptCheckpointError(f"{MANIFEST} has another SHA-256 than it names")
        with (path / ARRAYS).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CorruptCheckpointError(f"{ARRAYS} has another SHA-256 than {MANIFEST} names")
        with np.load(path / ARRAYS, allow_pickle=False) as arrays:
            return Checkpoint(path.name, dict(arrays), content)
    except (*MISSING_ERRORS, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise CorruptCheckpointError(f"{type(fault).__name__}: {fault}") from None
    except OSError as fault:
        if fault.errno != errno.EIO:
            raise  # it may be whole: a lack of rights, memory or descriptors says nothing of it
        raise CorruptCheckpointError(str(fault)) from None


def _manifest(metadata: dict[str, Any], arrays: Path) -> bytes:
    with arrays.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = json.loads(json.dumps(metadata))  # as it will be read: with texts for keys
    manifest = {"content": metadata, "arrays_sha256": digest, "sha256": _digest(metadata, digest)}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _digest(metadata: dict[str, Any], arrays_sha256: str) -> str:
    return hashlib.sha256(json.dumps([metadata, arrays_sha256], sort_keys=True).encode()).hexdigest()


def _quarantine(path: Path) -> None:
    """Somebody may want to look at it; of several with the same name the last one stays."""
    target = path.with_name(f"{QUARANTINE_PREFIX}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    with suppress(OSError):  # on a disk that can only be read it stays, and is stepped over again
        path.rename(target)


# ----------------------------------------------------------------------------------------------------------- when


@dataclass
class CheckpointPolicy:
    """When to save: after so many epochs, steps or minutes, exactly one of which is set; none: every epoch."""

    every_epochs: int | None = None
    every_steps: int | None = None
    every_minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.every_epochs, self.every_steps, self.every_minutes) == (None, None, None):
            self.every_epochs = 1
        self._saved_at = time.monotonic()

    def should_save(self, epoch: int, step: int, epoch_end: bool) -> bool:
        """Whether to save after step `step` of the run; at an epoch's end `epoch` epochs are behind us."""
        if self.every_epochs is not None:
            return epoch_end and epoch % self.every_epochs == 0
        if self.every_steps is not None:
            return step % self.every_steps == 0
        assert self.every_minutes is not None
        if time.monotonic() - self._saved_at < 60 * self.every_minutes:
            return False
        self._saved_at = time.monotonic()
        return True
