"""What a run keeps on its way: the journal, the best weights, checkpoints; and how it goes on from them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from train.config.compatibility import changed, refuse_changes
from train.config.schema import Config, options
from train.distributed.process_group import Team
from train.storage import fault_injection
from train.tracking.journal import Journal
from train.tracking.run_dir import Pulse, RunFolder
from train.training.checkpoint import UNPLANNED, Checkpoints, Interval
from train.training.loop import DivergedError, Progress


def interval_of(config: Config) -> Interval:
    """When checkpoints are due."""
    return Interval(**{name: value for name, value in options(config.checkpoint).items() if name != "keep"})


class Keeper:
    """Ties the loop to a run's folder."""

    def __init__(self, folder: RunFolder, config: Config, step: Any, inference: Any, dataset: Any, team: Team):
        """Cuts a torn line off the journal, and finds the newest checkpoint that is whole."""
        self.folder, self.config, self.step, self.inference, self.dataset = folder, config, step, inference, dataset
        self.team = team
        self.journal = Journal(folder.journal)
        self.checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint.keep)
        self.found = self.checkpoints.newest()
        self.progress = Progress()
        self._interval = interval_of(config)

    def changes(self, ground: dict[str, Any], accepted: frozenset[str]) -> list[dict[str, Any]]:
        """What is not as it was in the life before, to be recorded; each begins a new branch of the journal.

        Raises: ConfigError naming what differs and was not accepted.
        """
        before = self.folder.read_json("ground.json", self.found.content["ground"] if self.found else ground)
        refuse_changes(before, ground, accepted)
        line, recorded = self._place()["journal_lines"], self.folder.identity()["changes"]
        changes = [
            {"name": name, "was": before.get(name), "is": ground.get(name), "line": line}
            for name in changed(before, ground)
        ]
        if not changes and recorded and recorded[-1]["line"] > line:
            # The checkpoints behind the last change are gone. What is done now can't be compared with what came of it.
            changes = [{"name": "journal_lines", "was": recorded[-1]["line"], "is": line, "line": line}]
        return changes

    def go_on(self, changes: int) -> None:
        """Back to the checkpoint, if there is one. `changes`: how many there were in the run. Writes nothing.

        Raises: ValueError naming a tensor that no longer fits, or a journal that has lost lines.
        """
        self._changes = changes
        if self.found:
            self.step.load(self.found.arrays)
            self.found.arrays.clear()  # they are in the network now
        self._stand(self._place())

    def begin(self, ground: dict[str, Any], pulse: Pulse) -> None:
        """A life begins to train."""
        self._ground, self._pulse = ground, pulse
        pulse.at_least(self._place()["steps_executed"])
        self.folder.write_json("ground.json", ground)
        fault_injection.point("life/ground")

    def _place(self) -> dict[str, Any]:
        """Where a life starts."""
        start = {"progress": dataclasses.asdict(Progress()), "journal_lines": 0, "steps_executed": 0}
        return self.found.content if self.found else start

    def _stand(self, place: dict[str, Any], rollbacks: int | None = None) -> None:
        self.progress = Progress.of(place["progress"])
        if rollbacks is not None:
            self.progress.rollbacks = rollbacks
        card = self.folder.card()
        if card:  # also where the best was found behind this place, or on a branch that was left
            self.progress.best_epoch, self.progress.best_accuracy = card["epoch"], card["validation_main_accuracy"]
        branch = (self._changes, self.progress.rollbacks)
        self.journal.go_on(place["journal_lines"], branch, compare=self.config.deterministic)

    def share(self) -> None:
        """All processes stand where this one does."""
        self.team.share({"progress": dataclasses.asdict(self.progress)}, self.step.state())

    def close(self) -> None:
        """Waits for what is being written."""
        self.checkpoints.close()

    # ------------------------------------------------------------------------------------- what the loop asks for

    def heed(self, values: dict[str, float]) -> dict[str, float]:
        return self.team.heed(values)

    def record(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append(epoch, step, values)

    def keep_best(self, epoch: int, values: dict[str, float]) -> None:
        with self.step.averaged(), self.step.thawed():
            self.folder.save_best(self.inference, epoch, values, self.dataset.classes, self.dataset.fingerprint)

    def step_done(self, progress: Progress) -> None:
        self._pulse.beat()
        fault_injection.point("step", progress.steps)

    def due(self, progress: Progress) -> bool:
        return self._interval.due(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, planned: bool) -> None:
        """A copy of the state, which a thread writes while training goes on. Nothing if that has been done here."""
        if self.checkpoints.begun == progress.name:
            return
        name = progress.name if planned else progress.name + UNPLANNED
        with self.checkpoints.stalling():
            content = {
                "run_id": self.folder.run_id,
                "progress": dataclasses.asdict(progress),
                "journal_lines": self.journal.lines,
                "steps_executed": self._pulse.steps,
                "ground": self._ground,
                "time": time.time(),
            }
            self.checkpoints.save(name, self.step.state(), content)

    # ------------------------------------------------------------------------------------------------- what came of it

    def roll_back(self, fault: DivergedError) -> None:
        """Back to the last checkpoint with a lower learning rate, if the config wants that; the journal tells it.

        Raises: DivergedError saying what else there is to do.
        """
        self.checkpoints.wait()
        saved, rule, before = self.checkpoints.newest(planned=True), self.config.rollback, self.progress.rollbacks
        if self.config.on_divergence != "rollback" or before >= rule.at_most or saved is None:
            times = f" after {before} rollbacks" if before else ""
            fault.args = (
                f"{fault}{times}; the last good checkpoint is {saved.name if saved else 'none'}; use a lower "
                "optimizer.learning_rate, a gradient_clip, on_divergence=rollback, or precision=float32",
            )
            self.team.share({}, self.step.state())
            raise fault
        number = before + 1
        factor = rule.learning_rate_factor**number
        self.step.load(saved.arrays)
        self.step.slow_down(factor)
        self._stand(saved.content, number)
        fault_injection.point("rollback")
        told = {"number": number, "learning_rate_factor": factor, "to_step": self.progress.steps}
        self.record(fault.epoch, fault.step, {f"rollback/{name}": float(value) for name, value in told.items()})
        self.share()


class Follower:
    """What a process has in a keeper's place that does not lead: it stands where process 0 does, and keeps nothing."""

    def __init__(self, config: Config, step: Any, team: Team):
        self.step, self.team, self.progress = step, team, Progress()
        self._interval = interval_of(config)

    def take(self) -> bool:
        """Goes to where process 0 stands; whether it goes on."""
        content, state = self.team.share({}, self.step.state())
        if not content:
            return False
        self.step.load(state)
        self.progress = Progress.of(content["progress"])
        return True

    def heed(self, values: dict[str, float]) -> dict[str, float]:
        return self.team.heed(values)

    def record(self, epoch: int, step: int, values: dict[str, float]) -> None:
        pass

    def keep_best(self, epoch: int, values: dict[str, float]) -> None:
        pass

    def step_done(self, progress: Progress) -> None:
        fault_injection.point("step", progress.steps)

    def due(self, progress: Progress) -> bool:
        """As with process 0: where it looks whether all numbers are finite, all do."""
        return self._interval.due(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, planned: bool) -> None:
        pass

    def roll_back(self, fault: DivergedError) -> None:
        """Raises: DivergedError where process 0 does not go on."""
        if not self.take():
            raise fault
