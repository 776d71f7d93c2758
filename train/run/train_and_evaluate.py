"""The story of a training run: config -> data -> model -> loop -> evaluate -> record."""

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
from train.training import loop

log = logging.getLogger(__name__)

INPUT_BOUND_FRACTION = 0.05
INTERRUPTED_UPLOAD_SECONDS = 4.0  # how long a stopped run waits for its record; whoever stopped it wants to go


class TrialPausedError(Exception):
    """A trial has come to the epoch where its sweep compares it with others."""


@dataclass
class RunSession:
    """One process's share of a run. A run that is killed has several.

    `private`: what of the config must not be written down. `accepted`: what may differ from the life before.
    `begun`: whether anything of this life is written down; one that is refused leaves the folder as it was.
    """

    folder: RunDir
    config: Config
    redactor: Redactor
    signals: loop.SignalHandler
    accepted_changes: frozenset[str] = frozenset()
    summary: dict[str, Any] = field(default_factory=dict)
    uploader_process: subprocess.Popen | None = None
    started: bool = False
    heartbeat: Heartbeat = field(init=False)
    process_group: ProcessGroup = field(init=False)

    def __post_init__(self) -> None:
        self.process_group = ProcessGroup.from_config(self.config)

    def start(self, config_changes: list[dict[str, Any]]) -> None:
        """The folder says from now on that the run is alive, and MLflow hears of it."""
        self.started = True
        self.heartbeat = Heartbeat(self.folder.path / "heartbeat")
        run_metadata.write_run_json(self.folder, self.config, self.redactor, config_changes)
        self.uploader_process = uploader.start(self.folder, self.config.tracking.uri or uploader.default_uri(ROOT))


def train(config: Config, redactor: Redactor, *, latest: bool = True) -> int:
    """A new run; returns the exit code. `latest`: whether runs/latest shall point here."""
    return run_session(
        create_run_dir(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest), config, redactor
    )


def run_session(
    folder: RunDir, config: Config, redactor: Redactor, accepted_changes: frozenset[str] = frozenset()
) -> int:
    """Tells the story, from the start or from the last checkpoint, and leaves a summary whatever happens."""
    with folder.locked(), run_metadata.log_to_file(folder), loop.SignalHandler().installed() as stops:
        life = RunSession(
            folder, config, redactor, stops, accepted_changes, run_metadata.initial_summary(folder, config)
        )
        patience, by_all = config.tracking.wait_seconds, False
        try:
            train_and_evaluate(life)
            life.summary["status"], code, by_all = "finished", 0, True
        except TrialPausedError as pause:
            life.summary |= {"status": "interrupted", "failure": str(pause)}
            code = 0
        except loop.Interrupted as stop:
            life.summary |= {"status": "interrupted", "failure": str(stop)}
            code, patience = (
                128 + stop.signal_number,
                0 if stop.immediate else min(patience, INTERRUPTED_UPLOAD_SECONDS),
            )
            by_all = stop.all_processes
        except Exception as fault:
            life.summary |= {"status": "failed", "failure": redactor.redact(f"{type(fault).__name__}: {fault}")}
            life.summary["config_error"] = isinstance(fault, ConfigError)
            code = run_metadata.report_failure(fault, folder, redactor)
            patience = 0 if isinstance(fault, WorkerLostError) else patience  # JAX may end the process before long
        if not life.started:
            print_and_log("nothing was changed in the run" if code > 128 else "")
            return life.process_group.shutdown(code, all_processes=False)
        with stops.deferred():
            unwritten = run_metadata.write_summary(folder, life.summary)
            life.heartbeat.close()
        print_and_log("record: completing it in MLflow")
        uploader.wait(life.uploader_process, folder, config.tracking.uri or uploader.default_uri(ROOT), patience)
        print_and_log(f"to go on: make resume run={run_metadata.quote_path(folder.path)}" if code > 128 else "")
        print_and_log(run_metadata.format_summary(life.summary, folder))
        return life.process_group.shutdown(code or unwritten or stops.exit_code(), all_processes=by_all)


def run_worker(config: Config, redactor: Redactor) -> int:
    """The part of a process that does not lead a run; returns the exit code. It writes nothing."""
    with loop.SignalHandler().installed() as stops:
        team, by_all = ProcessGroup.from_config(config), False
        try:
            train_as_worker(config, redactor, stops, team)
            code, by_all = stops.exit_code(), True
        except loop.Interrupted as stop:
            code, by_all = 128 + stop.signal_number, stop.all_processes
        except Exception as fault:
            code = run_metadata.report_failure(fault, None, redactor)
        with stops.deferred():  # process 0 still has to test and to write
            return team.shutdown(code, all_processes=by_all) or stops.exit_code()


def train_as_worker(
    config: Config, redactor: Redactor, signals: loop.SignalHandler, process_group: ProcessGroup
) -> None:
    """Of the story what all processes of a run do."""
    config, _ = setup.prepare(config, Path(os.devnull))
    print_and_log(f"process {process_group.index} of {process_group.size}: process 0 tells the story")
    augmentation = factory.make_augmentation(config)
    dataset, _ = factory.load_data(config, crops=augmentation.random_resized_crop is not None)
    signals.raise_if_requested()
    steps = factory.steps_per_epoch(config, dataset)
    model, inference = factory.make_models(config, dataset)
    teacher = factory.load_teacher(config, dataset)
    step = factory.make_training_step(config, model, inference, steps, teacher)
    signals.raise_if_requested()
    with process_group.translate_connection_errors(), factory.surface_example_errors():
        process_group.verify_same_config(factory.run_provenance(config, redactor, dataset, teacher))
        keeper = WorkerState(config, step, process_group)
        keeper.receive_state()
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps)
        fit(config, signals, dataset, batches, steps, step, keeper, NoProgressDisplay)


def train_and_evaluate(session: RunSession) -> None:
    """The story itself; fills the life's summary as it goes, so that it is true at any moment."""
    folder, stops, summary = session.folder, session.signals, session.summary
    fresh = not (folder.path / "run.json").exists()
    if fresh:
        session.start([])
    fault_injection.fail_point("life/begun")
    session.config, notes = setup.prepare(session.config, folder.path / "train.log")
    config = session.config
    if fresh:
        run_metadata.write_resolved_config(folder, config, session.redactor)
    fault_injection.fail_point("life/settled")
    print_and_log(*notes)
    stops.raise_if_requested()  # here and below: libraries may swallow what a signal raises while they are loaded

    augmentation = factory.make_augmentation(config)
    dataset, where = factory.load_data(config, crops=augmentation.random_resized_crop is not None)
    stops.raise_if_requested()
    if fresh:
        factory.check_fingerprint(config, dataset)
    steps = factory.steps_per_epoch(config, dataset)
    print_and_log(
        f"data: {dataset.name}, {len(dataset.classes)} classes, {factory.split_sizes(dataset)} examples",
        *dataset.notes,
        factory.epoch_message(config, dataset, steps),
        where,
    )

    model, inference = factory.make_models(config, dataset)
    teacher = factory.load_teacher(config, dataset)
    step = factory.make_training_step(config, model, inference, steps, teacher)
    stops.raise_if_requested()
    with (
        session.process_group.translate_connection_errors(),
        closing(RunState(folder, config, step, inference, dataset, session.process_group)) as keeper,
    ):
        ground = session.process_group.verify_same_config(
            factory.run_provenance(config, session.redactor, dataset, teacher)
        )
        changes = [] if fresh else keeper.config_changes(ground, session.accepted_changes)
        keeper.restore(len(folder.identity()["changes"]) + len(changes))
        if not fresh:
            session.start(changes)
        keeper.begin_attempt(ground, session.heartbeat)
        run_metadata.write_metadata(
            folder, summary, config, session.redactor, dataset, factory.data_source(config, session.redactor),
            model, inference, factory.compute_cost(model, inference),
        )  # fmt: skip
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps)
        if fresh:
            run_metadata.write_batch_image(
                folder, next(iter(batches(0, 0)))[0].numpy(), augmentation.mixup_cutmix is not None
            )
        size = f"{summary['parameters']:,} parameters, {summary['macs']:,} multiply-accumulates per image"
        print_and_log(f"model: {model.name}, {size}")
        if keeper.checkpoint:
            print_and_log(
                f"going on: life {session.heartbeat.attempts}, from {keeper.checkpoint.name}, "
                f"step {keeper.progress.steps}"
            )
        else:
            keeper.log_metrics(0, 0, {f"cost/{name}": summary[name] for name in ("parameters", "macs")})
            if config.on_divergence == "rollback":
                keeper.save(keeper.progress, periodic=True)  # the start is good, too
        print_and_log(f"run: {run_metadata.relative_path(folder.path)}")

        keeper.broadcast_state()
        watch = functools.partial(TerminalProgressDisplay, config.epochs, steps, config.batch_size)
        with factory.surface_example_errors():
            try:
                fit(config, stops, dataset, batches, steps, step, keeper, watch)
            finally:
                run_metadata.update_summary(
                    summary, step, keeper, session.heartbeat, setup.peak_memory_bytes(config.backend)
                )

            progress = keeper.progress
            if progress.epoch < config.epochs and not progress.stopped_early:
                raise TrialPausedError(f"paused after epoch {progress.epoch} of {config.epochs}")
            if progress.stopped_early:
                rule = config.early_stopping
                print_and_log(f"stopped early: {rule.metric} has not improved for {rule.patience_epochs} epochs")
            print_and_log(input_bound_warning(progress.timer.data_wait_fraction()))
            keeper.log_metrics(
                progress.epoch - 1, progress.steps, {"cost/peak_memory_bytes": summary["peak_memory_bytes"]}
            )
            if config.evaluate.test:
                print_and_log("test: the best weights, on a split that chose nothing")
                summary["test"] = evaluate_best(session, dataset, dataset.test)
                found = {f"test/{name}": summary["test"][name] for name in ("accuracy", "top5_accuracy", "loss")}
                keeper.log_metrics(progress.epoch - 1, progress.steps, found)
            if config.evaluate.report:
                print_and_log("report: what there is to see, in report.html")
                if not config.evaluate.test:
                    evaluate_best(session, dataset, dataset.validation)
                write_report(session)


# -------------------------------------------------------------------------------------------------- the story's parts


def fit(
    config: Config,
    signals: loop.SignalHandler,
    dataset: Any,
    batches: Callable,
    steps: int,
    step: Any,
    run_state: RunState | WorkerState,
    make_display: Callable,
) -> None:
    """The loop, with everything it calls tied to this run; again from the last checkpoint where the config says so."""

    def validate() -> dict[str, float]:
        with step.using_ema_weights():
            found = factory.evaluate_split(config, dataset, dataset.validation, step.predict, signals)
        return {name: found[name] for name in ("loss", "accuracy", "top5_accuracy")}

    while True:
        with make_display() as watching, signals.synchronized(step):
            training = loop.Loop(
                step=step,
                progress=run_state.progress,
                epochs=min(config.sweep.until or config.epochs, config.epochs),
                steps_per_epoch=steps,
                batch_size=config.batch_size,
                log_every=config.tracking.every_steps,
                batches=batches,
                validate=validate,
                callbacks=run_state,
                early_stopping=loop.EarlyStopping(**vars(config.early_stopping)),
                display=watching,
                signals=signals,
            )
            try:
                training.run()
            except loop.DivergedError as fault:
                run_state.roll_back(fault)
                print_and_log(
                    f"warning: {fault}; going on from step {run_state.progress.steps}, "
                    f"learning rate x {step.lr_scale():g}"
                )
            else:
                return


def input_bound_warning(wait_fraction: float) -> str:
    """A sentence for a run that waited for its data, and what to do about it."""
    if wait_fraction < INPUT_BOUND_FRACTION:
        return ""
    return (
        f"the input bound this run: {wait_fraction:.0%} of the training time was spent waiting for data; use a larger "
        "data.ram_budget, data.cache=disk, a cheaper augment, smaller files, or more processor cores"
    )


def evaluate_best(session: RunSession, dataset: Any, split: Any) -> dict[str, Any]:
    """The best weights on a split, measured and written down; what of it belongs into a summary."""
    from train.evaluation import results

    place = session.folder.path / "evaluation" / split.name
    model, predict = factory.load_best(session.folder, session.config)
    outcome = results.ClassificationResult(
        *factory.predict_split(session.config, split, len(dataset.classes), predict, session.signals), dataset.classes
    )
    found = results.write_results(place, split, outcome)
    if session.config.evaluate.report:
        with best_effort(session, "pictures"):
            results.write_plots(place, split, outcome, found, model)
            results.write_filters_plot(session.folder.path, model)
    return {name: found[name] for name in results.SUMMARY_METRICS}


def write_report(session: RunSession) -> None:
    """The run on one page."""
    from train.evaluation import report

    with best_effort(session, "report"):
        report.write_report(session.folder, session.summary | {"status": "finished"})


@contextmanager
def best_effort(session: RunSession, what: str) -> Iterator[None]:
    """A run that has its numbers does not fail for want of pictures; that they are missing is told."""
    try:
        yield
    except Exception as fault:
        log.exception("no %s", what)
        path = run_metadata.quote_path(session.folder.path)
        print_and_log(
            f"warning: the {what} could not be made ({type(fault).__name__}: {fault}); later: make report run={path}"
        )
