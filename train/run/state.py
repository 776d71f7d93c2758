"""The state of a run between two batches: the training loop's callbacks, restoring it, and rolling it back."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Protocol

from train.config.compatibility import check_compatible, differing_keys
from train.config.schema import Config, options
from train.distributed.process_group import ProcessGroup
from train.storage import fault_injection
from train.storage.json_types import JsonObject
from train.tracking.journal import Journal
from train.tracking.run_dir import Heartbeat, RunDir
from train.training.checkpoint import PREEMPTION_SUFFIX, CheckpointManager, CheckpointPolicy
from train.training.loop import Callbacks, DivergedError, Progress

if TYPE_CHECKING:  # Keras and TensorFlow are imported by prepare_runtime, once their settings are known
    import keras

    from train.data.dataset import Dataset
    from train.training.step.base import Step


def checkpoint_policy(config: Config) -> CheckpointPolicy:
    """The checkpoint schedule of the config."""
    return CheckpointPolicy(**{name: value for name, value in options(config.checkpoint).items() if name != "keep"})


class TrainingState(Callbacks, Protocol):
    """What a process keeps of the training of a run; process 0 stores it, the others take it over from process 0."""

    progress: Progress

    def restore(self, provenance: JsonObject) -> None:
        """Loads the latest checkpoint, if there is one; writes nothing."""

    def synchronize(self) -> None:
        """Gives all processes the position and the state of process 0."""

    def roll_back(self, error: DivergedError) -> None:
        """Returns to an earlier state after a divergence. Raises: DivergedError where the config does not allow it."""

    def close(self) -> None:
        """Waits for the checkpoint being written."""


class RunState:
    """Stores the state of a run in its folder: the training state of process 0."""

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        accepted_changes: frozenset[str],
        step: Step,
        inference: keras.Model,
        dataset: Dataset,
        process_group: ProcessGroup,
    ):
        """Cuts a torn line off the journal, and loads the newest complete checkpoint."""
        self.run_dir = run_dir
        self.config = config
        self.accepted_changes = accepted_changes
        self.step = step
        self.inference = inference
        self.dataset = dataset
        self.process_group = process_group
        self.journal = Journal(run_dir.journal)
        self.checkpoints = CheckpointManager(run_dir.path / "checkpoints", config.checkpoint.keep)
        self.checkpoint = self.checkpoints.load_latest()
        self.progress = Progress()
        self.changes: list[JsonObject] = []
        self._policy = checkpoint_policy(config)

    def restore(self, provenance: JsonObject) -> None:
        """Loads the checkpoint, if there is one; writes nothing.

        Raises: ConfigError naming changes since the previous attempt that were not accepted; ValueError naming a tensor
        that does not match, or a journal that has lost lines.
        """
        self.changes = self._config_changes(provenance)
        self._change_count = len(self.run_dir.identity()["changes"]) + len(self.changes)
        self._provenance = provenance
        if self.checkpoint:
            self.step.load(self.checkpoint.arrays)
            self.checkpoint.arrays.clear()  # frees the memory: the model has copies
        self._set_position(self._start_position())

    def _config_changes(self, provenance: JsonObject) -> list[JsonObject]:
        """The changes since the previous attempt, to be recorded; each starts a new branch of the journal.

        Raises: ConfigError naming changes that were not accepted.
        """
        checkpointed = self.checkpoint.metadata["provenance"] if self.checkpoint else provenance
        previous = self.run_dir.read_json("provenance.json", checkpointed)
        check_compatible(previous, provenance, self.accepted_changes, self.run_dir.path)
        line = self._start_position()["journal_lines"]
        recorded = self.run_dir.identity()["changes"]
        changes = [
            {"name": name, "was": previous.get(name), "is": provenance.get(name), "line": line}
            for name in differing_keys(previous, provenance)
        ]
        if not changes and recorded and recorded[-1]["line"] > line:
            # The checkpoints after the last change are gone, so replayed steps must not be compared with its journal.
            changes = [{"name": "journal_lines", "was": recorded[-1]["line"], "is": line, "line": line}]
        return changes

    def begin_attempt(self, heartbeat: Heartbeat) -> None:
        """Records that an attempt starts to train from here."""
        self._heartbeat = heartbeat
        heartbeat.ensure(self._start_position()["steps_executed"])
        self.run_dir.write_json("provenance.json", self._provenance)
        fault_injection.fail_point("life/ground")

    def _start_position(self) -> JsonObject:
        """The position of the checkpoint, or of a new run."""
        start = {"progress": dataclasses.asdict(Progress()), "journal_lines": 0, "steps_executed": 0}
        return self.checkpoint.metadata if self.checkpoint else start

    def _set_position(self, position: JsonObject, rollbacks: int | None = None) -> None:
        self.progress = Progress.from_dict(position["progress"])
        if rollbacks is not None:
            self.progress.rollbacks = rollbacks
        model_info = self.run_dir.model_info()
        if model_info:  # even if the best epoch comes after this position, or is on an abandoned branch
            self.progress.best_epoch = model_info["epoch"] - 1
            self.progress.best_accuracy = model_info["validation"]["accuracy"]
            self.progress.best_loss = model_info["validation"]["loss"]
        branch = (self._change_count, self.progress.rollbacks)
        self.journal.seek(position["journal_lines"], branch, compare=self.config.deterministic)

    def synchronize(self) -> None:
        """Sends position and state to all other processes."""
        self.process_group.broadcast_state({"progress": dataclasses.asdict(self.progress)}, self.step.state())

    def close(self) -> None:
        """Waits for the checkpoint being written."""
        self.checkpoints.close()

    # ------------------------------------------------------------------------------------- callbacks of the loop

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        return self.process_group.broadcast_metrics(values)

    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append(epoch, step, values)

    def save_best(self, epoch: int, values: dict[str, float]) -> None:
        with self.step.using_ema_weights(), self.step.unfrozen():
            self.run_dir.save_best(self.inference, epoch, values, self.dataset.classes, self.dataset.fingerprint)

    def on_step_end(self, progress: Progress) -> None:
        self._heartbeat.tick()
        fault_injection.fail_point("step", progress.steps)

    def should_checkpoint(self, progress: Progress) -> bool:
        return self._policy.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        """Copies the state, which a thread writes during training; does nothing if it was saved at this position."""
        if self.checkpoints.latest_started == progress.checkpoint_name:
            return
        name = progress.checkpoint_name if periodic else progress.checkpoint_name + PREEMPTION_SUFFIX
        with self.checkpoints.measure_stall():
            metadata = {
                "run_id": self.run_dir.run_id,
                "progress": dataclasses.asdict(progress),
                "journal_lines": self.journal.position,
                "steps_executed": self._heartbeat.steps,
                "provenance": self._provenance,
                "time": time.time(),
            }
            self.checkpoints.save(name, self.step.state(), metadata)

    # ---------------------------------------------------------------------------------------------------- divergence

    def roll_back(self, error: DivergedError) -> None:
        """Returns to the last periodic checkpoint with a lower learning rate, if the config allows it, and logs it.

        Raises: DivergedError with advice, where it does not.
        """
        self.checkpoints.wait()
        checkpoint = self.checkpoints.load_latest(periodic_only=True)
        rule = self.config.rollback
        rollbacks = self.progress.rollbacks
        if self.config.on_divergence != "rollback" or rollbacks >= rule.at_most or checkpoint is None:
            times = f" after {rollbacks} rollback{'s' if rollbacks > 1 else ''}" if rollbacks else ""
            error.args = (
                f"{error}{times}; the last good checkpoint is {checkpoint.name if checkpoint else 'none'}; use a lower "
                "optimizer.learning_rate, a gradient_clip, on_divergence=rollback, or precision=float32",
            )
            self.process_group.broadcast_state({}, self.step.state())
            raise error
        number = rollbacks + 1
        factor = rule.learning_rate_factor**number
        self.step.load(checkpoint.arrays)
        self.step.set_lr_scale(factor)
        self._set_position(checkpoint.metadata, number)
        fault_injection.fail_point("rollback")
        values = {"number": number, "learning_rate_factor": factor, "to_step": self.progress.steps}
        self.log_metrics(error.epoch, error.step, {f"rollback/{name}": float(value) for name, value in values.items()})
        self.synchronize()


class WorkerState:
    """The training state of a process other than process 0, from which it takes everything over; it stores nothing."""

    def __init__(self, config: Config, step: Step, process_group: ProcessGroup):
        self.step = step
        self.process_group = process_group
        self.progress = Progress()
        self._policy = checkpoint_policy(config)

    def restore(self, provenance: JsonObject) -> None:
        pass

    def synchronize(self) -> None:
        self._receive_state()

    def _receive_state(self) -> bool:
        """Takes over position and state; False if process 0 stops."""
        metadata, state = self.process_group.broadcast_state({}, self.step.state())
        if not metadata:
            return False
        self.step.load(state)
        self.progress = Progress.from_dict(metadata["progress"])
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
        """The answer is that of process 0, as saving checks for divergence, which all processes must find together."""
        return self._policy.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        pass

    def roll_back(self, error: DivergedError) -> None:
        """Follows the rollback of process 0. Raises: DivergedError where process 0 stops."""
        if not self._receive_state():
            raise error

    def close(self) -> None:
        pass
