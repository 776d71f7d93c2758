"""The typed schema of a run: one dataclass per group, and for each key its meaning, unit and range.

This file holds types and defaults, YAML under conf/ the values that differ; validation.py checks the values. Nothing
here imports Hydra or TensorFlow, so that mistakes are reported at once. Some names and sizes are repeated here on
purpose; tests/config/test_config.py compares them with the code that they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli.fields import setting

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).resolve().parents[2]

# Smallest image side in pixels that a network's strides and unpadded convolutions allow.
MIN_IMAGE_SIZE = {
    "vgg16": 32,
    "vgg16_inception": 32,
    "inception_v1": 32,
    "inception_v3": 75,
    "inception_resnet_v2": 75,
}

# Layer groups that fine-tuning can unfreeze one by one, in order from the image; the head follows them.
_VGG_LAYER_GROUPS = tuple(f"block{number}" for number in range(1, 6))
LAYER_GROUPS = {
    "vgg16": _VGG_LAYER_GROUPS,
    "vgg16_inception": _VGG_LAYER_GROUPS,
    "inception_v1": ("stem", "inception_3", "inception_4", "inception_5"),
    "inception_v3": ("stem", *(f"mixed{number}" for number in range(11))),
    "inception_resnet_v2": ("stem", "mixed_5b", "block35", "mixed_6a", "block17", "mixed_7a", "block8", "conv_7b"),
}
ALL_LAYER_GROUPS, UPPER_LAYER_GROUPS, HEAD_LAYER_GROUP = "all", "upper", "head"

# Default image side in pixels of a data set, for `data.image_size=null`.
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

METRICS = ("validation/accuracy", "validation/loss", "train/accuracy", "train/loss")


class ConfigError(ValueError):
    """The user's input cannot be run; one line says what is wrong, what is allowed and what to do."""


class SeveralFaultsError(ConfigError):
    """Several faults of the user's input. messages: one line for each, and the number of those after the tenth."""

    def __init__(self, messages: list[str]) -> None:
        more = [f"{len(messages) - 10} more faults"] * (len(messages) > 10)
        self.messages = [*messages[:10], *more]
        super().__init__("; ".join(self.messages))


# --------------------------------------------------------------------------------------------------------- groups


@dataclass
class Model:
    """Keys of every network."""

    name: str = setting("", "network; chosen by model=NAME", choices=tuple(MIN_IMAGE_SIZE))
    width: float = setting(1.0, "multiplier of all channel counts", gt=0, le=4)
    head: str = setting(
        "avg", "classifier: fully connected layers, or global average or max pooling", choices=("fc", "avg", "max")
    )
    aux_weight: float = setting(0.3, "weight of each auxiliary loss; 0 builds no auxiliary head", ge=0, le=10)
    batch_norm_momentum: float = setting(
        0.9, "momentum of the moving statistics; 0.99 needs thousands of steps", ge=0, lt=1
    )
    weights: str | None = setting(
        None, "initial weights: a file (.weights.h5, .h5, .keras), or imagenet for those that Keras publishes"
    )


@dataclass
class Vgg16(Model):
    name: str = setting("vgg16", "network; chosen by model=NAME", choices=("vgg16",))


@dataclass
class Vgg16Inception(Model):
    name: str = setting("vgg16_inception", "network; chosen by model=NAME", choices=("vgg16_inception",))
    blocks: list[str] = setting(
        ["conv_bn", "conv_bn", "inception_v1", "conv_bn", "inception_v3"],
        "kind of each of the five blocks",
        choices=BLOCK_KINDS,
    )


@dataclass
class InceptionV1(Model):
    name: str = setting("inception_v1", "network; chosen by model=NAME", choices=("inception_v1",))
    batch_norm: bool = setting(True, "batch normalisation after every convolution; false: biases, as published")


@dataclass
class InceptionV3(Model):
    name: str = setting("inception_v3", "network; chosen by model=NAME", choices=("inception_v3",))


@dataclass
class InceptionResnetV2(Model):
    name: str = setting("inception_resnet_v2", "network; chosen by model=NAME", choices=("inception_resnet_v2",))


@dataclass
class Data:
    """Keys of every data set."""

    name: str = setting("", "data set; chosen by data=NAME", choices=tuple(DEFAULT_IMAGE_SIZE))
    image_size: int | None = setting(
        None,
        "image side after resizing; null: the data set's default, or the model's minimum if larger",
        unit="px",
        ge=1,
    )
    channels: int = setting(3, "1: greyscale, 3: colour; images are converted", choices=(1, 3))
    background: list[int] = setting(
        [255, 255, 255], "colour (red, green, blue) behind transparent pixels", ge=0, le=255
    )
    crop_fraction: float = setting(1.0, "centre crop for evaluation, as a fraction of the shorter side", gt=0, le=1)
    validation_fraction: float = setting(
        0.1, "fraction held out for validation if the data set has no such split", gt=0, lt=1
    )
    test_fraction: float = setting(0.2, "fraction held out for the test if the data set has no such split", gt=0, lt=1)
    directory: str = setting("data", "folder of prepared data sets (relative to the project)")
    fingerprint: str | None = setting(None, "required fingerprint of the data, from an earlier run; null: any")
    max_bytes: int = setting(2**26, "larger files count as unreadable", unit="bytes", ge=1)
    max_pixels: int = setting(50_000_000, "images with more pixels count as unreadable", unit="px", ge=1)
    on_error: str = setting(
        "raise", "what to do with unreadable examples: stop the run, or skip them", choices=("raise", "skip")
    )
    max_skipped: int = setting(100, "maximum number of unreadable examples to skip", unit="examples", ge=0)
    on_leak: str = setting(
        "warn",
        "what to do about duplicate images across splits or with different labels",
        choices=("warn", "drop", "raise"),
    )
    train_per_class: int | None = setting(
        None, "number of training examples per class; null: all", unit="examples", ge=1
    )
    cache: str = setting(
        "auto", "where decoded pixels are cached; auto: memory, else disk", choices=("auto", "memory", "disk", "none")
    )
    ram_budget: float = setting(1.0, "memory limit for decoded pixels", unit="GiB", ge=0)
    balanced: bool = setting(False, "sample every class equally often in training, instead of every example once")
    class_weights: bool = setting(False, "weight the loss so that all classes count the same")


@dataclass
class TfdsData(Data):
    manual_dir: str | None = setting(None, "folder with manually downloaded files of the data set; null: download")


@dataclass
class FolderData(Data):
    name: str = setting("folder", "data set; chosen by data=NAME", choices=("folder",))
    root: str | None = setting(None, "folder with one sub-folder of images per class")
    on_leak: str = setting(
        "raise",
        "what to do about duplicate images across splits or with different labels",
        choices=("warn", "drop", "raise"),
    )


@dataclass
class ManifestData(FolderData):
    name: str = setting("manifest", "data set; chosen by data=NAME", choices=("manifest",))
    file: str | None = setting(None, "CSV or JSON lines with path, label, optional column split")
    root: str | None = setting(None, "folder that the paths are relative to; null: the manifest's")


@dataclass
class Augment:
    """No augmentation; keys of every augmentation."""

    name: str = setting(
        "none",
        "augmentation; chosen by augment=NAME",
        choices=("none", "crop", "flip_crop", "inception", "randaugment"),
    )
    erase: float = setting(0.0, "probability of random erasing", ge=0, le=1)
    mixup: float = setting(0.0, "alpha of mixup; 0: off", ge=0)
    cutmix: float = setting(0.0, "alpha of CutMix; 0: off; with mixup, each half of the time", ge=0)


@dataclass
class CropAugment(Augment):
    pad: float = setting(0.125, "maximum shift of a crop", unit="of the side", ge=0, le=0.5)


@dataclass
class InceptionAugment(Augment):
    name: str = setting("inception", "augmentation; chosen by augment=NAME", choices=("inception",))
    least_area: float = setting(0.08, "smallest area of a crop, as a fraction of the image", gt=0, le=1)
    most_stretch: float = setting(4 / 3, "largest aspect ratio of a crop", ge=1)
    color: float = setting(1.0, "strength of brightness, contrast, saturation and hue changes; 0: off", ge=0, le=1)
    mirror: bool = setting(True, "flip images horizontally with probability 1/2")


@dataclass
class RandAugment(Augment):
    name: str = setting("randaugment", "augmentation; chosen by augment=NAME", choices=("randaugment",))
    ops: int = setting(2, "number of operations per image", ge=1, le=14)
    magnitude: float = setting(9.0, "strength of each operation", ge=0, le=30)
    pad: float = setting(0.125, "maximum shift of a crop", unit="of the side", ge=0, le=0.5)
    mirror: bool = setting(True, "flip images horizontally with probability 1/2")


@dataclass
class Optimizer:
    """Keys of every optimizer."""

    name: str = setting("", "optimizer; chosen by optimizer=NAME", choices=("sgd", "adamw", "rmsprop"))
    learning_rate: float = setting(0.01, "peak learning rate, after the warm-up", gt=0)
    weight_decay: float = setting(
        0.0, "decoupled weight decay, times the learning rate; not applied to biases and batch norm", ge=0
    )


@dataclass
class Sgd(Optimizer):
    name: str = setting("sgd", "optimizer; chosen by optimizer=NAME", choices=("sgd",))
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = setting(True, "use Nesterov momentum")


@dataclass
class Adamw(Optimizer):
    name: str = setting("adamw", "optimizer; chosen by optimizer=NAME", choices=("adamw",))
    beta_1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta_2: float = setting(0.999, "decay of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-7, "added to the denominator", gt=0)


@dataclass
class Rmsprop(Optimizer):
    name: str = setting("rmsprop", "optimizer; chosen by optimizer=NAME", choices=("rmsprop",))
    rho: float = setting(0.9, "decay of the squared gradient", ge=0, lt=1)
    momentum: float = setting(0.9, "momentum", ge=0, lt=1)
    epsilon: float = setting(1.0, "added to the denominator", gt=0)


@dataclass
class Schedule:
    """Constant learning rate after the warm-up; keys of every schedule."""

    name: str = setting(
        "constant",
        "learning-rate schedule; chosen by schedule=NAME",
        choices=("constant", "cosine", "exponential", "step"),
    )
    warmup_epochs: float = setting(0.0, "linear warm-up from 0", unit="epochs", ge=0)


@dataclass
class CosineSchedule(Schedule):
    name: str = setting("cosine", "learning-rate schedule; chosen by schedule=NAME", choices=("cosine",))
    final_fraction: float = setting(0.0, "final learning rate", unit="of the peak", ge=0, le=1)


@dataclass
class ExponentialSchedule(Schedule):
    name: str = setting("exponential", "learning-rate schedule; chosen by schedule=NAME", choices=("exponential",))
    factor: float = setting(0.94, "learning-rate factor of each decay", gt=0, le=1)
    every_epochs: float = setting(2.0, "interval between decays", unit="epochs", gt=0)


@dataclass
class StepSchedule(Schedule):
    name: str = setting("step", "learning-rate schedule; chosen by schedule=NAME", choices=("step",))
    factor: float = setting(0.1, "learning-rate factor at each milestone", gt=0, le=1)
    milestones: list[float] = setting(
        [0.5, 0.75], "milestones, as fractions of the steps after the warm-up", gt=0, lt=1
    )


@dataclass
class EarlyStopping:
    metric: str | None = setting(
        None, "stop when this metric of the main head no longer improves; null: never", choices=METRICS
    )
    patience_epochs: int = setting(10, "maximum time without improvement", unit="epochs", ge=1)
    min_delta: float = setting(0.0, "smallest change that counts as an improvement", ge=0)


@dataclass
class Checkpoint:
    """With no interval set, every epoch is saved. Checkpoints change no bit of a run."""

    every_epochs: int | None = setting(None, "interval between checkpoints, in epochs", unit="epochs", ge=1)
    every_steps: int | None = setting(None, "interval between checkpoints, in steps", unit="steps", ge=1)
    every_minutes: float | None = setting(None, "interval between checkpoints, in minutes", unit="minutes", gt=0)
    keep: int = setting(2, "number of checkpoints kept on disk", unit="checkpoints", ge=1)


@dataclass
class Rollback:
    """Keys of `on_divergence=rollback`."""

    learning_rate_factor: float = setting(0.5, "learning-rate factor of each rollback", gt=0, lt=1)
    at_most: int = setting(3, "maximum number of rollbacks", unit="times", ge=1)


@dataclass
class Evaluate:
    test: bool = setting(
        True, "evaluate the best weights on the test split at the end; in a sweep, of the best trial only"
    )
    views: str = setting(
        "one",
        "test-time augmentation: views averaged per image",
        choices=("one", "mirror", "ten_crop"),
    )
    report: bool = setting(
        True, "draw plots and write report.html at the end; of the validation split if evaluate.test=false"
    )


@dataclass
class Tracking:
    uri: str | None = setting(None, "MLflow store or server; null: mlflow.db beside the Makefile")
    experiment: str = setting("inception", "name of the MLflow experiment and of the folder under runs/")
    log_model: bool = setting(True, "log the inference model to MLflow")
    every_steps: int = setting(
        50, "interval for writing training metrics, as means since the start of the epoch", unit="steps", ge=1
    )
    gradients: bool = setting(False, "also write the gradient norm, of the network and of its first layer")
    wait_seconds: float = setting(60.0, "how long a finished run waits for its upload to MLflow", unit="seconds", ge=0)


@dataclass
class Sweep:
    """How one command starts several runs; changes no bit of any run and is not part of it."""

    search: str = setting("grid", "search algorithm", choices=("grid", "random", "tpe", "asha"))
    space: dict[str, str] = setting(
        {}, "values or ranges to try, by key; loaded from conf/sweep/ by sweep=NAME", internal=True
    )
    trials: int = setting(20, "number of points to try (random, tpe, asha)", unit="points", ge=1)
    first_epochs: int = setting(1, "epochs before the first comparison (asha)", unit="epochs", ge=1)
    reduction: int = setting(
        3, "reduction factor: one in this many continues, for this many times the epochs (asha)", ge=2
    )
    seeds: int = setting(1, "number of seeds per point, counted up from seed", unit="seeds", ge=1)
    parallel: int | None = setting(
        None, "number of trials at a time; null: one per two cores, or per GPU", unit="trials", ge=1
    )
    engine: str = setting(
        "processes", "where trials run: local processes, or a Ray cluster", choices=("processes", "ray")
    )
    minutes: float | None = setting(None, "time limit of one trial; null: none", unit="minutes", gt=0)
    retries: int = setting(1, "number of times to resume a trial that was killed", unit="times", ge=0)
    halve_batch: bool = setting(
        False, "run a trial that ran out of memory again, with half the batch size, as a new run"
    )
    keep_checkpoints: bool = setting(False, "keep the checkpoints of ended trials, to train them longer")
    fail_fast: bool = setting(False, "stop the whole sweep at the first failed trial")
    dry_run: bool = setting(False, "check and list all trials, run none")
    fresh: bool = setting(False, "start a new sweep instead of resuming the one with the same arguments")
    most: int = setting(200, "maximum number of trials; guards against typing mistakes", unit="trials", ge=1)
    trial: str | None = setting(None, "file of the trial to run", internal=True)
    until: int | None = setting(None, "epoch after which the trial pauses", unit="epochs", ge=1, internal=True)
    final: list[str] = setting([], "settings enabled for the final run", internal=True)


@dataclass
class Expectation:
    """What a claim expects of two variants: of `variant` minus `against`, paired over seeds, or of their ratio."""

    variant: str = setting("", "variant that the claim is about")
    against: str = setting("", "variant that it is compared with")
    metric: str = setting("test_accuracy", "metric of a run")
    expect: str = setting("higher", "claimed relation", choices=("higher", "lower", "not lower", "ratio"))
    margin: float = setting(0.0, "smallest difference that matters", ge=0)
    least: float = setting(0.0, "lowest ratio that agrees with the claim", ge=0)
    most: float = setting(0.0, "highest ratio that agrees with the claim", ge=0)


@dataclass
class Claim:
    """The hypothesis of an experiment, written down before it is run by `make claims`; not part of any run."""

    hypothesis: str = setting("", "the claim in one sentence")
    source: str = setting("", "source of the claim")
    variants: dict[str, list[str]] = setting({}, "overrides of each variant, on top of the experiment, by name")
    settings: dict[str, list[str]] = setting({}, "overrides of each setting, on top of the variant, by name")
    seeds: int = setting(6, "number of seeds per variant, counted up from seed", unit="seeds", ge=2)
    expectations: list[Expectation] = setting([], "what must hold in every setting for the claim to be supported")


@dataclass
class FineTuneStage:
    """Some epochs of fine-tuning that train one layer group and all those after it."""

    epochs: int = setting(1, "passes over the training split", unit="epochs", ge=1)
    from_part: str = setting("all", "first trainable layer group: all, upper (half), head, or a group of the model")
    learning_rate_factor: float = setting(
        1.0, "factor of optimizer.learning_rate; every stage runs the whole schedule", gt=0
    )


@dataclass
class FineTune:
    """Training from `model.weights`: frozen layer groups keep their weights and their statistics."""

    stages: list[FineTuneStage] = setting(
        [], "stages, each with epochs, from_part, learning_rate_factor; empty: train everything at once"
    )
    layer_decay: float = setting(
        1.0, "learning rate of a layer group, as a fraction of that of the next group", gt=0, le=1
    )
    new_head: bool = setting(True, "with stages: initialise a new classifier even if that of model.weights fits")


@dataclass
class Distill:
    """Knowledge distillation: training on the predictions of a larger network, too."""

    teacher: str | None = setting(None, "folder of a finished run with the same classes and image size; null: none")
    weight: float = setting(
        0.7,
        "weight of the distillation loss, to the teacher's predictions; the loss to the labels has the rest",
        gt=0,
        le=1,
    )
    temperature: float = setting(4.0, "temperature of both networks' softmax in the distillation loss", ge=1, le=100)


@dataclass
class Distributed:
    """Several processes that train one network, each on a shard of every batch (backend=jax)."""

    coordinator: str | None = setting(None, "HOST:PORT where process 0 waits for the others; null: a single process")
    processes: int = setting(1, "number of processes", unit="processes", ge=1)
    index: int = setting(0, "index of this process; process 0 is the leader and the only one that writes", ge=0)
    wait_seconds: float = setting(50.0, "how long processes wait for each other at the start", unit="seconds", gt=0)


@dataclass
class Config:
    """The config of a run."""

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
    seed: int = setting(0, "seed of all randomness", ge=0, le=2**31 - 1)
    epochs: int = setting(12, "passes over the training split", unit="epochs", ge=1)
    steps_per_epoch: int | None = setting(None, "limit the steps of every epoch, for quick tries; null: no limit", ge=1)
    batch_size: int = setting(32, "examples per step; the last incomplete batch is dropped", unit="examples", ge=1)
    precision: str = setting(
        "auto",
        "Keras dtype policy; auto: by device and model",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    backend: str = setting("tensorflow", "Keras backend", choices=("tensorflow", "jax"))
    device: str = setting("auto", "device to compute on; auto: a GPU if there is one", choices=("auto", "cpu", "gpu"))
    devices: str = setting("1", "number of devices in this process that share a batch, or all (backend=jax)")
    gpu_memory: int | None = setting(None, "GPU memory limit; null: grows as needed", unit="MiB", ge=1)
    jit: str = setting(
        "auto",
        "XLA compilation, not deterministic in TensorFlow; auto: by backend, device and model",
        choices=("auto", "on", "off"),
    )
    threads: int | None = setting(
        None, "compute threads; null: the fastest number measured for the model, at most one per core", ge=1, le=1024
    )
    deterministic: bool = setting(True, "bit-identical results for the same config, data and machine")
    label_smoothing: float = setting(0.0, "fraction of a label spread over all classes", ge=0, lt=1)
    ema: float | None = setting(
        None,
        "decay of the exponential moving average of weights, which is then evaluated and saved; null: none",
        gt=0,
        lt=1,
    )
    gradient_clip: float | None = setting(None, "maximum global norm of the gradient; null: none", gt=0)
    gradient_accumulation: int = setting(
        1, "number of steps whose gradients are averaged into one update", unit="steps", ge=1
    )
    on_divergence: str = setting(
        "stop",
        "what to do when the loss is not finite: stop, or roll back to the last checkpoint with a lower learning rate",
        choices=("stop", "rollback"),
    )
    run_dir: str | None = setting(None, "folder of the run; null: runs/<experiment>/<time>-<short id>")


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
    """The image side in pixels; for `data.image_size=null`, the default of the data set and model."""
    if config.data.image_size is not None:
        return config.data.image_size
    return max(DEFAULT_IMAGE_SIZE[config.data.name], MIN_IMAGE_SIZE[config.model.name])


def options(group: DataclassInstance) -> dict[str, Any]:  # passed on as keyword arguments of many types
    """The keys of a group, except `name`, as keyword arguments for its builder."""
    return {item.name: getattr(group, item.name) for item in fields(group) if item.name != "name"}
