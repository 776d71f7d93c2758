"""A sweep's folder: its manifest, and every trial with its frozen config.

    sweep.json          the manifest: overrides, settings, base configs of the trials
    trials/007.json     a trial: its config, and the values that distinguish it
    007/                the trial's run folder, with its output in output.txt
    record/             the folder of the sweep's own MLflow run

Later changes to conf/ have no effect. The progress of a trial is read from its run folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.cli.arguments import Override
from train.config.schema import ConfigError
from train.config.serialization import RUN_FORMAT_VERSION, quote_value, run_format_version
from train.storage import locks
from train.storage.atomic import write_atomically
from train.storage.json_types import JsonObject
from train.tracking.run_dir import RunDir, open_run_dir

METRIC = "validation/accuracy"

# Keys that control how a sweep is executed: they may differ between two launches of the same sweep.
EXECUTION_KEYS = (
    "sweep.parallel", "sweep.engine", "sweep.minutes", "sweep.retries", "sweep.fail_fast", "sweep.fresh", "sweep.most",
    "sweep.dry_run", "sweep.keep_checkpoints", "tracking.uri", "tracking.wait_seconds", "run_dir",
)  # fmt: skip


@dataclass
class Trial:
    """One trial of a sweep.

    number: from 0. folder: its run folder. values: the values that distinguish it, by key. batch_halvings: how often
    its batch size was halved after running out of memory. overrides: extra ones for its next process.
    """

    number: int
    folder: Path
    file: Path
    label: str
    key: str
    values: JsonObject
    config: JsonObject
    point: int
    batch_halvings: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def selector(self) -> str:
        """Returns the override that tells a process which trial to run."""
        return f"sweep.trial={quote_value(str(self.file))}"

    def run(self) -> RunDir | None:
        """Returns the trial's run, or None before it has started."""
        return open_run_dir(self.folder) if (self.folder / "run.json").exists() else None

    def state(self) -> str:
        """Returns waiting, running, finished, failed, interrupted or paused; the last two can be resumed."""
        run_dir = self.run()
        if run_dir is None:
            return "waiting"
        if run_dir.is_running():
            return "running"
        return run_dir.status() or "interrupted"

    def log_path(self) -> Path:
        """Returns the trial's output file, or the sweep's folder if there is none."""
        output = self.folder / "output.txt"
        return output if output.exists() else self.folder.parent

    def is_paused(self) -> bool:
        """Whether the trial has reached sweep.until and paused."""
        return self.summary().get("status") == "paused"

    def summary(self) -> JsonObject:
        """Returns the summary of the trial's run, empty if there is none."""
        run_dir = self.run()
        return run_dir.summary() if run_dir else {}

    def objective(self) -> float | None:
        """Returns the best validation accuracy, or None if the trial has not finished."""
        summary = self.summary()
        is_done = summary.get("status") == "finished" and "validation" in summary
        return summary["validation"]["accuracy"] if is_done else None

    def total_epochs(self) -> int:
        """Returns the number of epochs in the trial's config."""
        return self.config["epochs"]

    def validation_accuracies(self) -> list[float]:
        """Returns the validation accuracy of every completed epoch."""
        run_dir = self.run()
        lines = (line["values"] for line, _ in run_dir.read_journal()) if run_dir else ()
        return [values[METRIC] for values in lines if METRIC in values]

    def epochs_done(self) -> int:
        """Returns the number of completed epochs; all of them for a finished trial, even if it stopped early."""
        return self.total_epochs() if self.state() == "finished" else len(self.validation_accuracies())


@dataclass
class SweepDir:
    """The sweep in the folder `path`."""

    path: Path
    manifest: JsonObject

    @property
    def trials(self) -> list[Trial]:
        """All trials that have been frozen so far, by number."""
        files = sorted((self.path / "trials").glob("*.json"), key=lambda file: int(file.stem))
        return [self._read_trial(file) for file in files]

    def add(self, number: int, **content: object) -> Trial:
        """Freezes a trial, unless its file exists."""
        file = self.path / "trials" / f"{number:03d}.json"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps({"number": number, **content}, indent=1) + "\n")
        return self._read_trial(file)

    def update(self, trial: Trial, **content: object) -> Trial:
        """Rewrites a trial's file with changed fields."""
        previous = json.loads(trial.file.read_text())
        write_atomically(trial.file, json.dumps({**previous, **content}, indent=1) + "\n")
        return self._read_trial(trial.file)

    def _read_trial(self, file: Path) -> Trial:
        content = json.loads(file.read_text())
        halvings = content.get("batch_halvings", 0)
        name = f"{content['number']:03d}" + (f"-batch{content['config']['batch_size']}" if halvings else "")
        return Trial(folder=self.path / name, file=file, **content)

    def locked(self) -> locks.FileLock:
        """Acquires the sweep's lock. Raises: ConfigError if another process holds it."""
        try:
            return locks.acquire(self.path / ".lock", wait_seconds=0)
        except locks.LockTakenError:
            raise ConfigError(
                f"sweep {self.path} is already running in another process; wait for it or stop it first"
            ) from None


def identifying_overrides(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides that identify a sweep, sorted, without EXECUTION_KEYS; of each key the last one."""
    last = {Override.key_of(override): override for override in overrides}
    return sorted(override for key, override in last.items() if key not in EXECUTION_KEYS)


def find_sweep(runs: Path, overrides: Iterable[str], run_dir: str | None, *, fresh: bool) -> SweepDir | None:
    """Finds the newest sweep with these overrides below `runs`, or the one in `run_dir`.

    Returns None if there is none, or if a `fresh` one is requested. Raises: ConfigError if `run_dir` holds another one.
    """
    identity = identifying_overrides(overrides)
    if run_dir:
        existing = _open_sweep(Path(run_dir)) if (Path(run_dir) / "sweep.json").exists() else None
        if existing and fresh:
            raise ConfigError(f"run_dir {run_dir} already holds a sweep; use another run_dir for a fresh one")
        if existing and existing.manifest["identity"] != identity:
            other = " ".join(existing.manifest["identity"])
            raise ConfigError(f"run_dir {run_dir} already holds another sweep ({other}); use another run_dir")
    else:
        files = sorted(runs.glob(f"sweep-*-{_short_hash(identity)}/sweep.json"))
        existing = _open_sweep(files[-1].parent) if files and not fresh else None
    if existing and run_format_version(existing.manifest) < RUN_FORMAT_VERSION:
        raise ConfigError(
            f"cannot continue sweep {existing.path}: it was written by an older version (run format "
            f"{run_format_version(existing.manifest)}, this version continues format {RUN_FORMAT_VERSION}); "
            "start a new one with sweep.fresh=true, without its run_dir"
        )
    return existing


def create_sweep(
    runs: Path, overrides: list[str], run_dir: str | None, manifest: JsonObject, frozen_trials: list[JsonObject]
) -> SweepDir:
    """Creates the folder of a new sweep with its frozen trials. Raises: ConfigError if it cannot be written."""
    identity = identifying_overrides(overrides)
    path = Path(run_dir) if run_dir else runs / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}-{_short_hash(identity)}"
    full_manifest = {
        "format_version": RUN_FORMAT_VERSION, "sweep_id": uuid.uuid4().hex, "time": time.time(),
        "identity": identity, **manifest,
    }  # fmt: skip
    try:
        path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path / "trials", ignore_errors=True)  # from a launcher that was killed before it wrote sweep.json
        folder = SweepDir(path.resolve(), full_manifest)
        for number, trial in enumerate(frozen_trials):
            folder.add(number, **trial)
        write_atomically(path / "sweep.json", json.dumps(full_manifest, indent=1) + "\n")  # last: now it is a sweep
    except OSError as error:
        raise ConfigError(f"cannot write the sweep folder {path} ({error.strerror}); use another run_dir") from None
    return folder


def _open_sweep(path: Path) -> SweepDir:
    return SweepDir(path.resolve(), json.loads((path / "sweep.json").read_text()))


def _short_hash(overrides: list[str]) -> str:
    return hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]


def read_frozen_trial(file: str) -> tuple[JsonObject, str]:
    """Returns a trial's stored config and its run folder. Raises: ConfigError if the file holds no trial."""
    try:
        trial = SweepDir(Path(file).resolve().parent.parent, {})._read_trial(Path(file).resolve())
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"sweep.trial must be the file of a trial, got {file}; use e.g. SWEEP/trials/000.json"
        ) from None
    return trial.config, str(trial.folder)
