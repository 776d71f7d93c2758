"""Checks every value of a config against its key's range, and the keys against each other."""

from __future__ import annotations

import re
from dataclasses import Field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from train.cli.fields import find_problem
from train.config.schema import (  # fmt: skip
    ALL_LAYER_GROUPS,
    GROUPS,
    HEAD_LAYER_GROUP,
    LAYER_GROUPS,
    MIN_IMAGE_SIZE,
    UPPER_LAYER_GROUPS,
    Checkpoint,
    Config,
    ConfigError,
    Data,
    Model,
    Tracking,
)
from train.config.serialization import strip_credentials
from train.config.suggestions import suggest_value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check(config: DataclassInstance, prefix: str = "") -> None:
    """Checks every value against its key's range, and the keys against each other.

    Raises: ConfigError naming the key, the value and what is allowed.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            check(value, f"{prefix}{item.name}.")
        else:
            check_value(prefix + item.name, value, item)
    if isinstance(config, Config):
        _check_consistency(config)


def check_value(name: str, value: object, item: Field[object]) -> None:
    """Checks a key's value, or every element of a list, against the key's range. Raises: ConfigError."""
    if not isinstance(value, list):
        _check_element(name, value, item)
        return
    for number, element in enumerate(value):
        if is_dataclass(element) and not isinstance(element, type):
            check(element, f"{name}[{number}].")
        else:
            _check_element(name, element, item)


def _check_element(name: str, value: object, item: Field[object]) -> None:
    if value is None:
        return
    if problem := find_problem(name, value, item, partial(suggest_value, name)):
        raise ConfigError(problem)


def _check_consistency(config: Config) -> None:
    _check_names(config)
    _check_blocks(config.model)
    _check_image_size(config.model, config.data)
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        raise ConfigError(
            "data.validation_fraction and data.test_fraction must leave examples for training (sum below 1), "
            f"got {config.data.validation_fraction:g} + {config.data.test_fraction:g}"
        )
    _check_data(config.data)
    if config.schedule.warmup_epochs > config.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs must be at most epochs ({config.epochs}), got {config.schedule.warmup_epochs:g}; "
            f"use e.g. schedule.warmup_epochs={min(1, config.epochs)}"
        )
    milestones = getattr(config.schedule, "milestones", [])
    if milestones != sorted(set(milestones)):
        raise ConfigError(
            f"schedule.milestones must increase, got {milestones}; use e.g. schedule.milestones=[0.5,0.75]"
        )
    _check_interval(config.checkpoint)
    _check_stages(config)
    _check_backend(config)
    _check_devices(config)
    _check_jit(config)
    _check_rollback(config)
    _check_tracking(config.tracking)


def _check_data(data: Data) -> None:
    if len(data.background) != 3:
        raise ConfigError(
            f"data.background must be three numbers (red, green, blue), got {data.background}; "
            "use e.g. data.background=[255,255,255]"
        )
    if data.balanced and data.class_weights:
        raise ConfigError("data.balanced and data.class_weights are mutually exclusive; set only one of them")


def _check_stages(config: Config) -> None:
    stages = config.fine_tune.stages
    allowed = (ALL_LAYER_GROUPS, UPPER_LAYER_GROUPS, *LAYER_GROUPS[config.model.name], HEAD_LAYER_GROUP)
    if not stages:
        if config.fine_tune.layer_decay != 1:
            raise ConfigError("fine_tune.layer_decay has no effect without fine_tune.stages; use experiment=fine_tune")
        return
    if config.model.weights is None:
        raise ConfigError("fine_tune.stages requires pretrained weights; use model.weights=PATH")
    if config.early_stopping.metric is not None:
        raise ConfigError(
            "early_stopping.metric cannot be combined with fine_tune.stages, whose numbers of epochs are fixed; omit it"
        )
    for number, stage in enumerate(stages):
        if stage.from_part not in allowed:
            raise ConfigError(
                f"fine_tune.stages[{number}].from_part must be one of {', '.join(allowed)}, got {stage.from_part}"
            )
        if config.schedule.warmup_epochs > stage.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs must be at most the epochs of every stage ({stage.epochs} in "
                f"fine_tune.stages[{number}]), got {config.schedule.warmup_epochs:g}; use 0"
            )
    if config.epochs < (planned := sum(stage.epochs for stage in stages)):
        raise ConfigError(
            f"epochs must be at least those of all fine_tune.stages ({planned}), got {config.epochs}; "
            f"use epochs={planned}"
        )


def _check_interval(checkpoint: Checkpoint) -> None:
    intervals = [
        f"checkpoint.{name}={getattr(checkpoint, name):g}"
        for name in ("every_epochs", "every_steps", "every_minutes")
        if getattr(checkpoint, name) is not None
    ]
    if len(intervals) > 1:
        raise ConfigError(
            f"checkpoint.every_epochs, every_steps and every_minutes are mutually exclusive, "
            f"got {' '.join(intervals)}; set only one, or none to save every epoch"
        )


def _check_backend(config: Config) -> None:
    """JAX compiles everything, and limits GPU memory only by fraction, not by size."""
    if config.backend == "jax" and config.jit == "off":
        raise ConfigError("jit=off is not supported with backend=jax, which compiles everything; use jit=auto")
    if config.backend == "jax" and config.gpu_memory is not None:
        raise ConfigError("gpu_memory is not supported with backend=jax, which allocates memory as needed; omit it")


def _check_devices(config: Config) -> None:
    group = config.distributed
    if config.devices != "all" and not (config.devices.isdigit() and int(config.devices)):
        raise ConfigError(f"devices must be a positive whole number, or all, got {config.devices}; use devices=all")
    for name, value in {"devices": config.devices, "distributed.processes": str(group.processes)}.items():
        if value != "1" and config.backend != "jax":
            raise ConfigError(f"{name}={value} is not supported with backend={config.backend}; use backend=jax")
    if group.index >= group.processes:
        raise ConfigError(
            f"distributed.index must be below distributed.processes ({group.processes}), got {group.index}; "
            "number the processes from 0"
        )
    if group.processes > 1 and group.coordinator is None:
        raise ConfigError(
            "distributed.coordinator is missing, which several processes need to find each other; "
            "use e.g. distributed.coordinator=node1:4711"
        )
    if group.processes > 1 and config.checkpoint.every_minutes is not None:
        raise ConfigError(
            "checkpoint.every_minutes is not supported with several processes, which share no clock; "
            "use checkpoint.every_steps"
        )
    if config.devices.isdigit():
        check_batch(config)


def check_batch(config: Config) -> None:
    """Raises: ConfigError if the devices cannot share a batch equally."""
    devices = int(config.devices) * config.distributed.processes
    if config.batch_size % devices:
        smaller = config.batch_size // devices * devices
        raise ConfigError(
            f"batch_size must be a multiple of the number of devices ({devices}), got {config.batch_size}; "
            f"use batch_size={smaller or devices}"
        )


def _check_jit(config: Config) -> None:
    """TensorFlow 2.21 has no deterministic gradient of max pooling under XLA, and every network here uses it."""
    if config.backend == "tensorflow" and config.jit == "on" and config.deterministic:
        raise ConfigError("jit=on is not deterministic in TensorFlow; add deterministic=false, or use jit=off")


def _check_rollback(config: Config) -> None:
    if config.on_divergence == "rollback" and config.checkpoint.every_minutes is not None:
        raise ConfigError(
            "on_divergence=rollback cannot be combined with checkpoint.every_minutes, which saves at other steps in "
            "every run; use checkpoint.every_steps or checkpoint.every_epochs"
        )


def _check_names(config: Config) -> None:
    """Rejects a `name` that differs from the chosen option, which would build something else than was chosen."""
    for group, names in GROUPS.items():
        chosen = getattr(config, group)
        if names.get(chosen.name) is not type(chosen):
            raise ConfigError(f"{group}.name cannot be set by itself, got {chosen.name}; use {group}={chosen.name}")


def _check_blocks(model: Model) -> None:
    blocks = getattr(model, "blocks", None)
    if blocks is not None and len(blocks) != 5:
        raise ConfigError(
            f"model.blocks must name five blocks, got {len(blocks)}; "
            "use e.g. model.blocks=[conv_bn,conv_bn,inception_v1,conv_bn,inception_v3]"
        )


def _check_image_size(model: Model, data: Data) -> None:
    smallest = MIN_IMAGE_SIZE[model.name]
    if data.image_size is not None and data.image_size < smallest:
        raise ConfigError(
            f"data.image_size must be at least {smallest} for {model.name}, got {data.image_size}; "
            f"use data.image_size={smallest}"
        )


def _check_tracking(tracking: Tracking) -> None:
    if not re.fullmatch(r"[^./\\\s][^/\\\n\0]*", tracking.experiment) or tracking.experiment == "latest":
        raise ConfigError(
            "tracking.experiment must be a plain name (no slash, no leading dot, not latest), "
            f"got {tracking.experiment!r}; use e.g. tracking.experiment=inception"
        )
    if tracking.uri is None:
        return
    try:
        parts = urlsplit(tracking.uri)
    except ValueError:
        parts = urlsplit("")
    web = parts.scheme in ("http", "https") and parts.hostname
    database = parts.scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql") and (parts.path or parts.netloc)
    if not (web or database):
        raise ConfigError(
            "tracking.uri must be http(s)://host:port or sqlite:///path (or another database's address), "
            f"got {strip_credentials(tracking.uri)!r}; use e.g. "
            "tracking.uri=http://127.0.0.1:5000, or null for mlflow.db"
        )
