"""The typed schema of a run: one dataclass per group, and for each key its meaning, unit and range.

YAML under conf/ holds values, this file holds types; checks.py holds every value against them. Nothing here imports
the project, Hydra or TensorFlow, so that a mistake is answered at once. What is manifest twice on purpose (names,
smallest image sizes) is held equal to the dictionaries behind it by tests/config/test_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Smallest image side in pixels that survives a network's strides and unpadded convolutions.
MIN_IMAGE_SIZE = {
    "vgg16": 32,
    "vgg16_inception": 32,
    "inception_v1": 32,
    "inception_v3": 75,
    "inception_resnet_v2": 75,
}

# What can be set free part by part, from the image on; behind them lies the head.
_VGG_LAYER_GROUPS = tuple(f"block{number}" for number in range(1, 6))
LAYER_GROUPS = {
    "vgg16": _VGG_LAYER_GROUPS,
    "vgg16_inception": _VGG_LAYER_GROUPS,
    "inception_v1": ("stem", "inception_3", "inception_4", "inception_5"),
    "inception_v3": ("stem", *(f"mixed{number}" for number in range(11))),
    "inception_resnet_v2": ("stem", "mixed_5b", "block35", "mixed_6a", "block17", "mixed_7a", "block8", "conv_7b"),
}
ALL_LAYER_GROUPS, UPPER_LAYER_GROUPS, HEAD_LAYER_GROUP = "all", "upper", "head"

# Image side in pixels that a data set is usually trained at, taken when `data.image_size` is null.
DEFAULT_IMAGE_SIZE = {
    "digits": 32,
    "mnist": 32,
    "fashion_mnist": 32,
    "cifar10": 32,
    "imagenette": 160,
    "tf_flowers": 160,
    "imagenet2012": 224,
    "folder": 64,
    "manifest": 64,
}

BLOCK_KINDS = (
    "conv",
    "conv_bn",
    "inception_naive",
    "inception_v1",
    "inception_two_3x3",
    "inception_v3",
    "inception_expanded",
    "inception_3x3_reduce",
    "single_1x1",
    "single_3x3",
    "single_5x5",
)

RENAMED_METRICS = {"validation/main_accuracy": "validation/accuracy", "train/main_accuracy": "train/accuracy"}
METRICS = ("validation/accuracy", "validation/loss", "train/accuracy", "train/loss")


class ConfigError(ValueError):
    """What a user typed can't be run: one line that says what was given, what is allowed, what to do."""


def setting(
    default: Any,
    text: str,
    *,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple = (),
) -> Any:
    """A dataclass field that knows its range, `ge <= v <= le` or `gt < v < lt`, or one of `choices`."""
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"text": text, "unit": unit, "choices": choices, "limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# --------------------------------------------------------------------------------------------------------- groups


@dataclass
class Model:
    """What every network has."""

    name: str = setting("", "which network; chosen by model=NAME", choices=tuple(MIN_IMAGE_SIZE))
    width: float = setting(1.0, "multiplier of all channel counts", gt=0, le=4)
    head: str = setting("avg", "what turns the last feature map into class scores", choices=("fc", "avg", "max"))
    aux_weight: float = setting(0.3, "weight of each auxiliary loss; 0 builds no auxiliary head", ge=0, le=10)
    batch_norm_momentum: float = setting(
        0.9, "momentum of the moving statistics; 0.99 needs thousands of steps", ge=0, lt=1
    )
    weights: str | None = setting(
        None, "a file (.weights.h5, .h5, .keras) that the trunk starts from, or imagenet: what Keras publishes"
    )


@dataclass
class Vgg16(Model):
    name: str = setting("vgg16", "which network; chosen by model=NAME", choices=("vgg16",))


@dataclass
class Vgg16Inception(Model):
    name: str = setting("vgg16_inception", "which network; chosen by model=NAME", choices=("vgg16_inception",))
    blocks: list[str] = setting(
        ["conv_bn", "conv_bn", "inception_v1", "conv_bn", "inception_v3"],
        "the kind of each of the five blocks",
        choices=BLOCK_KINDS,
    )


@dataclass
class InceptionV1(Model):
    name: str = setting("inception_v1", "which network; chosen by model=NAME", choices=("inception_v1",))
    batch_norm: bool = setting(True, "batch normalisation after every convolution; false: biases, as published")


@dataclass
class InceptionV3(Model):
    name: str = setting("inception_v3", "which network; chosen by model=NAME", choices=("inception_v3",))


@dataclass
class InceptionResnetV2(Model):
    name: str = setting("inception_resnet_v2", "which network; chosen by model=NAME", choices=("inception_resnet_v2",))


@dataclass
class Data:
    """What every data set has."""

    name: str = setting("", "which data set; chosen by data=NAME", choices=tuple(DEFAULT_IMAGE_SIZE))
    image_size: int | None = setting(
        None, "side images are brought to; null: the data set's usual one, or the model's smallest", unit="px", ge=1
    )
    channels: int = setting(3, "1: grey, 3: colour; images are converted", choices=(1, 3))
    background: list[int] = setting([255, 255, 255], "red, green and blue behind what is transparent", ge=0, le=255)
    crop_fraction: float = setting(1.0, "share of the short side that evaluation looks at, in the centre", gt=0, le=1)
    validation_fraction: float = setting(0.1, "share cut off for validation where the set has no such part", gt=0, lt=1)
    test_fraction: float = setting(0.2, "share cut off for the test where the set has no such part", gt=0, lt=1)
    directory: str = setting("data", "where prepared data sets lie (relative: to the project)")
    fingerprint: str | None = setting(None, "what the data must be, as an earlier run has written it; null: as it is")
    max_bytes: int = setting(2**26, "larger files count as broken", unit="bytes", ge=1)
    max_pixels: int = setting(50_000_000, "images with more pixels count as broken", unit="px", ge=1)
    on_error: str = setting("raise", "what broken examples do: stop the run, or be left out", choices=("raise", "skip"))
    max_skipped: int = setting(100, "how many broken examples may be left out", unit="examples", ge=0)
    on_leak: str = setting(
        "warn", "what equal images in two splits, or with two labels, do", choices=("warn", "drop", "raise")
    )
    train_per_class: int | None = setting(
        None, "training examples of every class; null: all there are", unit="examples", ge=1
    )
    cache: str = setting(
        "auto", "where decoded pixels are kept; auto: memory, else disk", choices=("auto", "memory", "disk", "none")
    )
    ram_budget: float = setting(1.0, "how much memory decoded pixels may take", unit="GiB", ge=0)
    balanced: bool = setting(False, "every class equally often in training, instead of every example once")
    class_weights: bool = setting(False, "weigh the loss of every example so that all classes weigh the same")


@dataclass
class TfdsData(Data):
    manual_dir: str | None = setting(None, "folder with the set's files, fetched by hand; null: download")


@dataclass
class FolderData(Data):
    name: str = setting("folder", "which data set; chosen by data=NAME", choices=("folder",))
    root: str | None = setting(None, "folder with one sub-folder of images per class")
    on_leak: str = setting(
        "raise", "what equal images in two splits, or with two labels, do", choices=("warn", "drop", "raise")
    )


@dataclass
class ManifestData(FolderData):
    name: str = setting("manifest", "which data set; chosen by data=NAME", choices=("manifest",))
    file: str | None = setting(None, "CSV or JSON lines with path, label and, if it likes, split")
    root: str | None = setting(None, "folder that the paths are relative to; null: the table's own")


@dataclass
class Augment:
    """No augmentation; what every augmentation has."""

    name: str = setting(
        "none",
        "which augmentation; chosen by augment=NAME",
        choices=("none", "crop", "flip_crop", "inception", "randaugment"),
    )
    erase: float = setting(0.0, "probability that a rectangle is covered (random erasing)", ge=0, le=1)
    mixup: float = setting(0.0, "alpha of mixup; 0: none", ge=0)
    cutmix: float = setting(0.0, "alpha of cutmix; 0: none; with mixup, each for one half", ge=0)


@dataclass
class CropAugment(Augment):
    pad: float = setting(0.125, "how far a crop may shift", unit="of the side", ge=0, le=0.5)


@dataclass
class InceptionAugment(Augment):
    name: str = setting("inception", "which augmentation; chosen by augment=NAME", choices=("inception",))
    least_area: float = setting(0.08, "smallest share of the image that a crop takes", gt=0, le=1)
    most_stretch: float = setting(4 / 3, "longest side of a crop, relative to the other", ge=1)
    color: float = setting(1.0, "how far brightness, contrast, saturation and hue go; 0: not at all", ge=0, le=1)
    mirror: bool = setting(True, "every second image is mirrored")


@dataclass
class RandAugment(Augment):
    name: str = setting("randaugment", "which augmentation; chosen by augment=NAME", choices=("randaugment",))
    ops: int = setting(2, "how many changes, one after the other", ge=1, le=14)
    magnitude: float = setting(9.0, "how strong each is", ge=0, le=30)
    pad: float = setting(0.125, "how far a crop may shift", unit="of the side", ge=0, le=0.5)
    mirror: bool = setting(True, "every second image is mirrored")


@dataclass
class Optimizer:
    """What every optimizer has."""

    name: str = setting("", "which optimizer; chosen by optimizer=NAME", choices=("sgd", "adamw", "rmsprop"))
    learning_rate: float = setting(0.01, "peak learning rate, after the warm-up", gt=0)
    weight_decay: float = setting(
        0.0, "decoupled weight decay, times the learning rate; biases and batch norm are spared", ge=0
    )


@dataclass
class Sgd(Optimizer):
    name: str = setting("sgd", "which optimizer; chosen by optimizer=NAME", choices=("sgd",))
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = setting(True, "look ahead (Nesterov)")


@dataclass
class Adamw(Optimizer):
    name: str = setting("adamw", "which optimizer; chosen by optimizer=NAME", choices=("adamw",))
    beta_1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta_2: float = setting(0.999, "decay of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-7, "added to the denominator", gt=0)


@dataclass
class Rmsprop(Optimizer):
    name: str = setting("rmsprop", "which optimizer; chosen by optimizer=NAME", choices=("rmsprop",))
    rho: float = setting(0.9, "decay of the squared gradient", ge=0, lt=1)
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    epsilon: float = setting(1.0, "added to the denominator", gt=0)


@dataclass
class Schedule:
    """Constant learning rate after the warm-up; what every schedule has."""

    name: str = setting(
        "constant",
        "how the learning rate moves; chosen by schedule=NAME",
        choices=("constant", "cosine", "exponential", "step"),
    )
    warmup_epochs: float = setting(0.0, "the learning rate climbs linearly from 0", unit="epochs", ge=0)


@dataclass
class CosineSchedule(Schedule):
    name: str = setting("cosine", "how the learning rate moves; chosen by schedule=NAME", choices=("cosine",))
    final_fraction: float = setting(0.0, "learning rate at the end", unit="of the peak", ge=0, le=1)


@dataclass
class ExponentialSchedule(Schedule):
    name: str = setting("exponential", "how the learning rate moves; chosen by schedule=NAME", choices=("exponential",))
    factor: float = setting(0.94, "what the learning rate is multiplied by", gt=0, le=1)
    every_epochs: float = setting(2.0, "how often", unit="epochs", gt=0)


@dataclass
class StepSchedule(Schedule):
    name: str = setting("step", "how the learning rate moves; chosen by schedule=NAME", choices=("step",))
    factor: float = setting(0.1, "what the learning rate is multiplied by at each milestone", gt=0, le=1)
    milestones: list[float] = setting([0.5, 0.75], "where, as shares of the steps after the warm-up", gt=0, lt=1)


@dataclass
class EarlyStopping:
    metric: str | None = setting(None, "stop when this metric no longer improves; null: never", choices=METRICS)
    patience_epochs: int = setting(10, "how long it may stay without improving", unit="epochs", ge=1)
    min_delta: float = setting(0.0, "what counts as improving", ge=0)


@dataclass
class Checkpoint:
    """All null: every epoch. Checkpoints change no bit of a run."""

    every_epochs: int | None = setting(None, "save all state after so many epochs", unit="epochs", ge=1)
    every_steps: int | None = setting(None, "save all state after so many steps", unit="steps", ge=1)
    every_minutes: float | None = setting(None, "save all state after so much time", unit="minutes", gt=0)
    keep: int = setting(2, "how many checkpoints stay on disk", unit="checkpoints", ge=1)


@dataclass
class Rollback:
    """What `on_divergence=rollback` does."""

    learning_rate_factor: float = setting(0.5, "what the learning rate is multiplied by each time", gt=0, lt=1)
    at_most: int = setting(3, "how often, before the run stops after all", unit="times", ge=1)


@dataclass
class Evaluate:
    test: bool = setting(True, "measure the best weights on the test split at the end; sweeps that choose leave it off")
    views: str = setting(
        "one",
        "views of an image whose answers are averaged in that (test-time augmentation)",
        choices=("one", "mirror", "ten_crop"),
    )
    report: bool = setting(
        True, "draw pictures and write report.html at the end; without a test, of the validation split"
    )


@dataclass
class Tracking:
    uri: str | None = setting(None, "MLflow store or server; null: mlflow.db beside the Makefile")
    experiment: str = setting("inception", "name of the MLflow experiment and of the folder under runs/")
    log_model: bool = setting(True, "log the inference model to MLflow")
    every_steps: int = setting(
        50, "how often training metrics, means since the epoch's start, are written", unit="steps", ge=1
    )
    gradients: bool = setting(False, "write the norm of the gradient, of all and of the first layer, with them")
    wait_seconds: float = setting(60.0, "how long the end of a run waits for its MLflow record", unit="seconds", ge=0)


@dataclass
class Sweep:
    """How several runs are made of one command; changes no bit of any of them and is no part of them."""

    search: str = setting("grid", "which trials there are", choices=("grid", "random", "tpe", "asha"))
    space: dict[str, str] = setting({}, "what differs, by key, as on the command line; from conf/sweep/ by sweep=NAME")
    trials: int = setting(20, "how many points a search tries (random, tpe, asha)", unit="points", ge=1)
    first_epochs: int = setting(1, "when points are compared for the first time (asha)", unit="epochs", ge=1)
    reduction: int = setting(3, "one of so many goes on, for so many times the epochs (asha)", ge=2)
    seeds: int = setting(1, "how many seeds, from seed on, every point is run with", unit="seeds", ge=1)
    parallel: int | None = setting(
        None, "how many at a time; null: one for every two cores, or for every GPU", unit="trials", ge=1
    )
    engine: str = setting("processes", "what runs the trials; ray: a Ray cluster", choices=("processes", "ray"))
    minutes: float | None = setting(
        None, "how long one trial may take; null: as long as it likes", unit="minutes", gt=0
    )
    retries: int = setting(1, "how often a trial that was killed goes on again", unit="times", ge=0)
    halve_batch: bool = setting(False, "a trial that lacked memory is run again with half the batch, as another run")
    keep_checkpoints: bool = setting(False, "keep those of trials that are over, to train them longer")
    fail_fast: bool = setting(False, "stop the whole sweep at the first trial that fails")
    dry_run: bool = setting(False, "check all trials and list them, and run none")
    fresh: bool = setting(False, "begin anew instead of going on with the sweep of the same words")
    most: int = setting(200, "how many trials are meant at most", unit="trials", ge=1)
    trial: str | None = setting(None, "file of a frozen trial, which is then run; a sweep tells its processes so")
    until: int | None = setting(None, "epoch after which that trial pauses", unit="epochs", ge=1)
    final: list[str] = setting([], "keys that are true for that trial now: what only the best gets")


@dataclass
class Expectation:
    """What a claim says of two variants: of `variant` minus `against`, paired over seeds, or of their ratio."""

    variant: str = setting("", "the one that the claim is about")
    against: str = setting("", "the one that it is compared with")
    metric: str = setting("test_accuracy", "which figure of a run")
    expect: str = setting("higher", "what is claimed", choices=("higher", "lower", "not lower", "ratio"))
    margin: float = setting(0.0, "difference that would matter", ge=0)
    least: float = setting(0.0, "lowest ratio that agrees with the claim", ge=0)
    most: float = setting(0.0, "highest ratio that agrees with the claim", ge=0)


@dataclass
class Claim:
    """What an experiment asks, written down before it is run; `make claims` answers. No part of any run."""

    hypothesis: str = setting("", "the claim in one sentence")
    source: str = setting("", "who claims it, and where")
    variants: dict[str, list[str]] = setting({}, "what differs: words on top of the experiment, by name")
    settings: dict[str, list[str]] = setting({}, "where it is tried: words on top of those, by name")
    seeds: int = setting(6, "how many seeds, from seed on, every variant is run with", unit="seeds", ge=2)
    expectations: list[Expectation] = setting([], "what has to be so in every setting for the claim to be supported")


@dataclass
class FineTuneStage:
    """Some epochs of fine-tuning in which a part of the network, and all behind it, learns."""

    epochs: int = setting(1, "passes over the training split", unit="epochs", ge=1)
    from_part: str = setting(
        "all", "the first part that learns: all, upper (half of them), head, or one of the model's"
    )
    learning_rate_factor: float = setting(1.0, "of optimizer.learning_rate; the schedule runs in every stage", gt=0)


@dataclass
class FineTune:
    """Training that starts from `model.weights`: frozen parts keep their weights and their statistics."""

    stages: list[FineTuneStage] = setting(
        [], "one after the other: epochs, from_part, learning_rate_factor; none: everything learns at once"
    )
    layer_decay: float = setting(1.0, "learning rate of a part as a share of that of the part behind it", gt=0, le=1)
    new_head: bool = setting(
        True, "with stages: the classifier starts anew, also where that of model.weights would fit"
    )


@dataclass
class Distill:
    """Learning from a larger network's answers, too."""

    teacher: str | None = setting(None, "the folder of a finished run on the same classes and image size; null: none")
    weight: float = setting(0.7, "share of the loss that is the distance to the teacher's answers", gt=0, le=1)
    temperature: float = setting(4.0, "what both networks' logits are divided by for that", ge=1, le=100)


@dataclass
class Distributed:
    """Several processes that train one network, each on a part of every batch (backend=jax)."""

    coordinator: str | None = setting(
        None, "HOST:PORT where process 0 waits for the others; null: there is one process"
    )
    processes: int = setting(1, "how many there are", unit="processes", ge=1)
    index: int = setting(0, "which one this is; 0 leads, and it alone writes", ge=0)
    wait_seconds: float = setting(50.0, "how long they wait for each other at the start", unit="seconds", gt=0)


@dataclass
class Config:
    """A whole run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    fine_tune: FineTune = field(default_factory=FineTune)
    distill: Distill = field(default_factory=Distill)
    distributed: Distributed = field(default_factory=Distributed)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    rollback: Rollback = field(default_factory=Rollback)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tracking: Tracking = field(default_factory=Tracking)
    sweep: Sweep = field(default_factory=Sweep)
    claim: Claim = field(default_factory=Claim)
    seed: int = setting(0, "start of all randomness", ge=0, le=2**31 - 1)
    epochs: int = setting(12, "passes over the training split", unit="epochs", ge=1)
    steps_per_epoch: int | None = setting(None, "cut every epoch after so many steps, to try things out", ge=1)
    batch_size: int = setting(32, "examples per step; the last incomplete batch is dropped", unit="examples", ge=1)
    precision: str = setting(
        "auto",
        "policy of computation; auto: by device",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    backend: str = setting("tensorflow", "what Keras computes with", choices=("tensorflow", "jax"))
    device: str = setting("auto", "where to compute; auto: the GPU where there is one", choices=("auto", "cpu", "gpu"))
    devices: str = setting(
        "1", "how many devices of this process share a batch: a number, or all there are (backend=jax)"
    )
    gpu_memory: int | None = setting(
        None, "how much of the GPU's memory it may take; null: as much as it comes to need", unit="MiB", ge=1
    )
    jit: str = setting(
        "auto",
        "XLA compilation, which TensorFlow does not make deterministic; auto: by backend and device",
        choices=("auto", "on", "off"),
    )
    threads: int | None = setting(
        None, "compute threads; null: what was fastest for the network, at most one per core", ge=1, le=1024
    )
    deterministic: bool = setting(True, "the same bits for the same config, data and machine")
    label_smoothing: float = setting(0.0, "share of a label spread over all classes", ge=0, lt=1)
    ema: float | None = setting(
        None, "decay of averaged weights, which are then evaluated and kept; null: none", gt=0, lt=1
    )
    gradient_clip: float | None = setting(None, "largest global norm of the gradient; null: none", gt=0)
    gradient_accumulation: int = setting(1, "steps whose gradients are averaged into one update", unit="steps", ge=1)
    on_divergence: str = setting(
        "stop",
        "when a number is no longer finite: stop, or go back to the last checkpoint with a lower learning rate",
        choices=("stop", "rollback"),
    )
    run_dir: str | None = setting(None, "where the run lies; null: runs/<experiment>/<time>-<short id>")


# Group -> option -> dataclass; conf/<group>/<option>.yaml holds the values.
GROUPS: dict[str, dict[str, type]] = {
    "model": {
        "vgg16": Vgg16,
        "vgg16_inception": Vgg16Inception,
        "inception_v1": InceptionV1,
        "inception_v3": InceptionV3,
        "inception_resnet_v2": InceptionResnetV2,
    },
    "data": {
        name: {"folder": FolderData, "manifest": ManifestData, "digits": Data}.get(name, TfdsData)
        for name in DEFAULT_IMAGE_SIZE
    },
    "augment": {
        "none": Augment,
        "crop": CropAugment,
        "flip_crop": CropAugment,
        "inception": InceptionAugment,
        "randaugment": RandAugment,
    },
    "optimizer": {"sgd": Sgd, "adamw": Adamw, "rmsprop": Rmsprop},
    "schedule": {
        "constant": Schedule,
        "cosine": CosineSchedule,
        "exponential": ExponentialSchedule,
        "step": StepSchedule,
    },
}


# --------------------------------------------------------------------------------------------------------- derived


def resolve_image_size(config: Config) -> int:
    """The image side in pixels that `data.image_size=null` stands for."""
    if config.data.image_size is not None:
        return config.data.image_size
    return max(DEFAULT_IMAGE_SIZE[config.data.name], MIN_IMAGE_SIZE[config.model.name])


def options(group: Any) -> dict[str, Any]:
    """A group's keys as the plain arguments of the builder behind its name."""
    return {item.name: getattr(group, item.name) for item in fields(group) if item.name != "name"}
