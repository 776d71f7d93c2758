"""Builds what a config describes: the data set, the models, the training step, batches and predictors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train import data
from train.cli.progress import print_and_log
from train.config import schema
from train.config.schema import ROOT, Config, ConfigError, options
from train.config.serialization import Redactor, to_dict
from train.config.validation import check_batch
from train.evaluation.metrics import Predict, evaluate
from train.runtime import setup
from train.runtime.setup import RuntimeSettings
from train.storage.checksummed import file_sha256
from train.storage.json_types import JsonObject
from train.tracking import run_metadata
from train.tracking.run_dir import RunDir
from train.training.signals import SignalHandler

if TYPE_CHECKING:  # Keras and TensorFlow are imported by prepare_runtime, once their settings are known
    import keras
    import numpy as np
    import tensorflow as tf

    from train.data.augmentation.policy import Augmentation
    from train.data.dataset import Dataset, Split
    from train.training.step.base import Step

Batches = Callable[[int, int], "tf.data.Dataset"]  # epoch, first batch -> the rest of the epoch's batches

STREAM_KEYS = ("balanced", "class_weights")  # keys of `data` for the stream of batches, not for loading the data set


def check_files(config: Config) -> None:
    """Checks that the files and folders that the user names exist. Raises: ValueError naming a missing one."""
    names = ("root", "manual_dir", "file")
    paths = {name: getattr(config.data, name) for name in names if hasattr(config.data, name)}
    data.check(config.data.name, data_dir=str(ROOT / config.data.directory), **paths)


def check_sources(config: Config) -> None:
    """Checks that backend, initial weights and teacher exist and fit. Raises: ConfigError naming one that does not."""
    if importlib.util.find_spec(config.backend) is None:
        raise ConfigError(
            f"backend {config.backend} is not installed; use backend=tensorflow, or install it: "
            f".venv/bin/python -m uv pip install --python .venv/bin/python -r requirements/{config.backend}.lock"
        )
    weights = config.model.weights
    teacher = config.distill.teacher
    if weights not in (None, "imagenet") and not Path(weights).is_file():
        raise ConfigError(f"model.weights={weights} is not a file; use model.weights=PATH, imagenet or null")
    if teacher is None:
        return
    run_dir = RunDir(Path(teacher), "")
    model_info = run_dir.model_info() if run_dir.status() == "finished" else {}
    if not model_info:
        raise ConfigError(f"distill.teacher={teacher} is not a finished run; use the folder of one")
    side = schema.resolve_image_size(config)
    expected = [side, side, config.data.channels]
    if (shape := model_info["input"]["shape"]) != expected:
        raise ConfigError(
            f"distill.teacher takes images of shape {shape}, this run has {expected}; use a teacher with the same shape"
        )


def runtime_settings(config: Config) -> RuntimeSettings:
    """The part of the config that is about how a process computes."""
    return RuntimeSettings(**{item.name: getattr(config, item.name) for item in fields(RuntimeSettings)})


def prepare_runtime(config: Config, library_log: Path) -> tuple[Config, list[str]]:
    """Imports and sets up the backend; returns the config with every `auto` resolved, and messages for the user.

    Raises: ConfigError for what this machine cannot do.
    """
    settings, messages = setup.prepare(
        runtime_settings(config), model_name=config.model.name, group=config.distributed, library_log=library_log
    )
    config = replace(config, **vars(settings))
    check_batch(config)
    return config, messages


def make_augmentation(config: Config) -> Augmentation:
    """The augmentation of training images."""
    from train.data.augmentation import policy

    return policy.build(config.augment.name, **options(config.augment))


def load_data(config: Config, *, crops: bool) -> tuple[Dataset, str]:
    """The data set of the config, split into train, validation and test, and a message about its pixel cache.

    `crops`: whether training crops its images out of the encoded files.
    """
    from train.data import pixel_cache

    load_options = options(config.data)
    cache_options = {name: load_options.pop(name) for name in ("cache", "ram_budget")}
    for name in (*STREAM_KEYS, "fingerprint"):
        load_options.pop(name)
    load_options["data_dir"] = str(ROOT / load_options.pop("directory"))
    return pixel_cache.choose_cache(data.load(config.data.name, **load_options), **cache_options, crops=crops)


def check_fingerprint(config: Config, dataset: Dataset) -> None:
    """Checks a new run's data.fingerprint; a resumed run compares its provenance instead. Raises: ConfigError."""
    if config.data.fingerprint not in (None, dataset.fingerprint):
        raise ConfigError(
            f"the data has fingerprint {dataset.fingerprint}, but data.fingerprint={config.data.fingerprint}; "
            "use the data of the earlier run, or data.fingerprint=null"
        )


def split_sizes(dataset: Dataset) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in dataset.split_sizes.items())


def steps_per_epoch(config: Config, dataset: Dataset) -> int:
    """The number of full batches of the training split, or fewer where the config limits them."""
    from train.data import pipeline

    steps = pipeline.steps_per_epoch(dataset.train, config.batch_size)
    return min(steps, config.steps_per_epoch or steps)


def epoch_message(config: Config, dataset: Dataset, epoch_steps: int) -> str:
    """Says how many training examples an epoch leaves out."""
    dropped = len(dataset.train) - epoch_steps * config.batch_size
    examples = f"{dropped} example{'' if dropped == 1 else 's'}"
    return f"{epoch_steps} steps per epoch, batch size {config.batch_size} ({examples} dropped per epoch)"


def make_models(config: Config, dataset: Dataset) -> tuple[keras.Model, keras.Model]:
    """The training model with its auxiliary heads, and the inference model without, which shares its variables."""
    from train import models

    setup.set_seed(config.seed)
    side = schema.resolve_image_size(config)
    model_options = options(config.model)
    weights = model_options.pop("weights")
    model = models.build(config.model.name, (side, side, config.data.channels), len(dataset.classes), **model_options)
    if weights is not None:
        load_heads = not (config.fine_tune.stages and config.fine_tune.new_head)
        print_and_log(models.load_weights(model, weights, load_heads=load_heads).summary())
    return model, models.inference_model(model)


def load_teacher(config: Config, dataset: Dataset) -> keras.Model | None:
    """The model to distill from, or None. Raises: ConfigError for one with other classes."""
    if config.distill.teacher is None:
        return None
    run_dir = RunDir(Path(config.distill.teacher), "")
    classes = run_dir.model_info()["classes"]
    expected = [*dataset.classes]
    if classes != expected:
        raise ConfigError(
            f"distill.teacher has the classes {classes}, the data {expected}; use a teacher with the same classes"
        )
    return load_best(run_dir, config)[0]


def input_digests(config: Config, teacher: keras.Model | None) -> dict[str, str]:
    """SHA-256 of the initial weights and of the teacher, where there are any."""
    from train.training.step.base import weights_sha256

    weights = config.model.weights
    digests = {}
    if weights not in (None, "imagenet"):
        digests["model.weights_sha256"] = file_sha256(Path(weights))
    if teacher:
        digests["distill.teacher_sha256"] = weights_sha256(teacher)
    return digests


def collect_provenance(config: Config, redactor: Redactor, dataset: Dataset, teacher: keras.Model | None) -> JsonObject:
    """`run_metadata.run_provenance` of this config, data set and machine."""
    processor = setup.processor_name(config.backend, config.device)
    digests = input_digests(config, teacher)
    return run_metadata.run_provenance(
        to_dict(config, redactor), config.backend, dataset.fingerprint, processor, digests
    )


def make_training_step(
    config: Config, model: keras.Model, inference: keras.Model, epoch_steps: int, teacher: keras.Model | None
) -> Step:
    """The compiled training step: model, losses, optimizer and learning rate schedule. Raises: ConfigError."""
    from train import models
    from train.training import losses, optimizers, schedules, step
    from train.training.step.layerwise_lr import FreezeSchedule

    if config.gradient_accumulation > epoch_steps * config.epochs:
        raise ConfigError(
            f"gradient_accumulation must be at most the run's {epoch_steps * config.epochs} steps, "
            f"got {config.gradient_accumulation}; use e.g. gradient_accumulation=1"
        )
    optimizer_options = options(config.optimizer)
    peak = optimizer_options.pop("learning_rate")
    stages = resolved_stages(config)
    schedule = schedules.build_schedule(
        config.schedule.name,
        stages=[(stage.epochs, stage.learning_rate_factor * peak) for stage in stages],
        steps_per_epoch=epoch_steps,
        **options(config.schedule),
    )
    freeze_schedule = None
    if config.fine_tune.stages:
        freeze_schedule = FreezeSchedule(
            models.group_layers(model),
            tuple((stage.epochs, stage.from_part) for stage in stages),
            config.fine_tune.layer_decay,
            epoch_steps / config.gradient_accumulation,
        )
    optimizer = optimizers.build_optimizer(
        config.optimizer.name,
        schedule,
        gradient_clip=config.gradient_clip,
        gradient_accumulation=config.gradient_accumulation,
        ema=config.ema,
        **optimizer_options,
    )
    distillation = (config.distill.weight, config.distill.temperature) if teacher else None
    losses_by_output, loss_weights = losses.build_losses(
        tuple(model.output), config.model.aux_weight, config.label_smoothing, distillation
    )
    metrics = losses.build_metrics(tuple(model.output), distilled=teacher is not None)
    model.compile(optimizer, losses_by_output, loss_weights=loss_weights, metrics=metrics, jit_compile=False)
    return step.get_step_class(config.backend)(
        model,
        inference,
        schedule,
        config.batch_size,
        jit=config.jit == "on",
        float_images=bool(config.augment.mixup or config.augment.cutmix),
        example_weights=config.data.class_weights,
        measure_gradients=config.tracking.gradients,
        freeze_schedule=freeze_schedule,
        teacher=teacher,
    )


def resolved_stages(config: Config) -> list[schema.FineTuneStage]:
    """The fine-tuning stages, the last one extended to the end of the run; a single stage where the config has none."""
    *first, last = config.fine_tune.stages or [schema.FineTuneStage()]
    return [*first, replace(last, epochs=config.epochs - sum(stage.epochs for stage in first))]


def train_batches(
    config: Config, dataset: Dataset, augmentation: Augmentation, epoch_steps: int, epoch: int, first_batch: int
) -> tf.data.Dataset:
    """The batches of an epoch, from number `first_batch` on."""
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
    """This process's share of every batch: (index, number of processes)."""
    return config.distributed.index, config.distributed.processes


def prefetch_to_device(config: Config, stream: tf.data.Dataset) -> tf.data.Dataset:
    """Copies batches to the device ahead of time, where the backend does not do so itself."""
    # JAX copies a batch to its device while the device still computes the previous one.
    needs_prefetch = config.device == "gpu" and config.backend == "tensorflow"
    return stream.prefetch_to_device("GPU:0") if needs_prefetch else stream


def load_best(run_dir: RunDir, config: Config) -> tuple[keras.Model, Predict]:
    """Loads the saved best model, so that what is evaluated is what was saved; the model, and its logits function."""
    import keras

    from train.evaluation import test_time_augmentation
    from train.training import step

    model = keras.models.load_model(run_dir.inside("best/model.keras"))
    predict = step.get_step_class(config.backend).make_predictor(model, jit=config.jit == "on")
    return model, test_time_augmentation.average_views(predict, config.evaluate.views)


def predict_split(
    config: Config, split: Split, num_classes: int, predict: Predict, signals: SignalHandler
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a split, every example once, in its order."""
    from train.data import pipeline
    from train.evaluation import metrics

    batches = pipeline.eval_batches(
        split, batch_size=config.batch_size, num_classes=num_classes, shard=pipeline.SINGLE_SHARD
    )
    return metrics.predict_all(predict, signals.guard(prefetch_to_device(config, batches)), len(split))


def evaluate_split(
    config: Config, dataset: Dataset, split: Split, predict: Predict, signals: SignalHandler
) -> dict[str, float]:
    """Mean metrics over a split, every example once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(
        split, batch_size=config.batch_size, num_classes=len(dataset.classes), shard=shard(config)
    )
    return evaluate(predict, signals.guard(prefetch_to_device(config, batches)), len(split))
