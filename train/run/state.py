"""What a run keeps on its way: the journal, the best weights, checkpoints; and how it goes on from them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from train.config.compatibility import check_compatible, differing_keys
from train.config.schema import Config, options
from train.distributed.process_group import ProcessGroup
from train.storage import fault_injection
from train.tracking.journal import Journal
from train.tracking.run_dir import Heartbeat, RunDir
from train.training.checkpoint import PREEMPTION_SUFFIX, CheckpointManager, CheckpointPolicy
from train.training.loop import DivergedError, Progress


def checkpoint_policy(config: Config) -> CheckpointPolicy:
    """When checkpoints are due."""
    return CheckpointPolicy(**{name: value for name, value in options(config.checkpoint).items() if name != "keep"})


class RunState:
    """Ties the loop to a run's folder."""

    def __init__(
        self, folder: RunDir, config: Config, step: Any, inference: Any, dataset: Any, process_group: ProcessGroup
    ):
        """Cuts a torn line off the journal, and finds the newest checkpoint that is whole."""
        self.folder, self.config, self.step, self.inference, self.dataset = folder, config, step, inference, dataset
        self.process_group = process_group
        self.journal = Journal(folder.journal)
        self.checkpoints = CheckpointManager(folder.path / "checkpoints", config.checkpoint.keep)
        self.checkpoint = self.checkpoints.load_latest()
        self.progress = Progress()
        self._policy = checkpoint_policy(config)

    def config_changes(self, provenance: dict[str, Any], accepted_changes: frozenset[str]) -> list[dict[str, Any]]:
        """What is not as it was in the life before, to be recorded; each begins a new branch of the journal.

        Raises: ConfigError naming what differs and was not accepted.
        """
        before = self.folder.read_json(
            "provenance.json", self.checkpoint.metadata["provenance"] if self.checkpoint else provenance
        )
        check_compatible(before, provenance, accepted_changes)
        line, recorded = self._start_position()["journal_lines"], self.folder.identity()["changes"]
        changes = [
            {"name": name, "was": before.get(name), "is": provenance.get(name), "line": line}
            for name in differing_keys(before, provenance)
        ]
        if not changes and recorded and recorded[-1]["line"] > line:
            # The checkpoints behind the last change are gone. What is done now can't be compared with what came of it.
            changes = [{"name": "journal_lines", "was": recorded[-1]["line"], "is": line, "line": line}]
        return changes

    def restore(self, change_count: int) -> None:
        """Back to the checkpoint, if there is one. `changes`: how many there were in the run. Writes nothing.

        Raises: ValueError naming a tensor that no longer fits, or a journal that has lost lines.
        """
        self._change_count = change_count
        if self.checkpoint:
            self.step.load(self.checkpoint.arrays)
            self.checkpoint.arrays.clear()  # they are in the network now
        self._set_position(self._start_position())

    def begin_attempt(self, provenance: dict[str, Any], heartbeat: Heartbeat) -> None:
        """A life begins to train."""
        self._provenance, self._heartbeat = provenance, heartbeat
        heartbeat.ensure(self._start_position()["steps_executed"])
        self.folder.write_json("provenance.json", provenance)
        fault_injection.fail_point("life/ground")

    def _start_position(self) -> dict[str, Any]:
        """Where a life starts."""
        start = {"progress": dataclasses.asdict(Progress()), "journal_lines": 0, "steps_executed": 0}
        return self.checkpoint.metadata if self.checkpoint else start

    def _set_position(self, position: dict[str, Any], rollbacks: int | None = None) -> None:
        self.progress = Progress.from_dict(position["progress"])
        if rollbacks is not None:
            self.progress.rollbacks = rollbacks
        card = self.folder.model_info()
        if card:  # also where the best was found behind this place, or on a branch that was left
            self.progress.best_epoch = card["epoch"] - 1
            self.progress.best_accuracy = card["validation"]["accuracy"]
            self.progress.best_loss = card["validation"]["loss"]
        branch = (self._change_count, self.progress.rollbacks)
        self.journal.seek(position["journal_lines"], branch, compare=self.config.deterministic)

    def broadcast_state(self) -> None:
        """All processes stand where this one does."""
        self.process_group.broadcast_state({"progress": dataclasses.asdict(self.progress)}, self.step.state())

    def close(self) -> None:
        """Waits for what is being written."""
        self.checkpoints.close()

    # ------------------------------------------------------------------------------------- what the loop asks for

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        return self.process_group.broadcast_metrics(values)

    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append(epoch, step, values)

    def save_best(self, epoch: int, values: dict[str, float]) -> None:
        with self.step.using_ema_weights(), self.step.unfrozen():
            self.folder.save_best(self.inference, epoch, values, self.dataset.classes, self.dataset.fingerprint)

    def on_step_end(self, progress: Progress) -> None:
        self._heartbeat.tick()
        fault_injection.fail_point("step", progress.steps)

    def should_checkpoint(self, progress: Progress) -> bool:
        return self._policy.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        """A copy of the state, which a thread writes while training goes on. Nothing if that has been done here."""
        if self.checkpoints.latest_started == progress.checkpoint_name:
            return
        name = progress.checkpoint_name if periodic else progress.checkpoint_name + PREEMPTION_SUFFIX
        with self.checkpoints.measure_stall():
            content = {
                "run_id": self.folder.run_id,
                "progress": dataclasses.asdict(progress),
                "journal_lines": self.journal.position,
                "steps_executed": self._heartbeat.steps,
                "provenance": self._provenance,
                "time": time.time(),
            }
            self.checkpoints.save(name, self.step.state(), content)

    # ------------------------------------------------------------------------------------------------- what came of it

    def roll_back(self, error: DivergedError) -> None:
        """Back to the last checkpoint with a lower learning rate, if the config wants that; the journal tells it.

        Raises: DivergedError saying what else there is to do.
        """
        self.checkpoints.wait()
        saved, rule, before = (
            self.checkpoints.load_latest(periodic_only=True),
            self.config.rollback,
            self.progress.rollbacks,
        )
        if self.config.on_divergence != "rollback" or before >= rule.at_most or saved is None:
            times = f" after {before} rollbacks" if before else ""
            error.args = (
                f"{error}{times}; the last good checkpoint is {saved.name if saved else 'none'}; use a lower "
                "optimizer.learning_rate, a gradient_clip, on_divergence=rollback, or precision=float32",
            )
            self.process_group.broadcast_state({}, self.step.state())
            raise error
        number = before + 1
        factor = rule.learning_rate_factor**number
        self.step.load(saved.arrays)
        self.step.set_lr_scale(factor)
        self._set_position(saved.metadata, number)
        fault_injection.fail_point("rollback")
        told = {"number": number, "learning_rate_factor": factor, "to_step": self.progress.steps}
        self.log_metrics(error.epoch, error.step, {f"rollback/{name}": float(value) for name, value in told.items()})
        self.broadcast_state()


class WorkerState:
    """What a process has in a keeper's place that does not lead: it stands where process 0 does, and keeps nothing."""

    def __init__(self, config: Config, step: Any, process_group: ProcessGroup):
        self.step, self.process_group, self.progress = step, process_group, Progress()
        self._policy = checkpoint_policy(config)

    def receive_state(self) -> bool:
        """Goes to where process 0 stands; whether it goes on."""
        content, state = self.process_group.broadcast_state({}, self.step.state())
        if not content:
            return False
        self.step.load(state)
        self.progress = Progress.from_dict(content["progress"])
        return True

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        return self.process_group.broadcast_metrics(values)

    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None:
        pass

    def save_best(self, epoch: int, values: dict[str, float]) -> None:
        pass

    def on_step_end(self, progress: Progress) -> None:
        fault_injection.fail_point("step", progress.steps)

    def should_checkpoint(self, progress: Progress) -> bool:
        """As with process 0: where it looks whether all numbers are finite, all do."""
        return self._policy.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        pass

    def roll_back(self, error: DivergedError) -> None:
        """Raises: DivergedError where process 0 does not go on."""
        if not self.receive_state():
            raise error
