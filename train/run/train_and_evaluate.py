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

from train.cli.progress import Quiet, Terminal, say
from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import Private
from train.distributed.process_group import LostError, Team
from train.run import factory
from train.run.state import Follower, Keeper
from train.runtime import setup
from train.storage import fault_injection
from train.tracking import run_metadata, uploader
from train.tracking.run_dir import Pulse, RunFolder, create
from train.training import loop

log = logging.getLogger(__name__)

MUCH_WAITING = 0.05
STOPPED_WAIT_SECONDS = 4.0  # how long a stopped run waits for its record; whoever stopped it wants to go


class PausedError(Exception):
    """A trial has come to the epoch where its sweep compares it with others."""


@dataclass
class Life:
    """One process's share of a run. A run that is killed has several.

    `private`: what of the config must not be written down. `accepted`: what may differ from the life before.
    `begun`: whether anything of this life is written down; one that is refused leaves the folder as it was.
    """

    folder: RunFolder
    config: Config
    private: Private
    stops: loop.Stops
    accepted: frozenset[str] = frozenset()
    summary: dict[str, Any] = field(default_factory=dict)
    recorder: subprocess.Popen | None = None
    begun: bool = False
    pulse: Pulse = field(init=False)
    team: Team = field(init=False)

    def __post_init__(self) -> None:
        self.team = Team.of(self.config)

    def begin(self, changes: list[dict[str, Any]]) -> None:
        """The folder says from now on that the run is alive, and MLflow hears of it."""
        self.begun = True
        self.pulse = Pulse(self.folder.path / "heartbeat")
        run_metadata.identify(self.folder, self.config, self.private, changes)
        self.recorder = uploader.start(self.folder, self.config.tracking.uri or uploader.default_uri(ROOT))


def train(config: Config, private: Private, *, latest: bool = True) -> int:
    """A new run; returns the exit code. `latest`: whether runs/latest shall point here."""
    return live(create(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest), config, private)


def live(folder: RunFolder, config: Config, private: Private, accepted: frozenset[str] = frozenset()) -> int:
    """Tells the story, from the start or from the last checkpoint, and leaves a summary whatever happens."""
    with folder.held(), run_metadata.log_file(folder), loop.Stops().listening() as stops:
        life = Life(folder, config, private, stops, accepted, run_metadata.begin(folder, config))
        patience, by_all = config.tracking.wait_seconds, False
        try:
            tell(life)
            life.summary["status"], code, by_all = "finished", 0, True
        except PausedError as pause:
            life.summary |= {"status": "interrupted", "failure": str(pause)}
            code = 0
        except loop.Interrupted as stop:
            life.summary |= {"status": "interrupted", "failure": str(stop)}
            code, patience = 128 + stop.number, 0 if stop.at_once else min(patience, STOPPED_WAIT_SECONDS)
            by_all = stop.by_all
        except Exception as fault:
            life.summary |= {"status": "failed", "failure": private.hide(f"{type(fault).__name__}: {fault}")}
            life.summary["config_error"] = isinstance(fault, ConfigError)
            code = run_metadata.report(fault, folder, private)
            patience = 0 if isinstance(fault, LostError) else patience  # JAX may end the process before long
        if not life.begun:
            say("nothing was changed in the run" if code > 128 else "")
            return life.team.leave(code, with_all=False)
        with stops.deferred():
            unwritten = run_metadata.close(folder, life.summary)
            life.pulse.close()
        say("record: completing it in MLflow")
        uploader.wait(life.recorder, folder, config.tracking.uri or uploader.default_uri(ROOT), patience)
        say(f"to go on: make resume run={run_metadata.shell_path(folder.path)}" if code > 128 else "")
        say(run_metadata.one_line(life.summary, folder))
        return life.team.leave(code or unwritten or stops.code(), with_all=by_all)


def follow(config: Config, private: Private) -> int:
    """The part of a process that does not lead a run; returns the exit code. It writes nothing."""
    with loop.Stops().listening() as stops:
        team, by_all = Team.of(config), False
        try:
            compute(config, private, stops, team)
            code, by_all = stops.code(), True
        except loop.Interrupted as stop:
            code, by_all = 128 + stop.number, stop.by_all
        except Exception as fault:
            code = run_metadata.report(fault, None, private)
        with stops.deferred():  # process 0 still has to test and to write
            return team.leave(code, with_all=by_all) or stops.code()


def compute(config: Config, private: Private, stops: loop.Stops, team: Team) -> None:
    """Of the story what all processes of a run do."""
    config, _ = setup.prepare(config, Path(os.devnull))
    say(f"process {team.index} of {team.size}: process 0 tells the story")
    augmentation = factory.augmentation_of(config)
    dataset, _ = factory.load_data(config, crops=augmentation.crop is not None)
    stops.obey()
    steps = factory.steps_of(config, dataset)
    model, inference = factory.network(config, dataset)
    teacher = factory.teacher_of(config, dataset)
    step = factory.training_step(config, model, inference, steps, teacher)
    stops.obey()
    with team.holding(), factory.naming_broken_examples():
        team.agree(factory.ground(config, private, dataset, teacher))
        keeper = Follower(config, step, team)
        keeper.take()
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps)
        fit(config, stops, dataset, batches, steps, step, keeper, Quiet)


def tell(life: Life) -> None:
    """The story itself; fills the life's summary as it goes, so that it is true at any moment."""
    folder, stops, summary = life.folder, life.stops, life.summary
    fresh = not (folder.path / "run.json").exists()
    if fresh:
        life.begin([])
    fault_injection.point("life/begun")
    life.config, notes = setup.prepare(life.config, folder.path / "train.log")
    config = life.config
    if fresh:
        run_metadata.settle(folder, config, life.private)
    fault_injection.point("life/settled")
    say(*notes)
    stops.obey()  # here and below: libraries may swallow what a signal raises while they are loaded

    augmentation = factory.augmentation_of(config)
    dataset, where = factory.load_data(config, crops=augmentation.crop is not None)
    stops.obey()
    if fresh:
        factory.check_fingerprint(config, dataset)
    steps = factory.steps_of(config, dataset)
    say(
        f"data: {dataset.name}, {len(dataset.classes)} classes, {factory.counts(dataset)} examples",
        *dataset.notes,
        factory.left_out(config, dataset, steps),
        where,
    )

    model, inference = factory.network(config, dataset)
    teacher = factory.teacher_of(config, dataset)
    step = factory.training_step(config, model, inference, steps, teacher)
    stops.obey()
    with life.team.holding(), closing(Keeper(folder, config, step, inference, dataset, life.team)) as keeper:
        ground = life.team.agree(factory.ground(config, life.private, dataset, teacher))
        changes = [] if fresh else keeper.changes(ground, life.accepted)
        keeper.go_on(len(folder.identity()["changes"]) + len(changes))
        if not fresh:
            life.begin(changes)
        keeper.begin(ground, life.pulse)
        run_metadata.describe(
            folder, summary, config, life.private, dataset, factory.data_source(config, life.private),
            model, inference, factory.cost_of(model, inference),
        )  # fmt: skip
        batches = functools.partial(factory.train_batches, config, dataset, augmentation, steps)
        if fresh:
            run_metadata.picture(folder, next(iter(batches(0, 0)))[0].numpy(), augmentation.mix is not None)
        size = f"{summary['parameters']:,} parameters, {summary['macs']:,} multiply-accumulates per image"
        say(f"model: {model.name}, {size}")
        if keeper.found:
            say(f"going on: life {life.pulse.lives}, from {keeper.found.name}, step {keeper.progress.steps}")
        else:
            keeper.record(0, 0, {f"cost/{name}": summary[name] for name in ("parameters", "macs")})
            if config.on_divergence == "rollback":
                keeper.save(keeper.progress, planned=True)  # the start is good, too
        say(f"run: {run_metadata.short(folder.path)}")

        keeper.share()
        watch = functools.partial(Terminal, config.epochs, steps, config.batch_size)
        with factory.naming_broken_examples():
            try:
                fit(config, stops, dataset, batches, steps, step, keeper, watch)
            finally:
                run_metadata.progress(summary, step, keeper, life.pulse, setup.peak_memory_bytes(config.backend))

            progress = keeper.progress
            if progress.epoch < config.epochs and not progress.stopped_early:
                raise PausedError(f"paused after epoch {progress.epoch} of {config.epochs}")
            if progress.stopped_early:
                rule = config.early_stopping
                say(f"stopped early: {rule.metric} has not improved for {rule.patience_epochs} epochs")
            say(waiting(progress.clock.data_wait_fraction()))
            keeper.record(progress.epoch - 1, progress.steps, {"cost/peak_memory_bytes": summary["peak_memory_bytes"]})
            if config.evaluate.test:
                say("test: the best weights, on a split that chose nothing")
                summary["test"] = judge(life, dataset, dataset.test)
                found = {f"test/{name}": summary["test"][name] for name in ("accuracy", "top5_accuracy", "loss")}
                keeper.record(progress.epoch - 1, progress.steps, found)
            if config.evaluate.report:
                say("report: what there is to see, in report.html")
                if not config.evaluate.test:
                    judge(life, dataset, dataset.validation)
                write_report(life)


# -------------------------------------------------------------------------------------------------- the story's parts


def fit(
    config: Config,
    stops: loop.Stops,
    dataset: Any,
    batches: Callable,
    steps: int,
    step: Any,
    keeper: Keeper | Follower,
    watch: Callable,
) -> None:
    """The loop, with everything it calls tied to this run; again from the last checkpoint where the config says so."""

    def validate() -> dict[str, float]:
        with step.averaged():
            found = factory.measure(config, dataset, dataset.validation, step.predict, stops)
        return {"loss": found["loss"], "main_accuracy": found["accuracy"], "main_top5_accuracy": found["top5_accuracy"]}

    while True:
        with watch() as watching, stops.among(step):
            training = loop.Loop(
                step=step,
                progress=keeper.progress,
                epochs=min(config.sweep.until or config.epochs, config.epochs),
                steps=steps,
                batch_size=config.batch_size,
                log_every=config.tracking.every_steps,
                batches=batches,
                validate=validate,
                keeper=keeper,
                stopper=loop.Stopper(**vars(config.early_stopping)),
                watch=watching,
                stops=stops,
            )
            try:
                training.run()
            except loop.DivergedError as fault:
                keeper.roll_back(fault)
                say(f"warning: {fault}; going on from step {keeper.progress.steps}, learning rate x {step.factor():g}")
            else:
                return


def waiting(fraction: float) -> str:
    """A sentence for a run that waited for its data, and what to do about it."""
    if fraction < MUCH_WAITING:
        return ""
    return (
        f"the input bound this run: {fraction:.0%} of the training time was spent waiting for data; use a larger "
        "data.ram_budget, data.cache=disk, a cheaper augment, smaller files, or more processor cores"
    )


def judge(life: Life, dataset: Any, split: Any) -> dict[str, Any]:
    """The best weights on a split, measured and written down; what of it belongs into a summary."""
    from train.evaluation import results

    place = life.folder.path / "evaluation" / split.name
    model, predict = factory.load_best(life.folder, life.config)
    outcome = results.Outcome(
        *factory.answers(life.config, split, len(dataset.classes), predict, life.stops), dataset.classes
    )
    found = results.assess(place, split, outcome)
    if life.config.evaluate.report:
        with going_on_without(life, "pictures"):
            results.draw(place, split, outcome, found, model)
            results.draw_filters(life.folder.path, model)
    return {name: found[name] for name in results.SUMMARY}


def write_report(life: Life) -> None:
    """The run on one page."""
    from train.evaluation import report

    with going_on_without(life, "report"):
        report.write(life.folder, life.summary | {"status": "finished"})


@contextmanager
def going_on_without(life: Life, what: str) -> Iterator[None]:
    """A run that has its numbers does not fail for want of pictures; that they are missing is told."""
    try:
        yield
    except Exception as fault:
        log.exception("no %s", what)
        path = run_metadata.shell_path(life.folder.path)
        say(f"warning: the {what} could not be made ({type(fault).__name__}: {fault}); later: make report run={path}")
