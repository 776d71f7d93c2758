"""What a config stands for: its data, its network, the step that trains it, and what answers for it afterwards."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from train import data
from train.cli.progress import say
from train.config import schema as schema
from train.config.schema import ROOT, Config, ConfigError, options
from train.config.serialization import Private, to_dict
from train.evaluation.metrics import evaluate
from train.runtime import setup
from train.tracking import run_metadata
from train.tracking.run_dir import RunFolder
from train.training import loop

STREAM = ("balanced", "class_weights")  # keys of `data` that say what is made of the examples, not which there are


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
            f"extra: .venv/bin/python -m uv pip install --python .venv/bin/python -r requirements-{config.backend}.lock"
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


def augmentation_of(config: Config) -> Any:
    """What is done to the training examples."""
    from train.data.augmentation import policy

    return policy.build(config.augment.name, **options(config.augment))


def load_data(config: Config, *, crops: bool) -> tuple[Any, str]:
    """The data set that the config names, cut into train, validation and test; and where its pixels are kept.

    `crops`: whether training cuts its images out of the encoded ones.
    """
    from train.data import pixel_cache

    chosen = options(config.data)
    how = {name: chosen.pop(name) for name in ("cache", "ram_budget")}
    for name in (*STREAM, "fingerprint"):
        chosen.pop(name)
    chosen["data_dir"] = str(ROOT / chosen.pop("directory"))
    return pixel_cache.place(data.load(config.data.name, **chosen), **how, crops=crops)


def check_fingerprint(config: Config, dataset: Any) -> None:
    """The data is what the config wants. A life that goes on asks the ground instead."""
    if config.data.fingerprint not in (None, dataset.fingerprint):
        raise ConfigError(
            f"data.fingerprint must be that of the data, {dataset.fingerprint}, got {config.data.fingerprint}; "
            "use the data of the earlier run, or data.fingerprint=null"
        )


def data_source(config: Config, private: Private) -> str:
    """Where the data came from, as it may be stored."""
    stored = to_dict(config, private)["data"]
    return stored.get("file") or stored.get("root") or stored.get("manual_dir") or stored["name"]


def counts(dataset: Any) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in dataset.counts.items())


def steps_of(config: Config, dataset: Any) -> int:
    """Steps per epoch."""
    from train.data import pipeline

    steps = pipeline.steps_per_epoch(dataset.train, config.batch_size)
    return min(steps, config.steps_per_epoch or steps)


def left_out(config: Config, dataset: Any, steps: int) -> str:
    """What of the training split an epoch does not see."""
    left = len(dataset.train) - steps * config.batch_size
    return f"{steps} steps of {config.batch_size} per epoch, training examples left out of each: {left}"


def network(config: Config, dataset: Any) -> tuple[Any, Any]:
    """The network with its auxiliary heads, and the one without that shares its variables."""
    from train import models

    setup.seed(config.seed)
    side, keys = schema.resolve_image_size(config), options(config.model)
    shape, weights = (side, side, config.data.channels), keys.pop("weights")
    model = models.build(config.model.name, shape, len(dataset.classes), **keys)
    if weights is not None:
        heads = not (config.fine_tune.stages and config.fine_tune.new_head)
        say(models.load_weights(model, weights, heads=heads).sentence())
    return model, models.inference(model)


def teacher_of(config: Config, dataset: Any) -> Any:
    """The network to learn from, if there is one. Raises: ConfigError for one that answers other questions."""
    if config.distill.teacher is None:
        return None
    folder = RunFolder(Path(config.distill.teacher), "")
    found, ours = folder.card()["classes"], [*dataset.classes]
    if found != ours:
        raise ConfigError(f"distill.teacher must know the classes of this run, {ours}, got {found}; use another run")
    return load_best(folder, config)[0]


def sources(config: Config, teacher: Any) -> dict[str, str]:
    """What training starts and learns from, by content."""
    from train.training.step.base import weights_sha256

    weights = config.model.weights
    found = {"model.weights_sha256": run_metadata.sha256_of(Path(weights))} if weights not in (None, "imagenet") else {}
    return found | ({"distill.teacher_sha256": weights_sha256(teacher)} if teacher else {})


def ground(config: Config, private: Private, dataset: Any, teacher: Any) -> dict[str, Any]:
    """All that the bits of a run stand on here."""
    processor = setup.processor(config.backend, config.device)
    return run_metadata.ground(config, private, dataset.fingerprint, processor, sources(config, teacher))


def training_step(config: Config, model: Any, inference: Any, steps: int, teacher: Any) -> Any:
    """Optimizer, schedule and losses around the model's own training step."""
    from train import models
    from train.training import losses, optimizers, step
    from train.training.step.layerwise_lr import Plan

    if config.gradient_accumulation > steps * config.epochs:
        raise ConfigError(
            f"gradient_accumulation must be at most the run's {steps * config.epochs} steps, "
            f"got {config.gradient_accumulation}; use e.g. gradient_accumulation=1"
        )
    rates, rules, tuning = options(config.schedule), options(config.optimizer), config.fine_tune
    stages, peak = lasting(config), rules.pop("learning_rate")
    peaks = [(stage.epochs, stage.learning_rate_factor * peak) for stage in stages]
    rate = optimizers.build_schedule(config.schedule.name, stages=peaks, epoch_steps=steps, **rates)
    plan = None
    if tuning.stages:
        order = tuple((stage.epochs, stage.from_part) for stage in stages)
        plan = Plan(models.parts(model), order, tuning.layer_decay, steps / config.gradient_accumulation)
    optimizer = optimizers.build(
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
        share=share(config),
        **{name: getattr(config.data, name) for name in STREAM},
    )
    return placed(config, stream.take(steps - first))


def share(config: Config) -> tuple[int, int]:
    """Which part of every batch this process makes."""
    return config.distributed.index, config.distributed.processes


def placed(config: Config, stream: Any) -> Any:
    """The batches where the step will want them."""
    from train.data import pipeline

    # JAX takes a batch to its device while it is still busy with the one before.
    there = config.device == "gpu" and config.backend == "tensorflow"
    return pipeline.on_device(stream, "GPU:0") if there else stream


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


def load_best(folder: RunFolder, config: Config) -> tuple[Any, Callable]:
    """The network that was kept, so that this is what is measured, and what answers with its logits."""
    import keras

    from train.evaluation import test_time_augmentation
    from train.training import step

    model = keras.models.load_model(folder.inside("best/model.keras"))
    predict = step.of(config.backend).predictor(model, jit=config.jit == "on")
    return model, test_time_augmentation.averaged(predict, config.evaluate.views)


def answers(config: Config, split: Any, classes: int, predict: Callable, stops: loop.Stops) -> tuple[Any, Any]:
    """Logits and true classes of a split, every example once, in its order. classes: how many the data has."""
    from train.data import pipeline
    from train.evaluation import metrics

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=classes)
    return metrics.answers(predict, stops.heed(placed(config, batches)), len(split))


def measure(config: Config, dataset: Any, split: Any, predict: Callable, stops: loop.Stops) -> dict[str, float]:
    """Every example of the split, once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(
        split, batch_size=config.batch_size, num_classes=len(dataset.classes), share=share(config)
    )
    return evaluate(predict, stops.heed(placed(config, batches)), len(split))


def cost_of(model: Any, inference: Any) -> dict[str, Any]:
    """What an image costs the network in use, by block and layer, and the multiply-accumulates of that in training."""
    from train.models.cost import cost, layer_macs, totals

    layers = {layer.name: macs for layer in inference.layers if (macs := layer_macs(layer))}
    return {"blocks": [vars(row) for row in cost(inference)], "layers": layers, "training_macs": totals(model).macs}
