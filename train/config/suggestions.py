"""What was meant by a name that does not exist here: words of other frameworks, and typing mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from train.cli.arguments import nearest_key
from train.cli.fields import nearest

# Key as other frameworks name it, without its section -> our key.
KEY_SYNONYMS = {
    "accelerator": "device",
    "accum": "gradient_accumulation",
    "accumulate_grad_batches": "gradient_accumulation",
    "accumulation_steps": "gradient_accumulation",
    "amp": "precision",
    "arch": "model",
    "architecture": "model",
    "aug": "augment",
    "augmentation": "augment",
    "backbone": "model",
    "batch": "batch_size",
    "batchsize": "batch_size",
    "beta1": "optimizer.beta_1",
    "beta2": "optimizer.beta_2",
    "bs": "batch_size",
    "clip_grad": "gradient_clip",
    "clip_norm": "gradient_clip",
    "clipnorm": "gradient_clip",
    "compile": "jit",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data",
    "dtype": "precision",
    "ema_decay": "ema",
    "epoch": "epochs",
    "eps": "optimizer.epsilon",
    "exp_name": "tracking.experiment",
    "experiment_name": "tracking.experiment",
    "global_clipnorm": "gradient_clip",
    "gpus": "devices",
    "grad_accum": "gradient_accumulation",
    "grad_clip": "gradient_clip",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_clip_val": "gradient_clip",
    "image_size": "data.image_size",
    "img_size": "data.image_size",
    "imgsz": "data.image_size",
    "input_size": "data.image_size",
    "jit_compile": "jit",
    "log_dir": "run_dir",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "schedule",
    "max_epochs": "epochs",
    "max_grad_norm": "gradient_clip",
    "mixed_precision": "precision",
    "mixup_alpha": "augment.mixup",
    "cutmix_alpha": "augment.cutmix",
    "name": "tracking.experiment",
    "net": "model",
    "network": "model",
    "num_epochs": "epochs",
    "num_gpus": "devices",
    "num_threads": "threads",
    "num_workers": "threads",
    "opt": "optimizer",
    "optim": "optimizer",
    "out_dir": "run_dir",
    "output_dir": "run_dir",
    "patience": "early_stopping.patience_epochs",
    "pretrained": "model.weights",
    "random_seed": "seed",
    "random_state": "seed",
    "resolution": "data.image_size",
    "save_dir": "run_dir",
    "scheduler": "schedule",
    "smoothing": "label_smoothing",
    "steps": "steps_per_epoch",
    "transform": "augment",
    "transforms": "augment",
    "tracking_uri": "tracking.uri",
    "val_split": "data.validation_fraction",
    "validation_split": "data.validation_fraction",
    "warmup": "schedule.warmup_epochs",
    "wd": "optimizer.weight_decay",
    "workers": "threads",
    "xla": "jit",
}

# Key -> value as others name it -> our value.
VALUE_SYNONYMS = {
    "model": {
        "googlenet": "inception_v1",
        "inception": "inception_v3",
        "inceptionresnet": "inception_resnet_v2",
        "inceptionresnetv2": "inception_resnet_v2",
        "inceptionv1": "inception_v1",
        "inceptionv3": "inception_v3",
        "inceptionv4": "inception_resnet_v2",
        "vgg": "vgg16",
        "vgg16d": "vgg16",
        "vgginception": "vgg16_inception",
    },
    "data": {
        "cifar": "cifar10",
        "fashion": "fashion_mnist",
        "files": "folder",
        "flowers": "tf_flowers",
        "imagefolder": "folder",
        "imagenet": "imagenet2012",
        "imagenet1k": "imagenet2012",
        "csv": "manifest",
    },
    "augment": {"flip": "flip_crop", "null": "none", "off": "none", "rand": "randaugment", "standard": "flip_crop"},
    "optimizer": {"adam": "adamw", "momentum": "sgd", "nesterov": "sgd", "rms": "rmsprop"},
    "schedule": {
        "cosineannealing": "cosine",
        "cosinedecay": "cosine",
        "exp": "exponential",
        "multistep": "step",
        "none": "constant",
        "null": "constant",
        "off": "constant",
    },
    "precision": {
        "16": "mixed_float16",
        "32": "float32",
        "amp": "mixed_float16",
        "bf16": "mixed_bfloat16",
        "bfloat16": "mixed_bfloat16",
        "float16": "mixed_float16",
        "fp16": "mixed_float16",
        "fp32": "float32",
        "full": "float32",
        "half": "mixed_float16",
        "single": "float32",
    },
    "device": {"cuda": "gpu", "cuda0": "gpu", "gpu0": "gpu"},
    "backend": {"tf": "tensorflow"},
    "jit": {"true": "on", "false": "off", "xla": "on"},
    "early_stopping.metric": {
        "accuracy": "validation/accuracy",
        "loss": "validation/loss",
        "mainaccuracy": "validation/accuracy",
        "trainaccuracy": "train/accuracy",
        "trainmainaccuracy": "train/accuracy",
        "validationmainaccuracy": "validation/accuracy",
        "valaccuracy": "validation/accuracy",
        "valloss": "validation/loss",
    },
    "sweep.search": {"bayesian": "tpe", "hyperband": "asha", "optuna": "tpe"},
}


def suggest_value(key: str, value: object, choices: Sequence[object]) -> object:
    """The choice that was meant, by another name or mistyped; None if none resembles it."""
    plain = "".join(filter(str.isalnum, str(value).lower()))
    synonym = VALUE_SYNONYMS.get(key, {}).get(plain)
    return synonym if synonym in choices else nearest(value, choices)


def suggest_key(key: str, available: Iterable[str]) -> str | None:
    """The key that was meant: the same name in another section, a synonym, or a mistyped one; None if unknown."""
    available = list(available)
    if other_name := other_name_of(key, available):
        return other_name
    return nearest_key(key, [name for name in available if ("." in name) == ("." in key)])


def other_name_of(key: str, available: Iterable[str]) -> str | None:
    """The key of the same name in another section, or the one that other frameworks call so; None if unknown."""
    leaf = key.rpartition(".")[2]
    synonym = KEY_SYNONYMS.get(leaf.lower().replace("-", "_"))
    matching = [name for name in available if name == synonym or name.rpartition(".")[2] == leaf]
    return synonym if synonym in matching else next(iter(matching), None)


def suggest_whole_number(text: str) -> int | None:
    """The whole number in `32.0`, `1e3`, `224x224` or `[224,224]`; None for any other text."""
    sides = {_whole_number(side) for side in text.strip("[]()").lower().replace("x", ",").split(",")}
    return sides.pop() if len(sides) == 1 else None


def _whole_number(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
