"""Checkpoints: the whole state of a run between two batches. A checkpoint folder is either complete or absent:

checkpoints/epoch-00003-batch-0000120/
    arrays.npz      every state tensor once; arrays only, no pickled objects
    manifest.json   counters, the run's provenance, SHA-256 of arrays.npz and of the manifest itself
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.storage import fault_injection
from train.storage.atomic import atomic_folder, fsync_folder
from train.storage.checksummed import file_sha256
from train.storage.json_types import JsonObject

log = logging.getLogger(__name__)

ARRAYS, MANIFEST = "arrays.npz", "manifest.json"
MISSING_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
UNFINISHED_PREFIX, QUARANTINE_PREFIX = ".new-", "damaged-"
PREEMPTION_SUFFIX = "-stop"  # of a checkpoint that was made because the run was stopped


@dataclass
class Checkpoint:
    """One checkpoint. `arrays`: state tensors by name; `metadata`: everything else, as JSON."""

    name: str
    arrays: dict[str, np.ndarray]
    metadata: JsonObject


class CheckpointManager:
    """The checkpoints of one run, written by a background thread, one at a time."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self._keep = keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str] | None = None
        self.stall_seconds = 0.0  # how long training has waited for checkpoints to be written
        self.latest_started: str | None = None  # including one that is being written
        self.latest_complete: str | None = None  # the newest that is known to be complete

    @contextmanager
    def measure_stall(self) -> Iterator[None]:
        """Adds the time of the block to `stall_seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    def save(self, name: str, arrays: dict[str, np.ndarray], metadata: JsonObject) -> None:
        """Starts writing; `arrays` must not change any more. Waits only until the previous checkpoint is written."""
        self.wait()
        self.latest_started = name
        self._pending = self._executor.submit(self._write, name, arrays, metadata)

    def wait(self) -> None:
        """Waits for the checkpoint being written. A full disk costs the checkpoint, not the run, and logs a warning."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self.latest_complete = pending.result()
        except OSError as error:
            self.latest_started = self.latest_complete
            log.warning(
                "cannot write a checkpoint to %s (%s); the latest complete one is %s",
                self.folder, error.strerror or error, self.latest_complete or "none",
            )  # fmt: skip

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def load_latest(self, *, periodic_only: bool = False) -> Checkpoint | None:
        """The newest complete checkpoint. Damaged ones that are newer are renamed, with a warning.

        `periodic_only`: ignores those that exist only because the run was stopped.
        """
        for path in reversed(self._paths()):
            if periodic_only and path.name.endswith(PREEMPTION_SUFFIX):
                continue
            try:
                checkpoint = read_checkpoint(path)
            except CorruptCheckpointError as error:
                log.warning("checkpoint %s is damaged: %s; using the previous one", path.name, error)
                _quarantine(path)
            else:
                self.latest_complete = checkpoint.name
                return checkpoint
        return None

    def _paths(self) -> list[Path]:
        """Checkpoint folders, the oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if path.is_dir())

    def _write(self, name: str, arrays: dict[str, np.ndarray], metadata: JsonObject) -> str:
        target = self.folder / name
        unfinished = self.folder / f"{UNFINISHED_PREFIX}{name}"
        if target.exists():  # an earlier attempt saved this very position
            return name
        self._clear_unfinished()
        with atomic_folder(target, unfinished, fail_points=("save/manifest", "save/renamed")):
            fault_injection.fail_point("save/begun")
            with (unfinished / ARRAYS).open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                fault_injection.fail_point("save/written")
            fault_injection.fail_point("save/arrays")
            (unfinished / MANIFEST).write_bytes(_manifest(metadata, unfinished / ARRAYS))
        fsync_folder(self.folder.parent)
        self._prune()
        fault_injection.fail_point("save/done")
        return name

    def _prune(self) -> None:
        """Removes all but the newest `keep` periodic checkpoints and those newer than the newest periodic one."""
        paths = self._paths()
        periodic = [path for path in paths if not path.name.endswith(PREEMPTION_SUFFIX)]
        kept = periodic[-self._keep :]
        for old in [path for path in paths if path not in kept and periodic and path < periodic[-1]]:
            try:
                shutil.rmtree(old)
            except OSError as error:  # the new checkpoint is complete all the same
                log.warning("cannot remove the old checkpoint %s (%s)", old, error.strerror)
            fault_injection.fail_point("save/pruned")

    def _clear_unfinished(self) -> None:
        for path in self.folder.glob(f"{UNFINISHED_PREFIX}*"):
            shutil.rmtree(path)


class CorruptCheckpointError(ValueError):
    """A checkpoint does not contain what was written."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and verifies every byte.

    Raises: CorruptCheckpointError saying what is wrong; OSError where the file may be intact but cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        metadata = manifest["content"]
        expected = manifest["arrays_sha256"]
        if manifest["sha256"] != _digest(metadata, expected):
            raise CorruptCheckpointError(f"{MANIFEST} does not match its own SHA-256")
        if file_sha256(path / ARRAYS) != expected:
            raise CorruptCheckpointError(f"{ARRAYS} does not match the SHA-256 in {MANIFEST}")
        with np.load(path / ARRAYS, allow_pickle=False) as arrays:
            return Checkpoint(path.name, dict(arrays), metadata)
    except (*MISSING_ERRORS, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptCheckpointError(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # it may be intact: permissions, memory or descriptors may be missing
        raise CorruptCheckpointError(str(error)) from None


def _manifest(metadata: JsonObject, arrays: Path) -> bytes:
    digest = file_sha256(arrays)
    metadata = json.loads(json.dumps(metadata))  # as it will be read: with strings as keys
    manifest = {"content": metadata, "arrays_sha256": digest, "sha256": _digest(metadata, digest)}
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _digest(metadata: JsonObject, arrays_sha256: str) -> str:
    return hashlib.sha256(json.dumps([metadata, arrays_sha256], sort_keys=True).encode()).hexdigest()


def _quarantine(path: Path) -> None:
    """Renames a damaged checkpoint instead of deleting it, for inspection; replaces an older one of that name."""
    target = path.with_name(f"{QUARANTINE_PREFIX}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    with suppress(OSError):  # on a read-only disk it stays, and is skipped again next time
        path.rename(target)


# --------------------------------------------------------------------------------------------------- when to save


@dataclass
class CheckpointPolicy:
    """When to save: every so many epochs, steps or minutes. At most one may be set; with none, every epoch."""

    every_epochs: int | None = None
    every_steps: int | None = None
    every_minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.every_epochs, self.every_steps, self.every_minutes) == (None, None, None):
            self.every_epochs = 1
        self._saved_at = time.monotonic()

    def should_save(self, epoch: int, step: int, epoch_end: bool) -> bool:
        """Whether to save after step `step` of the run. `epoch`: number of finished epochs, at an epoch's end."""
        if self.every_epochs is not None:
            return epoch_end and epoch % self.every_epochs == 0
        if self.every_steps is not None:
            return step % self.every_steps == 0
        assert self.every_minutes is not None
        if time.monotonic() - self._saved_at < 60 * self.every_minutes:
            return False
        self._saved_at = time.monotonic()
        return True
