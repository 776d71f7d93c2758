"""The sweep's own MLflow run, parent of the trials' runs; a separate process uploads it from a folder, as with them."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from types import TracebackType

from train.cli.arguments import Override
from train.cli.progress import print_and_log
from train.config.schema import ROOT, Config
from train.config.serialization import RUN_FORMAT_VERSION
from train.sweep import plots
from train.sweep.trials import SweepDir, Trial
from train.tracking import environment, uploader
from train.tracking.journal import INITIAL_BRANCH, Journal, read_journal
from train.tracking.run_dir import Heartbeat, RunDir


class ParentRun:
    """Keeps `record/` up to date while the sweep runs."""

    def __init__(self, folder: SweepDir, config: Config):
        self.folder = folder
        self._config = config
        self.run_dir = RunDir(folder.path / "record", folder.manifest["sweep_id"])
        self._exit_stack = ExitStack()

    def __enter__(self) -> ParentRun:
        self.run_dir.path.mkdir(exist_ok=True)
        self._exit_stack.enter_context(self.run_dir.locked())
        if not (self.run_dir.path / "run.json").exists():
            self._write_identity()
        (self.run_dir.path / "summary.json").unlink(missing_ok=True)
        self._heartbeat = Heartbeat(self.run_dir.path / "heartbeat")
        self._journal = Journal(self.run_dir.journal)
        written = len(list(read_journal(self.run_dir.journal)))
        self._journal.seek(written, INITIAL_BRANCH, compare=False)
        self._tracking_uri = self._config.tracking.uri or uploader.default_uri(ROOT)
        self._uploader = uploader.start(self.run_dir, self._tracking_uri)
        return self

    def _write_identity(self) -> None:
        """Writes run.json and params.json."""
        manifest = self.folder.manifest
        keys = sorted({axis["key"] for axis in manifest["axes"]})
        command = shlex.join(["make", "sweep", *manifest["identity"]])
        self.run_dir.write_json(
            "run.json",
            {
                "format_version": RUN_FORMAT_VERSION,
                "run_id": self.run_dir.run_id,
                "experiment": self._config.tracking.experiment,
                "name": f"sweep of {', '.join(keys) or 'seeds'}",
                "time": manifest["time"],
                "tags": {
                    **environment.tags(ROOT),
                    "kind": "sweep",
                    "run_dir": str(self.run_dir.path),
                    **environment.command_note(command),
                },
                "log_model": False,
                "requirements": [],
                "changes": [],
            },
        )
        # A word without a value, such as ~augment, has an empty one.
        params = {Override.key_of(word): word.partition("=")[2] for word in manifest["identity"]}
        self.run_dir.write_json("params.json", params)

    def log_progress(self, trials: list[Trial], failed: int) -> None:
        """Logs the number of finished and failed trials and the best accuracy, after a trial has ended."""
        accuracies = [value for trial in trials if (value := trial.objective()) is not None]
        metrics = {"sweep/finished": float(len(accuracies)), "sweep/failed": float(failed)}
        if accuracies:
            metrics["best/validation_accuracy"] = max(accuracies)
        self._journal.append(0, len(accuracies) + failed, metrics)

    def write_summary(self, status: str, best_trials: list[Trial]) -> None:
        """Writes the plots and, last, the summary, from which the uploader completes the MLflow run."""
        try:
            plots.write_plots(self.folder, self.run_dir.path)
        except Exception as error:  # from a plotting library; the sweep itself has ended
            print_and_log(f"warning: could not draw the sweep's plots ({type(error).__name__}: {error})")
        summary = {"status": status, "time": time.time(), "run_id": self.run_dir.run_id}
        if best_trials:
            descriptions = (f"{trial.label}: {trial.objective():.4f} ({trial.folder})" for trial in best_trials)
            summary["best_trial"] = "; ".join(descriptions)
        self.run_dir.write_json("summary.json", summary)

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if not (self.run_dir.path / "summary.json").exists():
            self.write_summary("interrupted" if exc_type is KeyboardInterrupt else "failed", [])
        self._heartbeat.close()
        uploader.wait(self._uploader, self.run_dir, self._tracking_uri, self._config.tracking.wait_seconds)
        self._exit_stack.close()
