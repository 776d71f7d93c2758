"""What a run keeps on its way: the journal, the best weights, checkpoints; and how it goes on from them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from train import faults
from train.checkpoint import Checkpoint, Checkpoints, Interval, refuse_other_ground
from train.config import Config, options
from train.loop import DivergedError, Progress
from train.tracking.folder import Pulse, RunFolder
from train.tracking.journal import Journal

# Keys that may differ from life to life: they change no bit, or the fingerprint of the data stands for them.
FREE = ("tracking.", "checkpoint.", "run_dir", "data.root", "data.manual_dir", "data.directory")


class Keeper:
    """Ties the loop to a run's folder."""

    def __init__(self, folder: RunFolder, config: Config, step: Any, inference: Any, dataset: Any):
        """Cuts a torn line off the journal, and finds the newest checkpoint that is whole."""
        self.folder, self.config, self.step, self.inference, self.dataset = folder, config, step, inference, dataset
        self.journal = Journal(folder.journal)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint.keep)
        self.found = self.checkpoints.newest()
        self.progress = Progress()
        self._pulse: Pulse | None = None
        self._interval = Interval(**{name: v for name, v in options(config.checkpoint).items() if name != "keep"})

    def refuse_other_ground(self, ground: dict[str, Any], accepted: frozenset[str]) -> list[dict[str, Any]]:
        """Changes, apart from those recorded before, that were accepted.

        Raises: ConfigError naming what is no longer as it was in the life before, ValueError naming a
        tensor that no longer fits.
        """
        saved = self.found.content["ground"] if self.found else self.folder.read_json("ground.json", ground)
        recorded = {change["name"]: change["is"] for change in self.folder.identity()["changes"]}

        def known(name: str) -> bool:
            return name.startswith(FREE) or (name in recorded and recorded[name] == ground.get(name))

        longer = {"epochs"} if ground["epochs"] > saved["epochs"] else set()
        refuse_other_ground(saved, ground, lambda name: known(name) or name in accepted | longer)
        if self.found:
            self.step.load(self.found.arrays)
        return [
            {"name": name, "was": saved.get(name), "is": ground.get(name), "time": time.time()}
            for name in sorted({*saved, *ground})
            if saved.get(name) != ground.get(name) and not known(name)
        ]

    def begin(self, ground: dict[str, Any]) -> None:
        """A life begins: where the checkpoint stands, or at the start. The state has been loaded."""
        self._ground, self._changes = ground, len(self.folder.identity()["changes"])
        self._pulse = Pulse(self.folder.path / "heartbeat")
        self.folder.write_json("ground.json", ground)
        faults.point("resume/begun")
        if self.found:
            self._pulse.at_least(self.found.content["steps_executed"])
            self._go_on(self.found, self.found.content["progress"]["rollbacks"])
            return
        self.journal.go_on(0, (self._changes, 0), compare=self.config.deterministic)
        if self.config.on_divergence == "rollback":
            self.save(self.progress)  # the start is good, too

    def _go_on(self, saved: Checkpoint, rollbacks: int) -> None:
        self.progress = Progress.of(saved.content["progress"])
        self.progress.rollbacks = rollbacks
        branch = (self._changes, rollbacks)
        self.journal.go_on(saved.content["journal_lines"], branch, compare=self.config.deterministic)

    def close(self) -> None:
        """Waits for what is being written."""
        self.checkpoints.close()
        if self._pulse:
            self._pulse.close()

    # ------------------------------------------------------------------------------------- what the loop asks for

    def record(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append(epoch, step, values)

    def keep_best(self, epoch: int, values: dict[str, float]) -> None:
        with self.step.averaged():
            self.folder.save_best(self.inference, epoch, values, self.dataset.classes, self.dataset.fingerprint)

    def step_done(self, progress: Progress) -> None:
        assert self._pulse
        self._pulse.beat()
        faults.point("step", progress.steps)

    def due(self, progress: Progress) -> bool:
        return self._interval.due(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress) -> None:
        """A copy of the state, which a thread writes while training goes on. Nothing if that has been done here."""
        if self.checkpoints.begun == progress.name:
            return
        with self.checkpoints.stalling():
            content = {
                "run_id": self.folder.run_id,
                "progress": dataclasses.asdict(progress),
                "journal_lines": self.journal.lines,
                "steps_executed": self.steps_executed,
                "ground": self._ground,
                "time": time.time(),
            }
            self.checkpoints.save(progress.name, self.step.state(), content)

    # ------------------------------------------------------------------------------------------------- what came of it

    @property
    def steps_executed(self) -> int:
        """In all lives of the run."""
        return self._pulse.steps if self._pulse else 0

    @property
    def lives(self) -> int:
        return self._pulse.lives if self._pulse else 0

    def roll_back(self, fault: DivergedError) -> None:
        """Back to the last checkpoint with a lower learning rate, if the config wants that; the journal tells it.

        Raises: DivergedError saying what else there is to do.
        """
        self.checkpoints.wait()
        saved, rule, before = self.checkpoints.newest(), self.config.rollback, self.progress.rollbacks
        if self.config.on_divergence != "rollback" or before >= rule.at_most or saved is None:
            times = f" after {before} rollbacks" if before else ""
            fault.args = (
                f"{fault}{times}; the last good checkpoint is {saved.name if saved else 'none'}; use a lower "
                "optimizer.learning_rate, a gradient_clip, on_divergence=rollback, or precision=float32",
            )
            raise fault
        number = before + 1
        factor = rule.learning_rate_factor**number
        self.step.load(saved.arrays)
        self.step.slow_down(factor)
        self._go_on(saved, number)
        told = {"number": number, "learning_rate_factor": factor, "to_step": self.progress.steps}
        self.record(fault.epoch, fault.step, {f"rollback/{name}": float(value) for name, value in told.items()})
