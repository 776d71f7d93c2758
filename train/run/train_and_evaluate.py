"""A training run from start to end: config, data, model, training loop, evaluation, report, MLflow record."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.cli.progress import NoProgressDisplay, TerminalProgressDisplay, print_and_log
from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import Redactor
from train.distributed.process_group import ProcessGroup, WorkerLostError
from train.run import factory
from train.run.state import RunState, WorkerState
from train.runtime import setup
from train.storage import fault_injection
from train.tracking import run_metadata, uploader
from train.tracking.run_dir import Heartbeat, RunDir, create_run_dir
from train.training.early_stopping import EarlyStopping
from train.training.loop import DivergedError, Loop
from train.training.signals import Interrupted, SignalHandler

log = logging.getLogger(__name__)

INPUT_BOUND_FRACTION = 0.05
INTERRUPTED_UPLOAD_SECONDS = 4.0  # a stopped run waits no longer than this for its upload, so that it exits soon


class TrialPausedError(Exception):
    """A trial has reached the epoch at which its sweep compares it with other trials."""


@dataclass
class RunSession:
    """One process's attempt at a run; a run that was killed and resumed has several.

    `redactor` hides the secrets of the config. `accepted_changes`: config keys that may differ from the previous
    attempt. `started`: whether this attempt has written anything; one that is rejected leaves the folder unchanged.
    """

    run_dir: RunDir
    config: Config
    redactor: Redactor
    signals: SignalHandler
    accepted_changes: frozenset[str] = frozenset()
    summary: dict[str, Any] = field(default_factory=dict)
    uploader_process: subprocess.Popen | None = None
    started: bool = False
    heartbeat: Heartbeat = field(init=False)
    process_group: ProcessGroup = field(init=False)

    def __post_init__(self) -> None:
        self.process_group = ProcessGroup.from_config(self.config)

    def start(self, config_changes: list[dict[str, Any]]) -> None:
        """Marks the run as running in its folder, and starts the upload to MLflow."""
        self.started = True
        self.heartbeat = Heartbeat(self.run_dir.path / "heartbeat")
        run_metadata.write_run_json(self.run_dir, self.config, self.redactor, config_changes)
        self.uploader_process = uploader.start(self.run_dir, self.config.tracking.uri or uploader.default_uri(ROOT))


def train(config: Config, redactor: Redactor, *, latest: bool = True) -> int:
    """Starts a new run; returns the exit code. `latest`: whether runs/latest shall point to it."""
    run_dir = create_run_dir(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest)
    return run_session(run_dir, config, redactor)


def run_session(
    run_dir: RunDir, config: Config, redactor: Redactor, accepted_changes: frozenset[str] = frozenset()
) -> int:
    """Runs from the start or from the latest checkpoint, and writes a summary whatever happens; the exit code."""
    with run_dir.locked(), run_metadata.log_to_file(run_dir), SignalHandler().installed() as signals:
        summary = run_metadata.initial_summary(run_dir, config)
        session = RunSession(run_dir, config, redactor, signals, accepted_changes, summary)
        upload_seconds = config.tracking.wait_seconds
        all_processes = False
        try:
            train_and_evaluate(session)
            session.summary["status"] = "finished"
            code = 0
            all_processes = True
        except TrialPausedError as pause:
            session.summary |= {"status": "interrupted", "failure": str(pause)}
            code = 0
        except Interrupted as interruption:
            session.summary |= {"status": "interrupted", "failure": str(interruption)}
            code = 128 + interruption.signal_number
            upload_seconds = 0 if interruption.immediate else min(upload_seconds, INTERRUPTED_UPLOAD_SECONDS)
            all_processes = interruption.all_processes
        except Exception as error:
            session.summary |= {"status": "failed", "failure": redactor.redact(f"{type(error).__name__}: {error}")}
            session.summary["config_error"] = isinstance(error, ConfigError)
            code = run_metadata.report_failure(error, run_dir, redactor)
            if isinstance(error, WorkerLostError):  # JAX may end this process soon
                upload_seconds = 0
        if not session.started:
            print_and_log("stopped before training; the run folder is unchanged" if code > 128 else "")
            return session.process_group.shutdown(code, all_processes=False)
        with signals.deferred():
            write_error_code = run_metadata.write_summary(run_dir, session.summary)
            session.heartbeat.close()
        print_and_log("MLflow: finishing the upload")
        uploader.wait(
            session.uploader_process, run_dir, config.tracking.uri or uploader.default_uri(ROOT), upload_seconds
        )
        print_and_log(f"to continue: make resume run={run_metadata.quote_path(run_dir.path)}" if code > 128 else "")
        print_and_log(run_metadata.format_summary(session.summary, run_dir))
        code = code or write_error_code or signals.exit_code()
        return session.process_group.shutdown(code, all_processes=all_processes)


def run_worker(config: Config, redactor: Redactor) -> int:
    """Runs a process other than process 0 of a run, which writes no files; returns the exit code."""
    with SignalHandler().installed() as signals:
        process_group = ProcessGroup.from_config(config)
        all_processes = False
        try:
            train_as_worker(config, redactor, signals, process_group)
            code = signals.exit_code()
            all_processes = True
        except Interrupted as interruption:
            code = 128 + interruption.signal_number
            all_processes = interruption.all_processes
        except Exception as error:
            code = run_metadata.report_failure(error, None, redactor)
        with signals.deferred():  # process 0 still has to test and to write
            return process_group.shutdown(code, all_processes=all_processes) or signals.exit_code()


def train_as_worker(config: Config, redactor: Redactor, signals: SignalHandler, process_group: ProcessGroup) -> None:
    """The part of a run that every process takes part in: training and validation."""
    config, _ = setup.prepare(config, Path(os.devnull))
    print_and_log(f"worker {process_group.index} of {process_group.size} started; progress is printed by process 0")
    augmentation = factory.make_augmentation(config)
    dataset, _ = factory.load_data(config, crops=augmentation.random_resized_crop is not None)
    signals.raise_if_requested()
    steps_per_epoch = factory.steps_per_epoch(config, dataset)
    model, inference = factory.make_models(config, dataset)
    teacher = factory.load_teacher(config, dataset)
    step = factory.make_training_step(config, model, inference, steps_per_epoch, teacher)
    signals.raise_if_requested()
    with process_group.translate_connection_errors():
        process_group.verify_same_config(factory.collect_provenance(config, redactor, dataset, teacher))
        worker_state = WorkerState(config, step, process_group)
        worker_state.receive_state()
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps_per_epoch)
        fit(config, signals, dataset, batches, steps_per_epoch, step, worker_state, NoProgressDisplay)


def train_and_evaluate(session: RunSession) -> None:
    """Prepares, trains, tests and reports; fills the session's summary as it goes, so that it is always up to date."""
    run_dir, signals, summary = session.run_dir, session.signals, session.summary
    is_new = not (run_dir.path / "run.json").exists()
    if is_new:
        session.start([])
    fault_injection.fail_point("life/begun")
    session.config, notes = setup.prepare(session.config, run_dir.path / "train.log")
    config = session.config
    if is_new:
        run_metadata.write_resolved_config(run_dir, config, session.redactor)
    fault_injection.fail_point("life/settled")
    print_and_log(*notes)
    signals.raise_if_requested()  # here and below: libraries may swallow what a signal raises while they are loaded

    augmentation = factory.make_augmentation(config)
    dataset, cache_note = factory.load_data(config, crops=augmentation.random_resized_crop is not None)
    signals.raise_if_requested()
    if is_new:
        factory.check_fingerprint(config, dataset)
    steps_per_epoch = factory.steps_per_epoch(config, dataset)
    print_and_log(
        f"data: {dataset.name}, {len(dataset.classes)} classes, {factory.split_sizes(dataset)} examples",
        *dataset.notes,
        factory.epoch_message(config, dataset, steps_per_epoch),
        cache_note,
    )

    model, inference = factory.make_models(config, dataset)
    teacher = factory.load_teacher(config, dataset)
    step = factory.make_training_step(config, model, inference, steps_per_epoch, teacher)
    signals.raise_if_requested()
    with (
        session.process_group.translate_connection_errors(),
        closing(RunState(run_dir, config, step, inference, dataset, session.process_group)) as run_state,
    ):
        provenance = session.process_group.verify_same_config(
            factory.collect_provenance(config, session.redactor, dataset, teacher)
        )
        changes = [] if is_new else run_state.config_changes(provenance, session.accepted_changes)
        run_state.restore(len(run_dir.identity()["changes"]) + len(changes))
        if not is_new:
            session.start(changes)
        run_state.begin_attempt(provenance, session.heartbeat)
        run_metadata.write_data_and_model_files(
            run_dir, summary, config, session.redactor, dataset, factory.data_source(config, session.redactor),
            model, inference, factory.compute_cost(model, inference),
        )  # fmt: skip
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps_per_epoch)
        if is_new:
            first_images = next(iter(batches(0, 0)))[0].numpy()
            run_metadata.write_batch_image(run_dir, first_images, augmentation.mixup_cutmix is not None)
        size = f"{summary['parameters']:,} parameters, {summary['macs']:,} multiply-accumulates per image"
        print_and_log(f"model: {model.name}, {size}")
        if run_state.checkpoint:
            print_and_log(
                f"resuming from checkpoint {run_state.checkpoint.name} "
                f"(step {run_state.progress.steps}, attempt {session.heartbeat.attempts})"
            )
        else:
            run_state.log_metrics(0, 0, {f"cost/{name}": summary[name] for name in ("parameters", "macs")})
            if config.on_divergence == "rollback":
                run_state.save(run_state.progress, periodic=True)  # the initial state can be rolled back to, too
        print_and_log(f"run: {run_metadata.relative_path(run_dir.path)}")

        run_state.broadcast_state()
        make_display = functools.partial(TerminalProgressDisplay, config.epochs, steps_per_epoch, config.batch_size)
        try:
            fit(config, signals, dataset, batches, steps_per_epoch, step, run_state, make_display)
        finally:
            peak_memory_bytes = setup.peak_memory_bytes(config.backend)
            run_metadata.update_summary(summary, step, run_state, session.heartbeat, peak_memory_bytes)

        progress = run_state.progress
        last_epoch = progress.epoch - 1
        if progress.epoch < config.epochs and not progress.stopped_early:
            raise TrialPausedError(f"paused after epoch {progress.epoch} of {config.epochs}")
        if progress.stopped_early:
            rule = config.early_stopping
            patience = f"{rule.patience_epochs} epoch{'' if rule.patience_epochs == 1 else 's'}"
            print_and_log(f"stopped early: {rule.metric} has not improved for {patience}")
        print_and_log(input_bound_warning(progress.timer.data_wait_fraction()))
        run_state.log_metrics(last_epoch, progress.steps, {"cost/peak_memory_bytes": summary["peak_memory_bytes"]})
        if config.evaluate.test:
            print_and_log("test: evaluating the best checkpoint on the held-out test split")
            summary["test"] = evaluate_best(session, dataset, dataset.test)
            test_metrics = {f"test/{name}": summary["test"][name] for name in ("accuracy", "top5_accuracy", "loss")}
            run_state.log_metrics(last_epoch, progress.steps, test_metrics)
        if config.evaluate.report:
            if not config.evaluate.test:
                evaluate_best(session, dataset, dataset.validation)
            write_report(session)


# ------------------------------------------------------------------------------------------------- parts of the above


def fit(
    config: Config,
    signals: SignalHandler,
    dataset: Any,
    batches: Callable,
    steps_per_epoch: int,
    step: Any,
    run_state: RunState | WorkerState,
    make_display: Callable,
) -> None:
    """Runs the training loop; after a divergence again from the latest checkpoint, if the config says so."""

    def validate() -> dict[str, float]:
        with step.using_ema_weights():
            metrics = factory.evaluate_split(config, dataset, dataset.validation, step.predict, signals)
        return {name: metrics[name] for name in ("loss", "accuracy", "top5_accuracy")}

    while True:
        with make_display() as display, signals.synchronized(step):
            loop = Loop(
                step=step,
                progress=run_state.progress,
                epochs=min(config.sweep.until or config.epochs, config.epochs),
                steps_per_epoch=steps_per_epoch,
                batch_size=config.batch_size,
                log_every=config.tracking.every_steps,
                batches=batches,
                validate=validate,
                callbacks=run_state,
                early_stopping=EarlyStopping(**vars(config.early_stopping)),
                display=display,
                signals=signals,
            )
            try:
                loop.run()
            except DivergedError as error:
                run_state.roll_back(error)
                print_and_log(
                    f"warning: {error}; rolled back to step {run_state.progress.steps}, "
                    f"learning rate x {step.lr_scale():g}"
                )
            else:
                return


def input_bound_warning(wait_fraction: float) -> str:
    """Advice for a run that spent much of its time waiting for data, or an empty string."""
    if wait_fraction < INPUT_BOUND_FRACTION:
        return ""
    return (
        f"training was input-bound ({wait_fraction:.0%} of the time waiting for data); try a larger "
        "data.ram_budget, data.cache=disk, a cheaper augment, smaller files, or more processor cores"
    )


def evaluate_best(session: RunSession, dataset: Any, split: Any) -> dict[str, Any]:
    """Evaluates the best weights on a split and writes the results; returns the metrics that go into a summary."""
    from train.evaluation import results

    output_dir = session.run_dir.path / "evaluation" / split.name
    model, predict = factory.load_best(session.run_dir, session.config)
    result = results.ClassificationResult(
        *factory.predict_split(session.config, split, len(dataset.classes), predict, session.signals), dataset.classes
    )
    metrics = results.write_results(output_dir, split, result)
    if session.config.evaluate.report:
        with best_effort(session, "draw the plots"):
            results.write_plots(output_dir, split, result, metrics, model)
            results.write_filters_plot(session.run_dir.path, model)
    return {name: metrics[name] for name in results.SUMMARY_METRICS}


def write_report(session: RunSession) -> None:
    """Writes report.html."""
    from train.evaluation import report

    with best_effort(session, "write the report"):
        report.write_report(session.run_dir, session.summary | {"status": "finished"})
        print_and_log("report: written to report.html")


@contextmanager
def best_effort(session: RunSession, action: str) -> Iterator[None]:
    """Turns an error into a warning: a run that has its numbers does not fail for lack of plots."""
    try:
        yield
    except Exception as error:
        log.exception("could not %s", action)
        path = run_metadata.quote_path(session.run_dir.path)
        print_and_log(
            f"warning: could not {action} ({type(error).__name__}: {error}); retry with: make report run={path}"
        )
