"""What a process records of a run: process 0 writes the run folder and prints, any other process does neither."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from train.cli.progress import NoProgressDisplay, TerminalProgressDisplay, print_and_log
from train.config.schema import ROOT, Config
from train.config.serialization import Redactor, config_hash, to_dict
from train.distributed.process_group import ProcessGroup
from train.run import descriptions, factory
from train.run.state import RunState, TrainingState, WorkerState
from train.runtime import setup
from train.storage import fault_injection
from train.storage.atomic import write_atomically
from train.storage.json_types import JsonObject
from train.tracking import run_metadata, uploader
from train.tracking.run_dir import Heartbeat, RunDir

if TYPE_CHECKING:  # Keras and TensorFlow are imported by prepare_runtime, once their settings are known
    import keras

    from train.data.dataset import Dataset
    from train.training.step.base import Step

INPUT_BOUND_FRACTION = 0.05


class Recorder:
    """Records nothing: the recorder of a process other than process 0. The methods are in the order of a run."""

    run_dir: RunDir | None = None
    library_log = Path(os.devnull)  # receives what the libraries print while they are loaded

    def __init__(self, config: Config):
        self.config = config

    def opened(self) -> AbstractContextManager[None]:
        """Holds the lock and the log of the run folder."""
        return nullcontext()

    def begin(self) -> None:
        """Marks a new run as running; one that is resumed has to accept its changes first (`begin_attempt`)."""
        group = self.config.distributed
        print_and_log(f"worker {group.index} of {group.processes} started; progress is printed by process 0")

    def record_config(self, config: Config, messages: list[str]) -> None:
        """config: every `auto` resolved. messages: what device was chosen, and why."""

    def record_data(self, dataset: Dataset, steps_per_epoch: int, cache_message: str) -> None:
        """Raises: ConfigError if the data of a new run is not that of data.fingerprint."""

    def open_state(
        self,
        step: Step,
        inference: keras.Model,  # noqa: ARG002 - for process 0
        dataset: Dataset,  # noqa: ARG002 - for process 0
        process_group: ProcessGroup,
    ) -> TrainingState:
        """The training state of this process, to be closed at the end."""
        return WorkerState(self.config, step, process_group)

    def begin_attempt(
        self, model: keras.Model, inference: keras.Model, dataset: Dataset, batches: factory.Batches
    ) -> None:
        """Records what is trained from where; from here on the run folder is this attempt's."""

    def make_display(self) -> NoProgressDisplay | TerminalProgressDisplay:
        """Shows the progress of training."""
        return NoProgressDisplay()

    def record_training(self, step: Step) -> None:
        """Adds the loop's figures to the summary, however it ended."""

    def record_end_of_training(self) -> None:
        """Says why training ended, and what held it up."""

    def record_test(self, metrics: JsonObject) -> None:
        """metrics: of the best weights on the test split."""

    def close(self, ending: JsonObject, exit_code: int) -> int:  # noqa: ARG002 - for process 0
        """Writes the summary with the attempt's ending; returns the exit code. Nothing may stop it halfway."""
        return exit_code

    def finish(self, exit_code: int, upload_seconds: float) -> None:
        """Waits for the upload, and prints the summary."""


class RunRecorder(Recorder):
    """Writes the run folder, starts the upload to MLflow, and prints: the recorder of process 0.

    `accepted_changes`: config keys that may differ from the previous attempt. `summary` is filled as the run goes, so
    that it says all that is known, whatever ends the run.
    """

    run_dir: RunDir

    def __init__(self, run_dir: RunDir, config: Config, redactor: Redactor, accepted_changes: frozenset[str]):
        super().__init__(config)
        self.run_dir = run_dir
        self.redactor = redactor
        self.accepted_changes = accepted_changes
        self.library_log = run_dir.path / "train.log"
        self.is_new = False
        self.summary = run_metadata.initial_summary(run_dir.run_id, self._labels())
        self.heartbeat: Heartbeat | None = None
        self._state: RunState
        self._uploader: subprocess.Popen[bytes] | None = None

    def _stored_config(self) -> JsonObject:
        return to_dict(self.config, self.redactor)

    def _labels(self) -> run_metadata.RunLabels:
        config = self.config
        return run_metadata.RunLabels(
            config.model.name, config.data.name, config.seed, config.tracking.experiment, config.tracking.log_model
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self.run_dir.locked(), run_metadata.log_to_file(self.run_dir):
            yield

    def begin(self) -> None:
        self.is_new = not (self.run_dir.path / "run.json").exists()
        if self.is_new:
            self._start([])
        fault_injection.fail_point("life/begun")

    def _start(self, config_changes: list[JsonObject]) -> None:
        """Marks the run as running in its folder, and starts the upload."""
        self.heartbeat = Heartbeat(self.run_dir.path / "heartbeat")
        run_metadata.write_run_json(self.run_dir, self._stored_config(), self._labels(), config_changes)
        self._uploader = uploader.start(self.run_dir, self._tracking_uri())

    def _tracking_uri(self) -> str:
        return self.config.tracking.uri or uploader.default_uri(ROOT)

    def record_config(self, config: Config, messages: list[str]) -> None:
        self.config = config
        if self.is_new:
            run_metadata.write_resolved_config(self.run_dir, self._stored_config())
        fault_injection.fail_point("life/settled")
        print_and_log(*messages)

    def record_data(self, dataset: Dataset, steps_per_epoch: int, cache_message: str) -> None:
        self._steps_per_epoch = steps_per_epoch
        if self.is_new:
            factory.check_fingerprint(self.config, dataset)
        print_and_log(
            f"data: {dataset.name}, {len(dataset.classes)} classes, {factory.split_sizes(dataset)} examples",
            *dataset.notes,
            factory.epoch_message(self.config, dataset, steps_per_epoch),
            cache_message,
        )

    def open_state(
        self, step: Step, inference: keras.Model, dataset: Dataset, process_group: ProcessGroup
    ) -> TrainingState:
        self._state = RunState(
            self.run_dir, self.config, self.accepted_changes, step, inference, dataset, process_group
        )
        return self._state

    def begin_attempt(
        self, model: keras.Model, inference: keras.Model, dataset: Dataset, batches: factory.Batches
    ) -> None:
        if self.heartbeat is None:
            self._start(self._state.changes)
        assert self.heartbeat is not None
        self._state.begin_attempt(self.heartbeat)
        self._describe_data(dataset)
        self._describe_model(model, inference)
        if self.is_new:
            run_metadata.write_batch_image(self.run_dir, next(iter(batches(0, 0)))[0].numpy())
        parameters = self.summary["parameters"]
        macs = self.summary["macs"]
        print_and_log(f"model: {model.name}, {parameters:,} parameters, {macs:,} multiply-accumulates per image")
        self._record_start()
        print_and_log(f"run: {run_metadata.relative_path(self.run_dir.path)}")

    def _describe_data(self, dataset: Dataset) -> None:
        stored = self._stored_config()
        self.summary |= {"config_hash": config_hash(stored), "data_fingerprint": dataset.fingerprint}
        stored["data"]["fingerprint"] = dataset.fingerprint
        self.run_dir.write_yaml("config.yaml", stored)
        source = descriptions.data_source(stored["data"])
        self.run_dir.write_json("dataset.json", descriptions.describe_data(dataset, source))
        write_atomically(self.run_dir.path / "input_example.npy", descriptions.input_example(dataset))

    def _describe_model(self, model: keras.Model, inference: keras.Model) -> None:
        cost = descriptions.describe_cost(model, inference)
        self.summary |= descriptions.summarize_model(model, inference, cost)
        self.run_dir.write_json("cost.json", cost)
        self.run_dir.write_text("model_summary.txt", descriptions.describe_layers(model))

    def _record_start(self) -> None:
        state = self._state
        assert self.heartbeat is not None
        if state.checkpoint:
            print_and_log(
                f"resuming from checkpoint {state.checkpoint.name} "
                f"(step {state.progress.steps}, attempt {self.heartbeat.attempts})"
            )
            return
        state.log_metrics(0, 0, {f"cost/{name}": self.summary[name] for name in ("parameters", "macs")})
        if self.config.on_divergence == "rollback":
            state.save(state.progress, periodic=True)  # the initial state can be rolled back to, too

    def make_display(self) -> TerminalProgressDisplay:
        return TerminalProgressDisplay(self.config.epochs, self._steps_per_epoch, self.config.batch_size)

    def record_training(self, step: Step) -> None:
        assert self.heartbeat is not None
        changes = self.run_dir.identity()["changes"]
        self.summary |= descriptions.summarize_training(self._state.progress)
        self.summary |= {
            "steps_executed": self.heartbeat.steps,
            "attempts": self.heartbeat.attempts,
            "changes": [f"{change['name']} was {change['was']}, is {change['is']}" for change in changes],
            "checkpoint_stall_seconds": self._state.checkpoints.stall_seconds,
            "peak_memory_bytes": setup.peak_memory_bytes(self.config.backend),
        }
        self.summary["weights_sha256"] = step.weights_sha256()  # raises if another process is lost, so it comes last

    def record_end_of_training(self) -> None:
        progress = self._state.progress
        rule = self.config.early_stopping
        if progress.stopped_early:
            patience = f"{rule.patience_epochs} epoch{'' if rule.patience_epochs == 1 else 's'}"
            print_and_log(f"stopped early: {rule.metric} has not improved for {patience}")
        print_and_log(input_bound_warning(progress.timer.data_wait_fraction()))
        self._log_final_metrics({"cost/peak_memory_bytes": self.summary["peak_memory_bytes"]})

    def _log_final_metrics(self, values: dict[str, float]) -> None:
        progress = self._state.progress
        self._state.log_metrics(progress.epoch - 1, progress.steps, values)

    def record_test(self, metrics: JsonObject) -> None:
        self.summary["test"] = metrics
        self._log_final_metrics({f"test/{name}": metrics[name] for name in ("accuracy", "top5_accuracy", "loss")})

    def close(self, ending: JsonObject, exit_code: int) -> int:
        self.summary |= ending
        if self.heartbeat is None:  # rejected before it changed anything
            return exit_code
        write_error_code = run_metadata.write_summary(self.run_dir, self.summary)
        self.heartbeat.close()
        return exit_code or write_error_code

    def finish(self, exit_code: int, upload_seconds: float) -> None:
        is_interrupted = exit_code > 128
        if self.heartbeat is None:
            print_and_log("stopped before training; the run folder is unchanged" if is_interrupted else "")
            return
        print_and_log("MLflow: finishing the upload")
        uploader.wait(self._uploader, self.run_dir, self._tracking_uri(), upload_seconds)
        path = run_metadata.quote_path(self.run_dir.path)
        print_and_log(f"to continue: make resume run={path}" if is_interrupted else "")
        print_and_log(run_metadata.format_summary(self.summary, self.run_dir))


def input_bound_warning(wait_fraction: float) -> str:
    """Advice for a run that spent much of its time waiting for data, or an empty string."""
    if wait_fraction < INPUT_BOUND_FRACTION:
        return ""
    return (
        f"training was input-bound ({wait_fraction:.0%} of the time waiting for data); try a larger "
        "data.ram_budget, data.cache=disk, a cheaper augment, smaller files, or more processor cores"
    )
