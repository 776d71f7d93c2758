"""The sweep's own run in MLflow, the parent of its trials' runs: fed like theirs, from a folder, by a process apart."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from types import TracebackType

from train.cli.progress import say
from train.config.schema import ROOT, Config
from train.sweep import plots
from train.sweep.trials import SweepFolder, Trial
from train.tracking import environment, uploader
from train.tracking.journal import FIRST, Journal, read_journal
from train.tracking.run_dir import Pulse, RunFolder


class SweepRecord:
    """Keeps `record/` up to date as long as the sweep is run."""

    def __init__(self, folder: SweepFolder, config: Config):
        self.folder, self._config = folder, config
        self.run = RunFolder(folder.path / "record", folder.content["sweep_id"])
        self._held = ExitStack()

    def __enter__(self) -> SweepRecord:
        self.run.path.mkdir(exist_ok=True)
        self._held.enter_context(self.run.held())
        if not (self.run.path / "run.json").exists():
            self._identify()
        (self.run.path / "summary.json").unlink(missing_ok=True)
        self._pulse = Pulse(self.run.path / "heartbeat")
        self._journal = Journal(self.run.journal)
        written = len(list(read_journal(self.run.journal)))
        self._journal.go_on(written, FIRST, compare=False)
        self._uri = self._config.tracking.uri or uploader.default_uri(ROOT)
        self._uploader = uploader.start(self.run, self._uri)
        return self

    def _identify(self) -> None:
        """run.json and params.json."""
        content = self.folder.content
        keys = sorted({axis["key"] for axis in content["axes"]})
        again = shlex.join(["make", "sweep", *content["identity"]])
        self.run.write_json(
            "run.json",
            {
                "run_id": self.run.run_id,
                "experiment": self._config.tracking.experiment,
                "name": f"sweep of {', '.join(keys) or 'seeds'}",
                "time": content["time"],
                "tags": {
                    **environment.tags(ROOT),
                    "kind": "sweep",
                    "run_dir": str(self.run.path),
                    **environment.note(again),
                },
                "log_model": False,
                "requirements": [],
                "changes": [],
            },
        )
        words = (word.partition("=") for word in content["identity"])
        self.run.write_json("params.json", {name: value for name, _, value in words})

    def note(self, trials: list[Trial], failed: int) -> None:
        """One more trial has ended."""
        found = [value for trial in trials if (value := trial.objective()) is not None]
        values = {"sweep/finished": float(len(found)), "sweep/failed": float(failed)}
        if found:
            values["sweep/best_validation_accuracy"] = max(found)
        self._journal.append(0, len(found) + failed, values)

    def end(self, status: str, crowned: list[Trial]) -> None:
        """The last thing that is written; the uploader takes it from there."""
        try:
            plots.draw(self.folder, self.run.path)
        except Exception as fault:  # of libraries that draw; the sweep has ended all the same
            say(f"warning: no pictures of the sweep: {type(fault).__name__}: {fault}")
        summary = {"status": status, "time": time.time(), "run_id": self.run.run_id}
        if crowned:
            told = (f"{trial.label}: {trial.objective():.4f} ({trial.folder})" for trial in crowned)
            summary["best_trial"] = "; ".join(told)
        self.run.write_json("summary.json", summary)

    def __exit__(self, kind: type | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        if not (self.run.path / "summary.json").exists():
            self.end("interrupted" if kind is KeyboardInterrupt else "failed", [])
        self._pulse.close()
        uploader.wait(self._uploader, self.run, self._uri, self._config.tracking.wait_seconds)
        self._held.close()
