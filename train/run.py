"""The story of a training run: config -> data -> model -> loop -> evaluate -> record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train import config as schema
from train import data, loop, runtime
from train.config import ROOT, Config, ConfigError, Private, options
from train.evaluate import evaluate
from train.progress import Terminal, say
from train.tracking import record, uploader
from train.tracking.folder import RunFolder, create


def train(config: Config, private: Private, *, latest: bool = True) -> int:
    """Runs the story and leaves a summary whatever happens; returns the exit code.

    `private`: what of the config must not be written down. `latest`: whether runs/latest shall point here.
    """
    folder = create(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest)
    with folder.held(), record.log_file(folder), loop.Stops().listening() as stops:
        summary, recorder = record.begin(folder, config), None
        try:
            record.identify(folder, config, private)
            recorder = uploader.start(folder, config.tracking.uri or uploader.default_uri(ROOT))
            tell(config, private, folder, summary, stops)
            summary["status"], code = "finished", 0
        except loop.Interrupted as stop:
            summary |= {"status": "interrupted", "failure": str(stop)}
            code = 128 + stop.number
        except Exception as fault:
            summary |= {"status": "failed", "failure": private.hide(f"{type(fault).__name__}: {fault}")}
            code = record.report(fault, folder, private)
        with stops.deferred():
            record.close(folder, summary)
        say("record: completing it in MLflow")
        uploader.wait(recorder, folder, config.tracking.wait_seconds)
    print(record.one_line(summary, folder), flush=True)
    return code


def tell(config: Config, private: Private, folder: RunFolder, summary: dict[str, Any], stops: loop.Stops) -> None:
    """The story itself; fills `summary` as it goes, so that it is true at any moment."""
    config, notes = runtime.prepare(config, folder.path / "train.log")
    record.settle(folder, summary, config, private)
    say(*notes)
    stops.obey()  # here and below: libraries may swallow what a signal raises while they are loaded

    dataset = load_data(config)
    stops.obey()
    steps = steps_of(config, dataset)
    say(
        f"data: {dataset.name}, {len(dataset.classes)} classes, {counts(dataset)} examples",
        left_out(config, dataset, steps),
    )

    model, inference = build_model(config, dataset)
    step = build_step(config, model, inference, steps)
    stops.obey()
    record.describe(folder, summary, dataset, data_source(config, private), model, inference, macs(model, inference))
    size = f"{summary['parameters']:,} parameters, {summary['macs']:,} multiply-accumulates per image"
    say(f"model: {model.name}, {size}")
    folder.record(0, 0, {f"cost/{name}": summary[name] for name in ("parameters", "macs")})
    say(f"run: {record.short(folder.path)}")

    outcome = loop.Outcome()
    with naming_broken_examples():
        try:
            fit(config, dataset, steps, step, inference, folder, outcome, stops)
        finally:
            record.progress(summary, outcome, step.weights_sha256(), runtime.peak_memory_bytes())

        if outcome.stopped_early:
            rule = config.early_stopping
            say(f"stopped early: {rule.metric} has not improved for {rule.patience_epochs} epochs")
        found = {"cost/peak_memory_bytes": summary["peak_memory_bytes"]}
        if config.evaluate.test:
            say("test: the best weights, on a split that chose nothing")
            predict = load_predictor(folder.best / "model.keras", config)
            summary["test"] = measure(config, dataset, dataset.test, predict, stops)
            found |= {f"test/{name}": summary["test"][name] for name in ("accuracy", "top5_accuracy", "loss")}
        folder.record(outcome.epochs - 1, outcome.steps, found)


# -------------------------------------------------------------------------------------------------- the story's parts


def load_data(config: Config) -> Any:
    """The data set that the config names, cut into train, validation and test."""
    chosen = options(config.data)
    chosen["data_dir"] = str(ROOT / chosen.pop("directory"))
    return data.load(config.data.name, **chosen)


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
    stored = schema.to_dict(config, private)["data"]
    return stored.get("root") or stored.get("manual_dir") or stored["name"]


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
    side = schema.resolve_image_size(config)
    shape = (side, side, config.data.channels)
    model = models.build(config.model.name, shape, len(dataset.classes), **options(config.model))
    return model, models.inference(model)


def build_step(config: Config, model: Any, inference: Any, steps: int) -> Any:
    """Optimizer, schedule and losses around the model's own training step."""
    from train import losses, optim
    from train.step.tensorflow import Step

    if config.gradient_accumulation > steps * config.epochs:
        raise ConfigError(
            f"gradient_accumulation must be at most the run's {steps * config.epochs} steps, "
            f"got {config.gradient_accumulation}; use e.g. gradient_accumulation=1"
        )
    rates, rules = options(config.schedule), options(config.optimizer)
    rate = optim.build_schedule(
        config.schedule.name,
        learning_rate=rules.pop("learning_rate"),
        epochs=config.epochs,
        epoch_steps=steps,
        **rates,
    )
    optimizer = optim.build(
        config.optimizer.name,
        rate,
        gradient_clip=config.gradient_clip,
        gradient_accumulation=config.gradient_accumulation,
        ema=config.ema,
        **rules,
    )
    weighted, weights = losses.build(tuple(model.output), config.model.aux_weight, config.label_smoothing)
    metrics = losses.metrics(tuple(model.output))
    model.compile(optimizer, weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    return Step(model, inference, jit=config.jit == "on")


def fit(
    config: Config,
    dataset: Any,
    steps: int,
    step: Any,
    inference: Any,
    folder: RunFolder,
    outcome: loop.Outcome,
    stops: loop.Stops,
) -> None:
    """The loop, with everything it calls tied to this run."""
    from train.data import augment, pipeline

    augmentation = functools.partial(augment.AUGMENTS[config.augment.name], **options(config.augment))

    def batches(epoch: int) -> Any:
        return pipeline.train_batches(
            dataset.train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            augment=augmentation,
            num_classes=len(dataset.classes),
        ).take(steps)

    def validate() -> dict[str, float]:
        with step.averaged():
            found = measure(config, dataset, dataset.validation, step.predict, stops)
        return {"loss": found["loss"], "main_accuracy": found["accuracy"], "main_top5_accuracy": found["top5_accuracy"]}

    def keep_best(epoch: int, values: dict[str, float]) -> None:
        with step.averaged():
            folder.save_best(inference, epoch, values, dataset.classes, dataset.fingerprint)

    with Terminal(config.epochs, steps, config.batch_size) as terminal:
        loop.fit(
            step,
            epochs=config.epochs,
            log_every=config.tracking.every_steps,
            steps=steps,
            batches=batches,
            validate=validate,
            record=folder.record,
            keep_best=keep_best,
            stopper=loop.Stopper(**vars(config.early_stopping)),
            watch=terminal,
            outcome=outcome,
            stops=stops,
        )


def load_predictor(path: Path, config: Config) -> Callable:
    """The stored best model, so that what is measured is what was kept."""
    import keras

    from train.step.tensorflow import predictor

    return predictor(keras.models.load_model(path), jit=config.jit == "on")


def macs(model: Any, inference: Any) -> dict[str, int]:
    """Multiply-accumulates per example of the network in use and of the one in training."""
    from train.models.cost import totals

    return {"inference": totals(inference).macs, "training": totals(model).macs}


def measure(config: Config, dataset: Any, split: Any, predict: Callable, stops: loop.Stops) -> dict[str, float]:
    """Every example of the split, once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=len(dataset.classes))
    return evaluate(predict, stops.heed(batches), len(split))
