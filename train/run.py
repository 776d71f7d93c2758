"""The story of a training run: config -> data -> model -> loop -> evaluate -> record."""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train import config as schema
from train import data, faults, loop, runtime
from train.config import ROOT, Config, ConfigError, options
from train.keeper import Keeper
from train.progress import Terminal, say
from train.scores import evaluate
from train.stored import Private, to_dict
from train.tracking import record, uploader
from train.tracking.folder import Pulse, RunFolder, create

log = logging.getLogger(__name__)

STREAM = ("balanced", "class_weights")  # keys of `data` that say what is made of the examples, not which there are
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

    def begin(self, changes: list[dict[str, Any]]) -> None:
        """The folder says from now on that the run is alive, and MLflow hears of it."""
        self.begun = True
        self.pulse = Pulse(self.folder.path / "heartbeat")
        record.identify(self.folder, self.config, self.private, changes)
        self.recorder = uploader.start(self.folder, self.config.tracking.uri or uploader.default_uri(ROOT))


def train(config: Config, private: Private, *, latest: bool = True) -> int:
    """A new run; returns the exit code. `latest`: whether runs/latest shall point here."""
    return live(create(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest), config, private)


def live(folder: RunFolder, config: Config, private: Private, accepted: frozenset[str] = frozenset()) -> int:
    """Tells the story, from the start or from the last checkpoint, and leaves a summary whatever happens."""
    with folder.held(), record.log_file(folder), loop.Stops().listening() as stops:
        life = Life(folder, config, private, stops, accepted, record.begin(folder, config))
        patience = config.tracking.wait_seconds
        try:
            tell(life)
            life.summary["status"], code = "finished", 0
        except PausedError as pause:
            life.summary |= {"status": "interrupted", "failure": str(pause)}
            code = 0
        except loop.Interrupted as stop:
            life.summary |= {"status": "interrupted", "failure": str(stop)}
            code, patience = 128 + stop.number, 0 if stop.at_once else min(patience, STOPPED_WAIT_SECONDS)
        except Exception as fault:
            life.summary |= {"status": "failed", "failure": private.hide(f"{type(fault).__name__}: {fault}")}
            code = record.report(fault, folder, private)
        if not life.begun:
            say("nothing was changed in the run" if code > 128 else "")
            return code
        with stops.deferred():
            unwritten = record.close(folder, life.summary)
            life.pulse.close()
        say("record: completing it in MLflow")
        uploader.wait(life.recorder, folder, config.tracking.uri or uploader.default_uri(ROOT), patience)
        say(f"to go on: make resume run={record.short(folder.path)}" if code > 128 else "")
    print(record.one_line(life.summary, folder), flush=True)
    return code or unwritten or stops.code()


def tell(life: Life) -> None:
    """The story itself; fills the life's summary as it goes, so that it is true at any moment."""
    folder, stops, summary = life.folder, life.stops, life.summary
    fresh = not (folder.path / "run.json").exists()
    if fresh:
        life.begin([])
    faults.point("life/begun")
    life.config, notes = runtime.prepare(life.config, folder.path / "train.log")
    config = life.config
    if fresh:
        record.settle(folder, config, life.private)
    faults.point("life/settled")
    say(*notes)
    stops.obey()  # here and below: libraries may swallow what a signal raises while they are loaded

    augmentation = build_augmentation(config)
    dataset, where = load_data(config, crops=augmentation.crop is not None)
    stops.obey()
    if fresh:
        check_fingerprint(config, dataset)
    steps = steps_of(config, dataset)
    say(
        f"data: {dataset.name}, {len(dataset.classes)} classes, {counts(dataset)} examples",
        *dataset.notes,
        left_out(config, dataset, steps),
        where,
    )

    model, inference = build_model(config, dataset)
    teacher = build_teacher(config, dataset)
    step = build_step(config, model, inference, steps, teacher)
    stops.obey()
    with closing(Keeper(folder, config, step, inference, dataset)) as keeper:
        processor = runtime.processor(config.backend, config.device)
        ground = record.ground(config, life.private, dataset.fingerprint, processor, sources(config, teacher))
        changes = [] if fresh else keeper.changes(ground, life.accepted)
        keeper.go_on(len(folder.identity()["changes"]) + len(changes))
        if not fresh:
            life.begin(changes)
        keeper.begin(ground, life.pulse)
        record.describe(
            folder, summary, config, life.private, dataset, data_source(config, life.private),
            model, inference, cost_of(model, inference),
        )  # fmt: skip
        batches = functools.partial(train_batches, config, dataset, augmentation, steps)
        if fresh:
            record.picture(folder, next(iter(batches(0, 0)))[0].numpy(), augmentation.mix is not None)
        size = f"{summary['parameters']:,} parameters, {summary['macs']:,} multiply-accumulates per image"
        say(f"model: {model.name}, {size}")
        if keeper.found:
            say(f"going on: life {life.pulse.lives}, from {keeper.found.name}, step {keeper.progress.steps}")
        else:
            keeper.record(0, 0, {f"cost/{name}": summary[name] for name in ("parameters", "macs")})
            if config.on_divergence == "rollback":
                keeper.save(keeper.progress, planned=True)  # the start is good, too
        say(f"run: {record.short(folder.path)}")

        with naming_broken_examples():
            try:
                fit(life, dataset, batches, steps, step, keeper)
            finally:
                record.progress(summary, step, keeper, life.pulse, runtime.peak_memory_bytes(config.backend))

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


def check_files(config: Config) -> None:
    """Files and folders that the user names are there."""
    names = ("root", "manual_dir", "file")
    places = {name: getattr(config.data, name) for name in names if hasattr(config.data, name)}
    data.check(config.data.name, data_dir=str(ROOT / config.data.directory), **places)


def check_sources(config: Config) -> None:
    """What training starts and learns from is there, and what it computes with."""
    if importlib.util.find_spec(config.backend) is None:
        raise ConfigError(
            f"backend must be installed, got {config.backend}, which is not; use backend=tensorflow, or install the "
            f"extra: .venv/bin/python -m uv pip install -r requirements-{config.backend}.lock"
        )
    weights, teacher = config.model.weights, config.distill.teacher
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise ConfigError(
            f"model.weights must be a file, got {weights}, which is none; use model.weights=PATH, imagenet or null"
        )
    if teacher is None:
        return
    folder, side = RunFolder(Path(teacher), ""), schema.resolve_image_size(config)
    card = folder.card() if folder.status() == "finished" else {}
    if not card:
        raise ConfigError(f"distill.teacher must be the folder of a finished run, got {teacher}; use another one")
    if (found := card["input"]["shape"]) != (ours := [side, side, config.data.channels]):
        raise ConfigError(
            f"distill.teacher must look at images of this run's shape, {ours}, got {found}; use another run"
        )


def build_augmentation(config: Config) -> Any:
    """What is done to the training examples."""
    from train.data import augment

    return augment.build(config.augment.name, **options(config.augment))


def load_data(config: Config, *, crops: bool) -> tuple[Any, str]:
    """The data set that the config names, cut into train, validation and test; and where its pixels are kept.

    `crops`: whether training cuts its images out of the encoded ones.
    """
    from train.data import pixels

    chosen = options(config.data)
    how = {name: chosen.pop(name) for name in ("cache", "ram_budget")}
    for name in (*STREAM, "fingerprint"):
        chosen.pop(name)
    chosen["data_dir"] = str(ROOT / chosen.pop("directory"))
    return pixels.place(data.load(config.data.name, **chosen), **how, crops=crops)


def check_fingerprint(config: Config, dataset: Any) -> None:
    """The data is what the config wants. A life that goes on asks the ground instead."""
    if config.data.fingerprint not in (None, dataset.fingerprint):
        raise ConfigError(
            f"data.fingerprint must be that of the data, {dataset.fingerprint}, got {config.data.fingerprint}; "
            "use the data of the earlier run, or data.fingerprint=null"
        )


@contextmanager
def naming_broken_examples() -> Iterator[None]:
    """Brings an unreadable example's own message out of what TensorFlow wraps around it."""
    from train.data import pipeline

    try:
        yield
    except Exception as fault:
        line = pipeline.example_error(fault)
        if line is None:
            raise
        raise ValueError(line) from fault


def data_source(config: Config, private: Private) -> str:
    """Where the data came from, as it may be stored."""
    stored = to_dict(config, private)["data"]
    return stored.get("file") or stored.get("root") or stored.get("manual_dir") or stored["name"]


def steps_of(config: Config, dataset: Any) -> int:
    """Steps per epoch."""
    from train.data import pipeline

    steps = pipeline.steps_per_epoch(dataset.train, config.batch_size)
    return min(steps, config.steps_per_epoch or steps)


def left_out(config: Config, dataset: Any, steps: int) -> str:
    """What of the training split an epoch does not see."""
    left = len(dataset.train) - steps * config.batch_size
    return f"{steps} steps of {config.batch_size} per epoch, training examples left out of each: {left}"


def counts(dataset: Any) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in dataset.counts.items())


def build_model(config: Config, dataset: Any) -> tuple[Any, Any]:
    """The network with its auxiliary heads, and the one without that shares its variables."""
    from train import models

    runtime.seed(config.seed)
    side, keys = schema.resolve_image_size(config), options(config.model)
    shape, weights = (side, side, config.data.channels), keys.pop("weights")
    model = models.build(config.model.name, shape, len(dataset.classes), **keys)
    if weights is not None:
        heads = not (config.fine_tune.stages and config.fine_tune.new_head)
        say(models.load_weights(model, weights, heads=heads).sentence())
    return model, models.inference(model)


def sources(config: Config, teacher: Any) -> dict[str, str]:
    """What training starts and learns from, by content."""
    from train.step.base import weights_sha256

    weights = config.model.weights
    found = {"model.weights_sha256": record.sha256_of(Path(weights))} if weights not in (None, "imagenet") else {}
    return found | ({"distill.teacher_sha256": weights_sha256(teacher)} if teacher else {})


def build_teacher(config: Config, dataset: Any) -> Any:
    """The network to learn from, if there is one. Raises: ConfigError for one that answers other questions."""
    if config.distill.teacher is None:
        return None
    folder = RunFolder(Path(config.distill.teacher), "")
    found, ours = folder.card()["classes"], [*dataset.classes]
    if found != ours:
        raise ConfigError(f"distill.teacher must know the classes of this run, {ours}, got {found}; use another run")
    return load_best(folder, config)[0]


def build_step(config: Config, model: Any, inference: Any, steps: int, teacher: Any) -> Any:
    """Optimizer, schedule and losses around the model's own training step."""
    from train import losses, models, optim, step
    from train.step.layerwise import Plan

    if config.gradient_accumulation > steps * config.epochs:
        raise ConfigError(
            f"gradient_accumulation must be at most the run's {steps * config.epochs} steps, "
            f"got {config.gradient_accumulation}; use e.g. gradient_accumulation=1"
        )
    rates, rules, tuning = options(config.schedule), options(config.optimizer), config.fine_tune
    stages, peak = lasting(config), rules.pop("learning_rate")
    peaks = [(stage.epochs, stage.learning_rate_factor * peak) for stage in stages]
    rate = optim.build_schedule(config.schedule.name, stages=peaks, epoch_steps=steps, **rates)
    plan = None
    if tuning.stages:
        order = tuple((stage.epochs, stage.from_part) for stage in stages)
        plan = Plan(models.parts(model), order, tuning.layer_decay, steps / config.gradient_accumulation)
    optimizer = optim.build(
        config.optimizer.name,
        rate,
        gradient_clip=config.gradient_clip,
        gradient_accumulation=config.gradient_accumulation,
        ema=config.ema,
        **rules,
    )
    teaching = (config.distill.weight, config.distill.temperature) if teacher else None
    weighted, weights = losses.build(tuple(model.output), config.model.aux_weight, config.label_smoothing, teaching)
    metrics = losses.metrics(tuple(model.output), taught=teacher is not None)
    model.compile(optimizer, weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    return step.of(config.backend)(
        model,
        inference,
        rate,
        config.batch_size,
        jit=config.jit == "on",
        mixed=bool(config.augment.mixup or config.augment.cutmix),
        weighted=config.data.class_weights,
        gradients=config.tracking.gradients,
        plan=plan,
        teacher=teacher,
    )


def lasting(config: Config) -> list[schema.Stage]:
    """The stages of a run, the last one up to its end; one for all where the config has none."""
    *first, last = config.fine_tune.stages or [schema.Stage()]
    return [*first, replace(last, epochs=config.epochs - sum(stage.epochs for stage in first))]


def train_batches(config: Config, dataset: Any, augmentation: Any, steps: int, epoch: int, first: int) -> Any:
    """The batches of an epoch from number `first` on."""
    from train.data import pipeline

    stream = pipeline.train_batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        augmentation=augmentation,
        first_batch=first,
        num_classes=len(dataset.classes),
        **{name: getattr(config.data, name) for name in STREAM},
    )
    return placed(config, stream.take(steps - first))


def placed(config: Config, stream: Any) -> Any:
    """The batches where the step will want them."""
    from train.data import pipeline

    # JAX takes a batch to its device while it is still busy with the one before.
    there = config.device == "gpu" and config.backend == "tensorflow"
    return pipeline.on_device(stream, "GPU:0") if there else stream


def fit(life: Life, dataset: Any, batches: Callable, steps: int, step: Any, keeper: Keeper) -> None:
    """The loop, with everything it calls tied to this run; again from the last checkpoint where the config says so."""
    config = life.config

    def validate() -> dict[str, float]:
        with step.averaged():
            found = measure(config, dataset, dataset.validation, step.predict, life.stops)
        return {"loss": found["loss"], "main_accuracy": found["accuracy"], "main_top5_accuracy": found["top5_accuracy"]}

    while True:
        with Terminal(config.epochs, steps, config.batch_size) as terminal:
            training = loop.Loop(
                step=step,
                progress=keeper.progress,
                epochs=min(config.sweep.until or config.epochs, config.epochs),
                steps=steps,
                log_every=config.tracking.every_steps,
                batches=batches,
                validate=validate,
                keeper=keeper,
                stopper=loop.Stopper(**vars(config.early_stopping)),
                watch=terminal,
                stops=life.stops,
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
    from train import assess

    place = life.folder.path / "evaluation" / split.name
    model, predict = load_best(life.folder, life.config)
    outcome = assess.Outcome(*answers(life.config, split, len(dataset.classes), predict, life.stops), dataset.classes)
    found = assess.assess(place, split, outcome)
    if life.config.evaluate.report:
        with going_on_without(life, "pictures"):
            assess.draw(place, split, outcome, found, model)
            assess.draw_filters(life.folder.path, model)
    return {name: found[name] for name in assess.SUMMARY}


def load_best(folder: RunFolder, config: Config) -> tuple[Any, Callable]:
    """The network that was kept, so that this is what is measured, and what answers with its logits."""
    import keras

    from train import step, views

    model = keras.models.load_model(folder.best / "model.keras")
    predict = step.of(config.backend).predictor(model, jit=config.jit == "on")
    return model, views.averaged(predict, config.evaluate.views)


def answers(config: Config, split: Any, classes: int, predict: Callable, stops: loop.Stops) -> tuple[Any, Any]:
    """Logits and true classes of a split, every example once, in its order. classes: how many the data has."""
    from train import scores
    from train.data import pipeline

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=classes)
    return scores.answers(predict, stops.heed(placed(config, batches)), len(split))


def write_report(life: Life) -> None:
    """The run on one page."""
    from train import report

    with going_on_without(life, "report"):
        report.write(life.folder, life.summary | {"status": "finished"})


@contextmanager
def going_on_without(life: Life, what: str) -> Iterator[None]:
    """A run that has its numbers does not fail for want of pictures; that they are missing is told."""
    try:
        yield
    except Exception as fault:
        log.exception("no %s", what)
        path = record.short(life.folder.path)
        say(f"warning: the {what} could not be made ({type(fault).__name__}: {fault}); later: make report run={path}")


def cost_of(model: Any, inference: Any) -> dict[str, Any]:
    """What an image costs the network in use, by block and layer, and the multiply-accumulates of that in training."""
    from train.models.cost import cost, layer_macs, totals

    layers = {layer.name: macs for layer in inference.layers if (macs := layer_macs(layer))}
    return {"blocks": [vars(row) for row in cost(inference)], "layers": layers, "training_macs": totals(model).macs}


def measure(config: Config, dataset: Any, split: Any, predict: Callable, stops: loop.Stops) -> dict[str, float]:
    """Every example of the split, once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=len(dataset.classes))
    return evaluate(predict, stops.heed(placed(config, batches)), len(split))
