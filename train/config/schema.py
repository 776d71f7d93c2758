"""The typed schema of a run: one dataclass per group, and for each key its meaning, unit and range.

YAML under conf/ holds values, this file holds types; checks.py holds every value against them. Nothing here imports
the project, Hydra or TensorFlow, so that a mistake is answered at once. What is manifest twice on purpose (names,
smallest image sizes) is held equal to the dictionaries behind it by tests/test_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Smallest image side in pixels that survives a network's strides and unpadded convolutions.
SMALLEST_IMAGE = {
    "vgg16": 32,
    "vgg16_inception": 32,
    "inception_v1": 32,
    "inception_v3": 75,
    "inception_resnet_v2": 75,
}

# What can be set free part by part, from the image on; behind them lies the head.
_VGG_PARTS = tuple(f"block{number}" for number in range(1, 6))
PARTS = {
    "vgg16": _VGG_PARTS,
    "vgg16_inception": _VGG_PARTS,
    "inception_v1": ("stem", "inception_3", "inception_4", "inception_5"),
    "inception_v3": ("stem", *(f"mixed{number}" for number in range(11))),
    "inception_resnet_v2": ("stem", "mixed_5b", "block35", "mixed_6a", "block17", "mixed_7a", "block8", "conv_7b"),
}
ALL_PARTS, UPPER_PARTS, HEAD_PART = "all", "upper", "head"

# Image side in pixels that a data set is usually trained at, taken when `data.image_size` is null.
USUAL_IMAGE = {
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

METRICS = ("validation/main_accuracy", "validation/loss", "train/main_accuracy", "train/loss")


class ConfigError(ValueError):
    """What a user typed can't be run: one line that says what was given, what is allowed, what to do."""


def key(
    default: Any,
    text: str,
    *,
    unit: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple = (),
) -> Any:
    """A dataclass field that knows its range: `least <= v <= most`, `above < v < below`, or one of `choices`."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"text": text, "unit": unit, "choices": choices, "limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# --------------------------------------------------------------------------------------------------------- groups


@dataclass
class Model:
    """What every network has."""

    name: str = key("", "which network; chosen by model=NAME", choices=tuple(SMALLEST_IMAGE))
    width: float = key(1.0, "multiplier of all channel counts", above=0, most=4)
    head: str = key("avg", "what turns the last feature map into class scores", choices=("fc", "avg", "max"))
    aux_weight: float = key(0.3, "weight of each auxiliary loss; 0 builds no auxiliary head", least=0, most=10)
    batch_norm_momentum: float = key(
        0.9, "momentum of the moving statistics; 0.99 needs thousands of steps", least=0, below=1
    )
    weights: str | None = key(
        None, "a file (.weights.h5, .h5, .keras) that the trunk starts from, or imagenet: what Keras publishes"
    )


@dataclass
class Vgg16(Model):
    name: str = key("vgg16", "which network; chosen by model=NAME", choices=("vgg16",))


@dataclass
class Vgg16Inception(Model):
    name: str = key("vgg16_inception", "which network; chosen by model=NAME", choices=("vgg16_inception",))
    blocks: list[str] = key(
        ["conv_bn", "conv_bn", "inception_v1", "conv_bn", "inception_v3"],
        "the kind of each of the five blocks",
        choices=BLOCK_KINDS,
    )


@dataclass
class InceptionV1(Model):
    name: str = key("inception_v1", "which network; chosen by model=NAME", choices=("inception_v1",))
    batch_norm: bool = key(True, "batch normalisation after every convolution; false: biases, as published")


@dataclass
class InceptionV3(Model):
    name: str = key("inception_v3", "which network; chosen by model=NAME", choices=("inception_v3",))


@dataclass
class InceptionResnetV2(Model):
    name: str = key("inception_resnet_v2", "which network; chosen by model=NAME", choices=("inception_resnet_v2",))


@dataclass
class Data:
    """What every data set has."""

    name: str = key("", "which data set; chosen by data=NAME", choices=tuple(USUAL_IMAGE))
    image_size: int | None = key(
        None, "side images are brought to; null: the data set's usual one, or the model's smallest", unit="px", least=1
    )
    channels: int = key(3, "1: grey, 3: colour; images are converted", choices=(1, 3))
    background: list[int] = key([255, 255, 255], "red, green and blue behind what is transparent", least=0, most=255)
    crop_fraction: float = key(1.0, "share of the short side that evaluation looks at, in the centre", above=0, most=1)
    validation_fraction: float = key(
        0.1, "share cut off for validation where the set has no such part", above=0, below=1
    )
    test_fraction: float = key(0.2, "share cut off for the test where the set has no such part", above=0, below=1)
    directory: str = key("data", "where prepared data sets lie (relative: to the project)")
    fingerprint: str | None = key(None, "what the data must be, as an earlier run has written it; null: as it is")
    max_bytes: int = key(2**26, "larger files count as broken", unit="bytes", least=1)
    max_pixels: int = key(50_000_000, "images with more pixels count as broken", unit="px", least=1)
    on_error: str = key("raise", "what broken examples do: stop the run, or be left out", choices=("raise", "skip"))
    max_skipped: int = key(100, "how many broken examples may be left out", unit="examples", least=0)
    on_leak: str = key(
        "warn", "what equal images in two splits, or with two labels, do", choices=("warn", "drop", "raise")
    )
    train_per_class: int | None = key(
        None, "training examples of every class; null: all there are", unit="examples", least=1
    )
    cache: str = key(
        "auto", "where decoded pixels are kept; auto: memory, else disk", choices=("auto", "memory", "disk", "none")
    )
    ram_budget: float = key(1.0, "how much memory decoded pixels may take", unit="GiB", least=0)
    balanced: bool = key(False, "every class equally often in training, instead of every example once")
    class_weights: bool = key(False, "weigh the loss of every example so that all classes weigh the same")


@dataclass
class TfdsData(Data):
    manual_dir: str | None = key(None, "folder with the set's files, fetched by hand; null: download")


@dataclass
class FolderData(Data):
    name: str = key("folder", "which data set; chosen by data=NAME", choices=("folder",))
    root: str | None = key(None, "folder with one sub-folder of images per class")
    on_leak: str = key(
        "raise", "what equal images in two splits, or with two labels, do", choices=("warn", "drop", "raise")
    )


@dataclass
class ManifestData(FolderData):
    name: str = key("manifest", "which data set; chosen by data=NAME", choices=("manifest",))
    file: str | None = key(None, "CSV or JSON lines with path, label and, if it likes, split")
    root: str | None = key(None, "folder that the paths are relative to; null: the table's own")


@dataclass
class Augment:
    """No augmentation; what every augmentation has."""

    name: str = key(
        "none",
        "which augmentation; chosen by augment=NAME",
        choices=("none", "crop", "flip_crop", "inception", "randaugment"),
    )
    erase: float = key(0.0, "probability that a rectangle is covered (random erasing)", least=0, most=1)
    mixup: float = key(0.0, "alpha of mixup; 0: none", least=0)
    cutmix: float = key(0.0, "alpha of cutmix; 0: none; with mixup, each for one half", least=0)


@dataclass
class CropAugment(Augment):
    pad: float = key(0.125, "how far a crop may shift", unit="of the side", least=0, most=0.5)


@dataclass
class InceptionAugment(Augment):
    name: str = key("inception", "which augmentation; chosen by augment=NAME", choices=("inception",))
    least_area: float = key(0.08, "smallest share of the image that a crop takes", above=0, most=1)
    most_stretch: float = key(4 / 3, "longest side of a crop, relative to the other", least=1)
    color: float = key(1.0, "how far brightness, contrast, saturation and hue go; 0: not at all", least=0, most=1)
    mirror: bool = key(True, "every second image is mirrored")


@dataclass
class RandAugment(Augment):
    name: str = key("randaugment", "which augmentation; chosen by augment=NAME", choices=("randaugment",))
    ops: int = key(2, "how many changes, one after the other", least=1, most=14)
    magnitude: float = key(9.0, "how strong each is", least=0, most=30)
    pad: float = key(0.125, "how far a crop may shift", unit="of the side", least=0, most=0.5)
    mirror: bool = key(True, "every second image is mirrored")


@dataclass
class Optimizer:
    """What every optimizer has."""

    name: str = key("", "which optimizer; chosen by optimizer=NAME", choices=("sgd", "adamw", "rmsprop"))
    learning_rate: float = key(0.01, "peak learning rate, after the warm-up", above=0)
    weight_decay: float = key(
        0.0, "decoupled weight decay, times the learning rate; biases and batch norm are spared", least=0
    )


@dataclass
class Sgd(Optimizer):
    name: str = key("sgd", "which optimizer; chosen by optimizer=NAME", choices=("sgd",))
    momentum: float = key(0.9, "momentum", least=0, below=1)
    nesterov: bool = key(True, "look ahead (Nesterov)")


@dataclass
class Adamw(Optimizer):
    name: str = key("adamw", "which optimizer; chosen by optimizer=NAME", choices=("adamw",))
    beta_1: float = key(0.9, "decay of the first moment", least=0, below=1)
    beta_2: float = key(0.999, "decay of the second moment", least=0, below=1)
    epsilon: float = key(1e-7, "added to the denominator", above=0)


@dataclass
class Rmsprop(Optimizer):
    name: str = key("rmsprop", "which optimizer; chosen by optimizer=NAME", choices=("rmsprop",))
    rho: float = key(0.9, "decay of the squared gradient", least=0, below=1)
    momentum: float = key(0.9, "momentum", least=0, below=1)
    epsilon: float = key(1.0, "added to the denominator", above=0)


@dataclass
class Schedule:
    """Constant learning rate after the warm-up; what every schedule has."""

    name: str = key(
        "constant",
        "how the learning rate moves; chosen by schedule=NAME",
        choices=("constant", "cosine", "exponential", "step"),
    )
    warmup_epochs: float = key(0.0, "the learning rate climbs linearly from 0", unit="epochs", least=0)


@dataclass
class CosineSchedule(Schedule):
    name: str = key("cosine", "how the learning rate moves; chosen by schedule=NAME", choices=("cosine",))
    final_fraction: float = key(0.0, "learning rate at the end", unit="of the peak", least=0, most=1)


@dataclass
class ExponentialSchedule(Schedule):
    name: str = key("exponential", "how the learning rate moves; chosen by schedule=NAME", choices=("exponential",))
    factor: float = key(0.94, "what the learning rate is multiplied by", above=0, most=1)
    every_epochs: float = key(2.0, "how often", unit="epochs", above=0)


@dataclass
class StepSchedule(Schedule):
    name: str = key("step", "how the learning rate moves; chosen by schedule=NAME", choices=("step",))
    factor: float = key(0.1, "what the learning rate is multiplied by at each milestone", above=0, most=1)
    milestones: list[float] = key([0.5, 0.75], "where, as shares of the steps after the warm-up", above=0, below=1)


@dataclass
class EarlyStopping:
    metric: str | None = key(None, "stop when this metric no longer improves; null: never", choices=METRICS)
    patience_epochs: int = key(10, "how long it may stay without improving", unit="epochs", least=1)
    min_delta: float = key(0.0, "what counts as improving", least=0)


@dataclass
class Checkpoint:
    """All null: every epoch. Checkpoints change no bit of a run."""

    every_epochs: int | None = key(None, "save all state after so many epochs", unit="epochs", least=1)
    every_steps: int | None = key(None, "save all state after so many steps", unit="steps", least=1)
    every_minutes: float | None = key(None, "save all state after so much time", unit="minutes", above=0)
    keep: int = key(2, "how many checkpoints stay on disk", unit="checkpoints", least=1)


@dataclass
class Rollback:
    """What `on_divergence=rollback` does."""

    learning_rate_factor: float = key(0.5, "what the learning rate is multiplied by each time", above=0, below=1)
    at_most: int = key(3, "how often, before the run stops after all", unit="times", least=1)


@dataclass
class Evaluate:
    test: bool = key(True, "measure the best weights on the test split at the end; sweeps that choose leave it off")
    views: str = key(
        "one",
        "views of an image whose answers are averaged in that (test-time augmentation)",
        choices=("one", "mirror", "ten_crop"),
    )
    report: bool = key(True, "draw pictures and write report.html at the end; without a test, of the validation split")


@dataclass
class Tracking:
    uri: str | None = key(None, "MLflow store or server; null: mlflow.db beside the Makefile")
    experiment: str = key("inception", "name of the MLflow experiment and of the folder under runs/")
    log_model: bool = key(True, "log the inference model to MLflow")
    every_steps: int = key(
        50, "how often training metrics, means since the epoch's start, are written", unit="steps", least=1
    )
    gradients: bool = key(False, "write the norm of the gradient, of all and of the first layer, with them")
    wait_seconds: float = key(60.0, "how long the end of a run waits for its MLflow record", unit="seconds", least=0)


@dataclass
class Sweep:
    """How several runs are made of one command; changes no bit of any of them and is no part of them."""

    search: str = key("grid", "which trials there are", choices=("grid", "random", "tpe", "asha"))
    space: dict[str, str] = key({}, "what differs, by key, as on the command line; from conf/sweep/ by sweep=NAME")
    trials: int = key(20, "how many points a search tries (random, tpe, asha)", unit="points", least=1)
    first_epochs: int = key(1, "when points are compared for the first time (asha)", unit="epochs", least=1)
    reduction: int = key(3, "one of so many goes on, for so many times the epochs (asha)", least=2)
    seeds: int = key(1, "how many seeds, from seed on, every point is run with", unit="seeds", least=1)
    parallel: int | None = key(
        None, "how many at a time; null: one for every two cores, or for every GPU", unit="trials", least=1
    )
    engine: str = key("processes", "what runs the trials; ray: a Ray cluster", choices=("processes", "ray"))
    minutes: float | None = key(None, "how long one trial may take; null: as long as it likes", unit="minutes", above=0)
    retries: int = key(1, "how often a trial that was killed goes on again", unit="times", least=0)
    halve_batch: bool = key(False, "a trial that lacked memory is run again with half the batch, as another run")
    keep_checkpoints: bool = key(False, "keep those of trials that are over, to train them longer")
    fail_fast: bool = key(False, "stop the whole sweep at the first trial that fails")
    dry_run: bool = key(False, "check all trials and list them, and run none")
    fresh: bool = key(False, "begin anew instead of going on with the sweep of the same words")
    most: int = key(200, "how many trials are meant at most", unit="trials", least=1)
    trial: str | None = key(None, "file of a frozen trial, which is then run; a sweep tells its processes so")
    until: int | None = key(None, "epoch after which that trial pauses", unit="epochs", least=1)
    final: list[str] = key([], "keys that are true for that trial now: what only the best gets")


@dataclass
class Expectation:
    """What a claim says of two variants: of `variant` minus `against`, paired over seeds, or of their ratio."""

    variant: str = key("", "the one that the claim is about")
    against: str = key("", "the one that it is compared with")
    metric: str = key("test_accuracy", "which figure of a run")
    expect: str = key("higher", "what is claimed", choices=("higher", "lower", "not lower", "ratio"))
    margin: float = key(0.0, "difference that would matter", least=0)
    least: float = key(0.0, "lowest ratio that agrees with the claim", least=0)
    most: float = key(0.0, "highest ratio that agrees with the claim", least=0)


@dataclass
class Claim:
    """What an experiment asks, written down before it is run; `make claims` answers. No part of any run."""

    hypothesis: str = key("", "the claim in one sentence")
    source: str = key("", "who claims it, and where")
    variants: dict[str, list[str]] = key({}, "what differs: words on top of the experiment, by name")
    settings: dict[str, list[str]] = key({}, "where it is tried: words on top of those, by name")
    seeds: int = key(6, "how many seeds, from seed on, every variant is run with", unit="seeds", least=2)
    expectations: list[Expectation] = key([], "what has to be so in every setting for the claim to be supported")


@dataclass
class Stage:
    """Some epochs of fine-tuning in which a part of the network, and all behind it, learns."""

    epochs: int = key(1, "passes over the training split", unit="epochs", least=1)
    from_part: str = key("all", "the first part that learns: all, upper (half of them), head, or one of the model's")
    learning_rate_factor: float = key(1.0, "of optimizer.learning_rate; the schedule runs in every stage", above=0)


@dataclass
class FineTune:
    """Training that starts from `model.weights`: frozen parts keep their weights and their statistics."""

    stages: list[Stage] = key(
        [], "one after the other: epochs, from_part, learning_rate_factor; none: everything learns at once"
    )
    layer_decay: float = key(1.0, "learning rate of a part as a share of that of the part behind it", above=0, most=1)
    new_head: bool = key(True, "with stages: the classifier starts anew, also where that of model.weights would fit")


@dataclass
class Distill:
    """Learning from a larger network's answers, too."""

    teacher: str | None = key(None, "the folder of a finished run on the same classes and image size; null: none")
    weight: float = key(0.7, "share of the loss that is the distance to the teacher's answers", above=0, most=1)
    temperature: float = key(4.0, "what both networks' logits are divided by for that", least=1, most=100)


@dataclass
class Distributed:
    """Several processes that train one network, each on a part of every batch (backend=jax)."""

    coordinator: str | None = key(None, "HOST:PORT where process 0 waits for the others; null: there is one process")
    processes: int = key(1, "how many there are", unit="processes", least=1)
    index: int = key(0, "which one this is; 0 leads, and it alone writes", least=0)
    wait_seconds: float = key(50.0, "how long they wait for each other at the start", unit="seconds", above=0)


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
    seed: int = key(0, "start of all randomness", least=0, most=2**31 - 1)
    epochs: int = key(12, "passes over the training split", unit="epochs", least=1)
    steps_per_epoch: int | None = key(None, "cut every epoch after so many steps, to try things out", least=1)
    batch_size: int = key(32, "examples per step; the last incomplete batch is dropped", unit="examples", least=1)
    precision: str = key(
        "auto",
        "policy of computation; auto: by device",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    backend: str = key("tensorflow", "what Keras computes with", choices=("tensorflow", "jax"))
    device: str = key("auto", "where to compute; auto: the GPU where there is one", choices=("auto", "cpu", "gpu"))
    devices: str = key("1", "how many devices of this process share a batch: a number, or all there are (backend=jax)")
    gpu_memory: int | None = key(
        None, "how much of the GPU's memory it may take; null: as much as it comes to need", unit="MiB", least=1
    )
    jit: str = key(
        "auto",
        "XLA compilation, which TensorFlow does not make deterministic; auto: by backend and device",
        choices=("auto", "on", "off"),
    )
    threads: int | None = key(
        None, "compute threads; null: what was fastest for the network, at most one per core", least=1, most=1024
    )
    deterministic: bool = key(True, "the same bits for the same config, data and machine")
    label_smoothing: float = key(0.0, "share of a label spread over all classes", least=0, below=1)
    ema: float | None = key(
        None, "decay of averaged weights, which are then evaluated and kept; null: none", above=0, below=1
    )
    gradient_clip: float | None = key(None, "largest global norm of the gradient; null: none", above=0)
    gradient_accumulation: int = key(1, "steps whose gradients are averaged into one update", unit="steps", least=1)
    on_divergence: str = key(
        "stop",
        "when a number is no longer finite: stop, or go back to the last checkpoint with a lower learning rate",
        choices=("stop", "rollback"),
    )
    run_dir: str | None = key(None, "where the run lies; null: runs/<experiment>/<time>-<short id>")


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
        for name in USUAL_IMAGE
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
    return max(USUAL_IMAGE[config.data.name], SMALLEST_IMAGE[config.model.name])


def options(group: Any) -> dict[str, Any]:
    """A group's keys as the plain arguments of the builder behind its name."""
    return {item.name: getattr(group, item.name) for item in fields(group) if item.name != "name"}
