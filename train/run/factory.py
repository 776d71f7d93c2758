"""What a config stands for: its data, its network, the step that trains it, and what answers for it afterwards."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from train import data
from train.cli.progress import print_and_log
from train.config import schema as schema
from train.config.schema import ROOT, Config, ConfigError, options
from train.config.serialization import Redactor, to_dict
from train.evaluation.metrics import evaluate
from train.runtime import setup
from train.tracking import run_metadata
from train.tracking.run_dir import RunDir
from train.training import loop

STREAM_KEYS = ("balanced", "class_weights")  # keys of `data` that say what is made of the examples, not which there are


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
            f"extra: .venv/bin/python -m uv pip install --python .venv/bin/python -r requirements/{config.backend}.lock"
        )
    weights, teacher = config.model.weights, config.distill.teacher
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise ConfigError(
            f"model.weights must be a file, got {weights}, which is none; use model.weights=PATH, imagenet or null"
        )
    if teacher is None:
        return
    folder, side = RunDir(Path(teacher), ""), schema.resolve_image_size(config)
    card = folder.model_info() if folder.status() == "finished" else {}
    if not card:
        raise ConfigError(f"distill.teacher must be the folder of a finished run, got {teacher}; use another one")
    if (found := card["input"]["shape"]) != (ours := [side, side, config.data.channels]):
        raise ConfigError(
            f"distill.teacher must look at images of this run's shape, {ours}, got {found}; use another run"
        )


def make_augmentation(config: Config) -> Any:
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
    for name in (*STREAM_KEYS, "fingerprint"):
        chosen.pop(name)
    chosen["data_dir"] = str(ROOT / chosen.pop("directory"))
    return pixel_cache.choose_cache(data.load(config.data.name, **chosen), **how, crops=crops)


def check_fingerprint(config: Config, dataset: Any) -> None:
    """The data is what the config wants. A life that goes on asks the ground instead."""
    if config.data.fingerprint not in (None, dataset.fingerprint):
        raise ConfigError(
            f"data.fingerprint must be that of the data, {dataset.fingerprint}, got {config.data.fingerprint}; "
            "use the data of the earlier run, or data.fingerprint=null"
        )


def data_source(config: Config, redactor: Redactor) -> str:
    """Where the data came from, as it may be stored."""
    stored = to_dict(config, redactor)["data"]
    return stored.get("file") or stored.get("root") or stored.get("manual_dir") or stored["name"]


def split_sizes(dataset: Any) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in dataset.split_sizes.items())


def steps_per_epoch(config: Config, dataset: Any) -> int:
    """Steps per epoch."""
    from train.data import pipeline

    steps = pipeline.steps_per_epoch(dataset.train, config.batch_size)
    return min(steps, config.steps_per_epoch or steps)


def epoch_message(config: Config, dataset: Any, epoch_steps: int) -> str:
    """What of the training split an epoch does not see."""
    left = len(dataset.train) - epoch_steps * config.batch_size
    return f"{epoch_steps} steps of {config.batch_size} per epoch, training examples left out of each: {left}"


def make_models(config: Config, dataset: Any) -> tuple[Any, Any]:
    """The network with its auxiliary heads, and the one without that shares its variables."""
    from train import models

    setup.set_seed(config.seed)
    side, keys = schema.resolve_image_size(config), options(config.model)
    shape, weights = (side, side, config.data.channels), keys.pop("weights")
    model = models.build(config.model.name, shape, len(dataset.classes), **keys)
    if weights is not None:
        heads = not (config.fine_tune.stages and config.fine_tune.new_head)
        print_and_log(models.load_weights(model, weights, load_heads=heads).summary())
    return model, models.inference_model(model)


def load_teacher(config: Config, dataset: Any) -> Any:
    """The network to learn from, if there is one. Raises: ConfigError for one that answers other questions."""
    if config.distill.teacher is None:
        return None
    folder = RunDir(Path(config.distill.teacher), "")
    found, ours = folder.model_info()["classes"], [*dataset.classes]
    if found != ours:
        raise ConfigError(f"distill.teacher must know the classes of this run, {ours}, got {found}; use another run")
    return load_best(folder, config)[0]


def input_digests(config: Config, teacher: Any) -> dict[str, str]:
    """What training starts and learns from, by content."""
    from train.training.step.base import weights_sha256

    weights = config.model.weights
    found = (
        {"model.weights_sha256": run_metadata.file_sha256(Path(weights))} if weights not in (None, "imagenet") else {}
    )
    return found | ({"distill.teacher_sha256": weights_sha256(teacher)} if teacher else {})


def run_provenance(config: Config, redactor: Redactor, dataset: Any, teacher: Any) -> dict[str, Any]:
    """All that the bits of a run stand on here."""
    processor = setup.processor_name(config.backend, config.device)
    return run_metadata.run_provenance(config, redactor, dataset.fingerprint, processor, input_digests(config, teacher))


def make_training_step(config: Config, model: Any, inference: Any, epoch_steps: int, teacher: Any) -> Any:
    """Optimizer, schedule and losses around the model's own training step."""
    from train import models
    from train.training import losses, optimizers, step
    from train.training.step.layerwise_lr import FreezeSchedule

    if config.gradient_accumulation > epoch_steps * config.epochs:
        raise ConfigError(
            f"gradient_accumulation must be at most the run's {epoch_steps * config.epochs} steps, "
            f"got {config.gradient_accumulation}; use e.g. gradient_accumulation=1"
        )
    rates, rules, tuning = options(config.schedule), options(config.optimizer), config.fine_tune
    stages, peak = resolved_stages(config), rules.pop("learning_rate")
    peaks = [(stage.epochs, stage.learning_rate_factor * peak) for stage in stages]
    rate = optimizers.build_schedule(config.schedule.name, stages=peaks, steps_per_epoch=epoch_steps, **rates)
    plan = None
    if tuning.stages:
        order = tuple((stage.epochs, stage.from_part) for stage in stages)
        plan = FreezeSchedule(
            models.group_layers(model), order, tuning.layer_decay, epoch_steps / config.gradient_accumulation
        )
    optimizer = optimizers.build_optimizer(
        config.optimizer.name,
        rate,
        gradient_clip=config.gradient_clip,
        gradient_accumulation=config.gradient_accumulation,
        ema=config.ema,
        **rules,
    )
    teaching = (config.distill.weight, config.distill.temperature) if teacher else None
    weighted, weights = losses.build_losses(
        tuple(model.output), config.model.aux_weight, config.label_smoothing, teaching
    )
    metrics = losses.build_metrics(tuple(model.output), distilled=teacher is not None)
    model.compile(optimizer, weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    return step.get_step_class(config.backend)(
        model,
        inference,
        rate,
        config.batch_size,
        jit=config.jit == "on",
        float_images=bool(config.augment.mixup or config.augment.cutmix),
        example_weights=config.data.class_weights,
        measure_gradients=config.tracking.gradients,
        freeze_schedule=plan,
        teacher=teacher,
    )


def resolved_stages(config: Config) -> list[schema.FineTuneStage]:
    """The stages of a run, the last one up to its end; one for all where the config has none."""
    *first, last = config.fine_tune.stages or [schema.FineTuneStage()]
    return [*first, replace(last, epochs=config.epochs - sum(stage.epochs for stage in first))]


def train_batches(
    config: Config, dataset: Any, augmentation: Any, epoch_steps: int, epoch: int, first_batch: int
) -> Any:
    """The batches of an epoch from number `first` on."""
    from train.data import pipeline

    stream = pipeline.train_batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        augmentation=augmentation,
        first_batch=first_batch,
        num_classes=len(dataset.classes),
        shard=shard(config),
        **{name: getattr(config.data, name) for name in STREAM_KEYS},
    )
    return prefetch_to_device(config, stream.take(epoch_steps - first_batch))


def shard(config: Config) -> tuple[int, int]:
    """Which part of every batch this process makes."""
    return config.distributed.index, config.distributed.processes


def prefetch_to_device(config: Config, stream: Any) -> Any:
    """The batches where the step will want them."""
    from train.data import pipeline

    # JAX takes a batch to its device while it is still busy with the one before.
    there = config.device == "gpu" and config.backend == "tensorflow"
    return pipeline.prefetch_to_device(stream, "GPU:0") if there else stream


@contextmanager
def surface_example_errors() -> Iterator[None]:
    """Brings an unreadable example's own message out of what TensorFlow wraps around it."""
    from train.data import pipeline

    try:
        yield
    except Exception as fault:
        line = pipeline.extract_example_error(fault)
        if line is None:
            raise
        raise ValueError(line) from fault


def load_best(folder: RunDir, config: Config) -> tuple[Any, Callable]:
    """The network that was kept, so that this is what is measured, and what answers with its logits."""
    import keras

    from train.evaluation import test_time_augmentation
    from train.training import step

    model = keras.models.load_model(folder.inside("best/model.keras"))
    predict = step.get_step_class(config.backend).make_predictor(model, jit=config.jit == "on")
    return model, test_time_augmentation.average_views(predict, config.evaluate.views)


def predict_split(
    config: Config, split: Any, num_classes: int, predict: Callable, signals: loop.SignalHandler
) -> tuple[Any, Any]:
    """Logits and true classes of a split, every example once, in its order. classes: how many the data has."""
    from train.data import pipeline
    from train.evaluation import metrics

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=num_classes)
    return metrics.predict_all(predict, signals.guard(prefetch_to_device(config, batches)), len(split))


def evaluate_split(
    config: Config, dataset: Any, split: Any, predict: Callable, signals: loop.SignalHandler
) -> dict[str, float]:
    """Every example of the split, once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(
        split, batch_size=config.batch_size, num_classes=len(dataset.classes), shard=shard(config)
    )
    return evaluate(predict, signals.guard(prefetch_to_device(config, batches)), len(split))


def compute_cost(model: Any, inference: Any) -> dict[str, Any]:
    """What an image costs the network in use, by block and layer, and the multiply-accumulates of that in training."""
    from train.models.cost import block_costs, layer_macs, total_cost

    layers = {layer.name: macs for layer in inference.layers if (macs := layer_macs(layer))}
    return {
        "blocks": [vars(row) for row in block_costs(inference)],
        "layers": layers,
        "training_macs": total_cost(model).macs,
    }
