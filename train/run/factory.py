"""Builds what a config describes: the data set, the models, the training step, batches and predictors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from train import data
from train.cli.progress import print_and_log
from train.config import schema
from train.config.schema import ROOT, Config, ConfigError, options
from train.config.serialization import Redactor, to_dict
from train.evaluation.metrics import evaluate
from train.runtime import setup
from train.storage.checksummed import file_sha256
from train.tracking import run_metadata
from train.tracking.run_dir import RunDir
from train.training.signals import SignalHandler

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
        raise ConfigError(f"distill.teacher must be the folder of a finished run, got {teacher}; use another one")
    side = schema.resolve_image_size(config)
    expected = [side, side, config.data.channels]
    if (shape := model_info["input"]["shape"]) != expected:
        raise ConfigError(f"distill.teacher must take images of shape {expected}, got {shape}; use another run")


def make_augmentation(config: Config) -> Any:
    """The augmentation of training images."""
    from train.data.augmentation import policy

    return policy.build(config.augment.name, **options(config.augment))


def load_data(config: Config, *, crops: bool) -> tuple[Any, str]:
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


def check_fingerprint(config: Config, dataset: Any) -> None:
    """Checks a new run's data.fingerprint; a resumed run compares its provenance instead. Raises: ConfigError."""
    if config.data.fingerprint not in (None, dataset.fingerprint):
        raise ConfigError(
            f"the data has fingerprint {dataset.fingerprint}, but data.fingerprint={config.data.fingerprint}; "
            "use the data of the earlier run, or data.fingerprint=null"
        )


def data_source(config: Config, redactor: Redactor) -> str:
    """The path or name that the data was loaded from, without secrets."""
    stored = to_dict(config, redactor)["data"]
    return stored.get("file") or stored.get("root") or stored.get("manual_dir") or stored["name"]


def split_sizes(dataset: Any) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in dataset.split_sizes.items())


def steps_per_epoch(config: Config, dataset: Any) -> int:
    """The number of full batches of the training split, or fewer where the config limits them."""
    from train.data import pipeline

    steps = pipeline.steps_per_epoch(dataset.train, config.batch_size)
    return min(steps, config.steps_per_epoch or steps)


def epoch_message(config: Config, dataset: Any, epoch_steps: int) -> str:
    """Says how many training examples an epoch leaves out."""
    dropped = len(dataset.train) - epoch_steps * config.batch_size
    examples = f"{dropped} example{'' if dropped == 1 else 's'}"
    return f"{epoch_steps} steps per epoch, batch size {config.batch_size} ({examples} dropped per epoch)"


def make_models(config: Config, dataset: Any) -> tuple[Any, Any]:
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


def load_teacher(config: Config, dataset: Any) -> Any:
    """The model to distill from, or None. Raises: ConfigError for one with other classes."""
    if config.distill.teacher is None:
        return None
    run_dir = RunDir(Path(config.distill.teacher), "")
    classes = run_dir.model_info()["classes"]
    expected = [*dataset.classes]
    if classes != expected:
        raise ConfigError(f"distill.teacher must have the classes {expected}, got {classes}; use another run")
    return load_best(run_dir, config)[0]


def input_digests(config: Config, teacher: Any) -> dict[str, str]:
    """SHA-256 of the initial weights and of the teacher, where there are any."""
    from train.training.step.base import weights_sha256

    weights = config.model.weights
    digests = {}
    if weights not in (None, "imagenet"):
        digests["model.weights_sha256"] = file_sha256(Path(weights))
    if teacher:
        digests["distill.teacher_sha256"] = weights_sha256(teacher)
    return digests


def collect_provenance(config: Config, redactor: Redactor, dataset: Any, teacher: Any) -> dict[str, Any]:
    """`run_metadata.run_provenance` of this config, data set and machine."""
    processor = setup.processor_name(config.backend, config.device)
    return run_metadata.run_provenance(config, redactor, dataset.fingerprint, processor, input_digests(config, teacher))


def make_training_step(config: Config, model: Any, inference: Any, epoch_steps: int, teacher: Any) -> Any:
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
    config: Config, dataset: Any, augmentation: Any, epoch_steps: int, epoch: int, first_batch: int
) -> Any:
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


def prefetch_to_device(config: Config, stream: Any) -> Any:
    """Copies batches to the device ahead of time, where the backend does not do so itself."""
    from train.data import pipeline

    # JAX copies a batch to its device while the device still computes the previous one.
    needs_prefetch = config.device == "gpu" and config.backend == "tensorflow"
    return pipeline.prefetch_to_device(stream, "GPU:0") if needs_prefetch else stream


@contextmanager
def surface_example_errors() -> Iterator[None]:
    """Re-raises TensorFlow's wrapper around an unreadable example as a ValueError with the example's own message."""
    from train.data import pipeline

    try:
        yield
    except Exception as error:
        message = pipeline.extract_example_error(error)
        if message is None:
            raise
        raise ValueError(message) from error


def load_best(run_dir: RunDir, config: Config) -> tuple[Any, Callable]:
    """Loads the saved best model, so that what is evaluated is what was saved; the model, and its logits function."""
    import keras

    from train.evaluation import test_time_augmentation
    from train.training import step

    model = keras.models.load_model(run_dir.inside("best/model.keras"))
    predict = step.get_step_class(config.backend).make_predictor(model, jit=config.jit == "on")
    return model, test_time_augmentation.average_views(predict, config.evaluate.views)


def predict_split(
    config: Config, split: Any, num_classes: int, predict: Callable, signals: SignalHandler
) -> tuple[Any, Any]:
    """Logits and labels of a split, every example once, in its order."""
    from train.data import pipeline
    from train.evaluation import metrics

    batches = pipeline.eval_batches(split, batch_size=config.batch_size, num_classes=num_classes)
    return metrics.predict_all(predict, signals.guard(prefetch_to_device(config, batches)), len(split))


def evaluate_split(
    config: Config, dataset: Any, split: Any, predict: Callable, signals: SignalHandler
) -> dict[str, float]:
    """Mean metrics over a split, every example once."""
    from train.data import pipeline

    batches = pipeline.eval_batches(
        split, batch_size=config.batch_size, num_classes=len(dataset.classes), shard=shard(config)
    )
    return evaluate(predict, signals.guard(prefetch_to_device(config, batches)), len(split))


def compute_cost(model: Any, inference: Any) -> dict[str, Any]:
    """Inference cost per image by block and by layer, and the multiply-accumulates of the training model."""
    from train.models.cost import block_costs, layer_macs, total_cost

    layers = {layer.name: macs for layer in inference.layers if (macs := layer_macs(layer))}
    return {
        "blocks": [vars(row) for row in block_costs(inference)],
        "layers": layers,
        "training_macs": total_cost(model).macs,
    }
