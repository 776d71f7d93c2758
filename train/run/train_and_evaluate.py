"""The story of a training run: config, data, model, training step, loop, evaluation, report.

Every process of a run goes through it. They differ in their recorder: that of process 0 writes the run folder and
prints, that of any other process does neither. `train.run.lifecycle` is what surrounds the story.
"""

# A resumed run reproduces the bits of an uninterrupted one, and several processes those of each other, only if these
# operations keep their order:
#
#   1. a new run is marked as started before anything can fail; a resumed one only once its changes are accepted (7),
#      so that a rejected attempt leaves the folder unchanged
#   2. device, precision and determinism are set, and `auto` is resolved and stored, before Keras builds anything
#   3. the seed is set directly before the model is built: only its initial weights come from Keras's global generator
#   4. the training step comes last: it creates the variables of optimizer and metrics, which checkpoints hold by name
#   5. all processes compare config, data and code before they exchange any state
#   6. process 0 compares them with its latest checkpoint before it loads it
#   7. the attempt is recorded, and only then does process 0 send its state to all
#   8. the loop trains (its own order is in training/loop.py); whatever ends it, the summary gets its figures
#   9. the test split is evaluated with best/ as read from disk, never with the weights in memory

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from train.cli.progress import print_and_log
from train.config.schema import Config
from train.config.serialization import Redactor
from train.distributed.process_group import ProcessGroup
from train.run import best_model, factory
from train.run.recorder import Recorder, RunRecorder
from train.run.state import TrainingState
from train.training.early_stopping import EarlyStopping
from train.training.loop import DivergedError, Loop
from train.training.signals import SignalHandler

if TYPE_CHECKING:  # Keras and TensorFlow are imported by prepare_runtime, once their settings are known
    from train.data.dataset import Dataset
    from train.training.step.base import Step


class TrialPausedError(Exception):
    """A trial has reached the epoch at which its sweep compares it with other trials."""


@dataclass(frozen=True)
class RunSession:
    """What a process needs for an attempt at a run; a run that was killed and resumed has had several attempts.

    `redactor` hides the secrets of the config.
    """

    config: Config
    redactor: Redactor
    signals: SignalHandler
    process_group: ProcessGroup
    recorder: Recorder


def train_and_evaluate(session: RunSession) -> None:
    """Trains from the start or from the latest checkpoint, evaluates the best weights and writes the report.

    Raises: Interrupted after a signal; TrialPausedError; DivergedError; ValueError for input that cannot be trained on.
    """
    signals = session.signals
    recorder = session.recorder
    process_group = session.process_group
    recorder.begin()
    config, messages = factory.prepare_runtime(session.config, recorder.library_log)
    recorder.record_config(config, messages)
    signals.raise_if_requested()  # here and below: libraries may swallow what a signal raises while they are loaded

    augmentation = factory.make_augmentation(config)
    dataset, cache_message = factory.load_data(config, crops=augmentation.random_resized_crop is not None)
    signals.raise_if_requested()
    steps_per_epoch = factory.steps_per_epoch(config, dataset)
    batches = partial(factory.train_batches, config, dataset, augmentation, steps_per_epoch)
    recorder.record_data(dataset, steps_per_epoch, cache_message)

    model, inference = factory.make_models(config, dataset)
    teacher = factory.load_teacher(config, dataset)
    step = factory.make_training_step(config, model, inference, steps_per_epoch, teacher)
    signals.raise_if_requested()

    with (
        process_group.translate_connection_errors(),
        closing(recorder.open_state(step, inference, dataset, process_group)) as state,
    ):
        provenance = factory.collect_provenance(config, session.redactor, dataset, teacher)
        state.restore(process_group.verify_same_config(provenance))
        recorder.begin_attempt(model, inference, dataset, batches)
        state.synchronize()
        try:
            fit(config, signals, recorder, dataset, batches, steps_per_epoch, step, state)
        finally:
            recorder.record_training(step)
        if state.progress.epoch < config.epochs and not state.progress.stopped_early:
            raise TrialPausedError(f"paused after epoch {state.progress.epoch} of {config.epochs}")
        recorder.record_end_of_training()
        if isinstance(recorder, RunRecorder):  # the best weights are in its run folder
            best_model.evaluate_and_report(config, signals, recorder, dataset)


def fit(
    config: Config,
    signals: SignalHandler,
    recorder: Recorder,
    dataset: Dataset,
    batches: factory.Batches,
    steps_per_epoch: int,
    step: Step,
    state: TrainingState,
) -> None:
    """Runs the training loop; after a divergence again from an earlier state, if the config says so."""

    def validate() -> dict[str, float]:
        with step.using_ema_weights():
            metrics = factory.evaluate_split(config, dataset, dataset.validation, step.predict, signals)
        return {name: metrics[name] for name in ("loss", "accuracy", "top5_accuracy")}

    while True:
        with recorder.make_display() as display, signals.synchronized(step):
            loop = Loop(
                step=step,
                progress=state.progress,
                epochs=min(config.sweep.until or config.epochs, config.epochs),
                steps_per_epoch=steps_per_epoch,
                batch_size=config.batch_size,
                log_every=config.tracking.every_steps,
                batches=batches,
                validate=validate,
                callbacks=state,
                early_stopping=EarlyStopping(**vars(config.early_stopping)),
                display=display,
                signals=signals,
            )
            try:
                return loop.run()
            except DivergedError as error:
                state.roll_back(error)
                print_and_log(
                    f"warning: {error}; rolled back to step {state.progress.steps}, learning rate x {step.lr_scale():g}"
                )
