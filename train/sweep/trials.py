"""A sweep's folder: what was asked for, every trial with its frozen config, and how far each one is.

    sweep.json          the words, the settings, the configs that trials are made from
    trials/007.json     a trial: its config, and what makes it differ from the others
    007/                its run's folder, with what it printed in output.txt
    record/             the sweep's own record for MLflow

Whatever conf/ says later changes nothing here. How far a trial is can be read from its run's folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config.composition import quote_value
from train.config.schema import ConfigError
from train.storage.atomic import write_atomically
from train.tracking.journal import read_journal
from train.tracking.run_dir import RunDir, open_run_dir

METRIC = "validation/accuracy"

# Words that say how a sweep is run and not what it is: another one's may differ and it is the same sweep.
EXECUTION_KEYS = (
    "sweep.parallel", "sweep.engine", "sweep.minutes", "sweep.retries", "sweep.fail_fast", "sweep.fresh", "sweep.most",
    "sweep.dry_run", "sweep.keep_checkpoints", "tracking.uri", "tracking.wait_seconds", "run_dir",
)  # fmt: skip


@dataclass
class Trial:
    """number: from 0. folder: of its run. values: what makes it differ, by key. batch_halvings: for want of memory.

    words: what its process is told this time, besides its file.
    """

    number: int
    folder: Path
    file: Path
    label: str
    key: str
    values: dict[str, Any]
    config: dict[str, Any]
    point: int
    batch_halvings: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def selector(self) -> str:
        """What tells its process which one it is."""
        return f"sweep.trial={quote_value(str(self.file))}"

    def run(self) -> RunDir | None:
        """Its run; None as long as it has not begun."""
        return open_run_dir(self.folder) if (self.folder / "run.json").exists() else None

    def state(self) -> str:
        """waiting, running, finished, failed, or interrupted: it can go on."""
        run = self.run()
        if run is None:
            return "waiting"
        if run.is_running():
            return "running"
        return run.status() or "interrupted"

    def log_path(self) -> Path:
        """Where there is more to be read about it."""
        output = self.folder / "output.txt"
        return output if output.exists() else self.folder.parent

    def is_paused(self) -> bool:
        """Whether it has come to where it was to wait."""
        return self.summary().get("failure", "").startswith("paused")

    def summary(self) -> dict[str, Any]:
        """Its run's; empty as long as there is none."""
        run = self.run()
        return run.summary() if run else {}

    def objective(self) -> float | None:
        """The highest validation accuracy; None where it is not finished."""
        summary = self.summary()
        is_done = summary.get("status") == "finished" and "validation" in summary
        return summary["validation"]["accuracy"] if is_done else None

    def total_epochs(self) -> int:
        """How many there are to be."""
        return self.config["epochs"]

    def validation_accuracies(self) -> list[float]:
        """On validation, of every epoch that is done."""
        path = self.folder / "metrics.jsonl"
        lines = (line["values"] for line, _ in read_journal(path)) if path.exists() else ()
        return [values[METRIC] for values in lines if METRIC in values]

    def epochs_done(self) -> int:
        """All of them where it has finished, also early."""
        return self.total_epochs() if self.state() == "finished" else len(self.validation_accuracies())


@dataclass
class SweepDir:
    """The sweep that lies at `path`."""

    path: Path
    manifest: dict[str, Any]

    @property
    def trials(self) -> list[Trial]:
        """All that have been made so far, by number."""
        files = sorted((self.path / "trials").glob("*.json"), key=lambda file: int(file.stem))
        return [self._read_trial(file) for file in files]

    def add(self, number: int, **content: Any) -> Trial:
        """Freezes a trial; what is there already stays."""
        file = self.path / "trials" / f"{number:03d}.json"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps({"number": number, **content}, indent=1) + "\n")
        return self._read_trial(file)

    def update(self, trial: Trial, **content: Any) -> Trial:
        """Writes a trial anew."""
        before = json.loads(trial.file.read_text())
        write_atomically(trial.file, json.dumps({**before, **content}, indent=1) + "\n")
        return self._read_trial(trial.file)

    def _read_trial(self, file: Path) -> Trial:
        content = json.loads(file.read_text())
        halvings = content.get("batch_halvings", 0)
        name = f"{content['number']:03d}" + (f"-batch{content['config']['batch_size']}" if halvings else "")
        return Trial(folder=self.path / name, file=file, **content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises: ConfigError if another process is at work on this sweep."""
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise ConfigError(f"a sweep must not be run twice at once, got {self.path}, where one is alive") from None
        finally:
            os.close(descriptor)


def identifying_overrides(overrides: Iterable[str]) -> list[str]:
    """The words that make a sweep what it is, whatever their order and however it is run; of a key the last one."""
    last = {word.partition("=")[0]: word for word in overrides}
    return sorted(word for key, word in last.items() if key not in EXECUTION_KEYS)


def find_sweep(runs: Path, overrides: Iterable[str], run_dir: str | None, *, fresh: bool) -> SweepDir | None:
    """The newest sweep of these words below `runs`, or the one in `run_dir`; None if there is none, or a fresh one is
    wanted.

    Raises: ConfigError where `run_dir` holds another one.
    """
    wanted = identifying_overrides(overrides)
    if run_dir:
        found = _open_sweep(Path(run_dir)) if (Path(run_dir) / "sweep.json").exists() else None
        if found and (fresh or found.manifest["identity"] != wanted):
            asked = "which is there" if fresh else f"of {' '.join(found.manifest['identity'])}"
            raise ConfigError(f"run_dir must be a folder without a sweep, got {run_dir}, {asked}; use another run_dir")
        return found
    files = sorted(runs.glob(f"sweep-*-{_short_hash(wanted)}/sweep.json"))
    return _open_sweep(files[-1].parent) if files and not fresh else None


def create_sweep(
    runs: Path, overrides: list[str], run_dir: str | None, manifest: dict[str, Any], frozen_trials: list[dict[str, Any]]
) -> SweepDir:
    """A new sweep with the trials that were made for it. Raises: ConfigError if its folder can't be written."""
    wanted = identifying_overrides(overrides)
    path = Path(run_dir) if run_dir else runs / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}-{_short_hash(wanted)}"
    full = {"sweep_id": uuid.uuid4().hex, "time": time.time(), "identity": wanted, **manifest}
    try:
        path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path / "trials", ignore_errors=True)  # of one that was killed before it was a sweep
        folder = SweepDir(path.resolve(), full)
        for number, trial in enumerate(frozen_trials):
            folder.add(number, **trial)
        write_atomically(path / "sweep.json", json.dumps(full, indent=1) + "\n")  # last: now it is a sweep
    except OSError as fault:
        raise ConfigError(f"a sweep must have a folder that can be written, got {path} ({fault.strerror})") from None
    return folder


def _open_sweep(path: Path) -> SweepDir:
    return SweepDir(path.resolve(), json.loads((path / "sweep.json").read_text()))


def _short_hash(overrides: list[str]) -> str:
    return hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]


def read_frozen_trial(file: str) -> tuple[dict[str, Any], str]:
    """A trial's config as it is stored, and its run's folder.

    Raises: ConfigError if the file holds no trial.
    """
    try:
        trial = SweepDir(Path(file).resolve().parent.parent, {})._read_trial(Path(file).resolve())
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"sweep.trial must be a trial's file, got {file}; use e.g. SWEEP/trials/000.json") from None
    return trial.config, str(trial.folder)
