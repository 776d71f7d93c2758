"""The schema, the shipped YAML, and the messages about errors."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from support.commands import ROOT, Done, run_command, run_train
from train.config import composition as composer
from train.config import overrides
from train.config import schema as schema
from train.config.composition import compose
from train.config.schema import Config, ConfigError, Sweep
from train.config.serialization import Redactor, config_hash, flatten, strip_credentials, to_dict

DEFAULT = {
    "model.name": "vgg16_inception",
    "model.width": 1.0,
    "model.head": "avg",
    "model.aux_weight": 0.3,
    "model.weights": None,
    "model.batch_norm_momentum": 0.9,
    "model.blocks": ["conv_bn", "conv_bn", "inception_v1", "conv_bn", "inception_v3"],
    "data.name": "digits",
    "data.image_size": 32,
    "data.channels": 1,
    "data.validation_fraction": 0.1,
    "data.test_fraction": 0.2,
    "data.directory": "data",
    "data.background": [255, 255, 255],
    "data.crop_fraction": 1.0,
    "data.fingerprint": None,
    "data.max_bytes": 67_108_864,
    "data.max_pixels": 50_000_000,
    "data.on_error": "raise",
    "data.max_skipped": 100,
    "data.on_leak": "warn",
    "data.train_per_class": None,
    "data.cache": "auto",
    "data.ram_budget": 1.0,
    "data.balanced": False,
    "data.class_weights": False,
    "augment.name": "crop",
    "augment.pad": 0.125,
    "augment.erase": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.01,
    "optimizer.weight_decay": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 1.0,
    "schedule.final_fraction": 0.0,
    "fine_tune.stages": [],
    "fine_tune.layer_decay": 1.0,
    "fine_tune.new_head": True,
    "devices": "1",
    "distributed.coordinator": None,
    "distributed.processes": 1,
    "distributed.index": 0,
    "distributed.wait_seconds": 50.0,
    "distill.teacher": None,
    "distill.weight": 0.7,
    "distill.temperature": 4.0,
    "early_stopping.metric": None,
    "early_stopping.patience_epochs": 10,
    "early_stopping.min_delta": 0.0,
    "checkpoint.every_epochs": None,
    "checkpoint.every_steps": None,
    "checkpoint.every_minutes": None,
    "checkpoint.keep": 2,
    "rollback.learning_rate_factor": 0.5,
    "rollback.at_most": 3,
    "on_divergence": "stop",
    "evaluate.test": True,
    "evaluate.views": "one",
    "evaluate.report": True,
    "tracking.uri": None,
    "tracking.experiment": "inception",
    "tracking.log_model": True,
    "tracking.gradients": False,
    "tracking.every_steps": 50,
    "tracking.wait_seconds": 60.0,
    "seed": 0,
    "epochs": 12,
    "steps_per_epoch": None,
    "batch_size": 32,
    "precision": "auto",
    "backend": "tensorflow",
    "device": "auto",
    "gpu_memory": None,
    "jit": "auto",
    "threads": None,
    "deterministic": True,
    "label_smoothing": 0.1,
    "ema": None,
    "gradient_clip": None,
    "gradient_accumulation": 1,
    "run_dir": None,
}

# Override -> the whole message.
MISTAKES = {
    "model=resnet": "model must be one of inception_resnet_v2, inception_v1, inception_v3, vgg16, vgg16_inception, "
    "got resnet",
    "model=vgg16_incpetion": "model must be one of inception_resnet_v2, inception_v1, inception_v3, vgg16, "
    "vgg16_inception, got vgg16_incpetion; did you mean model=vgg16_inception?",
    "modle=vgg16": 'unknown key "modle"; did you mean model?',
    "model.widht=2": 'unknown key "model.widht"; did you mean model.width?',
    "learning_rate=1": 'unknown key "learning_rate"; did you mean optimizer.learning_rate?',
    "+model.q=2": 'unknown key "model.q"; valid keys: model.aux_weight, model.batch_norm_momentum, '
    "model.blocks, model.head, model.weights, model.width",
    "model.batch_norm=false": "model.batch_norm exists only for model=inception_v1",
    "data.root=/tmp": "data.root exists only for data=folder or manifest",
    "epochs=three": "epochs must be a whole number, got three; use e.g. epochs=12",
    "epochs=1.5": "epochs must be a whole number, got 1.5; use e.g. epochs=12",
    "epochs=": "epochs must be a whole number, got ; use e.g. epochs=12",
    "epochs=0": "epochs must be at least 1, got 0; use e.g. epochs=12",
    "seed=null": "seed must be a whole number, got null; use e.g. seed=0",
    "batch_size=-1": "batch_size must be at least 1, got -1; use e.g. batch_size=32",
    "deterministic=maybe": "deterministic must be true or false, got maybe; use e.g. deterministic=true",
    "model.aux_weight=-0.1": "model.aux_weight must be at least 0 and at most 10, got -0.1; "
    "use e.g. model.aux_weight=0.3",
    "model.width=nan": "model.width must be a finite number, got nan; use e.g. model.width=1.0",
    "optimizer.learning_rate=inf": "optimizer.learning_rate must be a finite number, got inf; "
    "use e.g. optimizer.learning_rate=0.01",
    "augment.name=none": "augment.name cannot be set by itself, got none; use augment=none",
    "model.width=0": "model.width must be above 0 and at most 4, got 0.0; use e.g. model.width=1.0",
    "model.blocks=[conv,conv]": "model.blocks must name five blocks, got 2; "
    "use e.g. model.blocks=[conv_bn,conv_bn,inception_v1,conv_bn,inception_v3]",
    "model.blocks=conv": "model.blocks must be a list like [a,b], got conv; "
    "use e.g. model.blocks=[conv_bn,conv_bn,inception_v1,conv_bn,inception_v3]",
    "model.blocks=[conv,conv,conv,conv,wave]": "model.blocks must be one of conv, conv_bn, inception_naive, "
    "inception_v1, inception_two_3x3, inception_v3, inception_expanded, inception_3x3_reduce, single_1x1, single_3x3, "
    "single_5x5, got wave",
    "data.channels=2": "data.channels must be one of 1, 3, got 2",
    "data.image_size=31": "data.image_size must be at least 32 for vgg16_inception, got 31; use data.image_size=32",
    "tracking.uri=nonsense": "tracking.uri must be http(s)://host:port or sqlite:///path (or another database's "
    "address), got 'nonsense'; use e.g. tracking.uri=http://127.0.0.1:5000, or null for mlflow.db",
    "tracking.uri=http://me:pw@there/x?token=y": "arguments must be key=value, got tracking.uri=...; "
    "quote special characters twice: key=\"'...'\"",
    "tracking.uri='ftp://me:pw@there/x?token=y'": "tracking.uri must be http(s)://host:port or sqlite:///path (or "
    "another database's address), got 'ftp://there/x'; use e.g. tracking.uri=http://127.0.0.1:5000, or null for "
    "mlflow.db",
    "++tracking.uri=http://me:pw@there/x?token=y": "arguments must be key=value, got tracking.uri=...; "
    "quote special characters twice: key=\"'...'\"",
    "tracking.uri='http://[::1'": "tracking.uri must be http(s)://host:port or sqlite:///path (or another database's "
    "address), got 'http://[::1'; use e.g. tracking.uri=http://127.0.0.1:5000, or null for mlflow.db",
    "tracking.experiment=a/b": "tracking.experiment must be a plain name (no slash, no leading dot, not latest), "
    "got 'a/b'; use e.g. tracking.experiment=inception",
    "checkpoint.every_steps=5 checkpoint.every_minutes=0.5": "checkpoint.every_epochs, every_steps and every_minutes "
    "are mutually exclusive, got checkpoint.every_steps=5 checkpoint.every_minutes=0.5; "
    "set only one, or none to save every epoch",
    "on_divergence=ignore": "on_divergence must be one of stop, rollback, got ignore",
    "schedule.warmup_epochs=20": "schedule.warmup_epochs must be at most epochs (12), got 20; "
    "use e.g. schedule.warmup_epochs=1",
    "data.test_fraction=0.95": "data.validation_fraction and data.test_fraction must leave examples for training "
    "(sum below 1), got 0.1 + 0.95",
    "data.background=[0,0]": "data.background must be three numbers (red, green, blue), got [0, 0]; "
    "use e.g. data.background=[255,255,255]",
    "data.background=[0,0,256]": "data.background must be at least 0 and at most 255, got 256; "
    "use e.g. data.background=[255,255,255]",
    "jit=on": "jit=on is not deterministic in TensorFlow; add deterministic=false, or use jit=off",
    "data.balanced=true data.class_weights=true": "data.balanced and data.class_weights are mutually exclusive; "
    "set only one of them",
    "data.on_leak=ignore": "data.on_leak must be one of warn, drop, raise, got ignore",
    "augment.mixup=-1": "augment.mixup must be at least 0, got -1.0; use e.g. augment.mixup=0.0",
    "model=vgg16,inception_v1": "model takes a single value, got vgg16,inception_v1; "
    "to run both: make sweep model=vgg16,inception_v1",
    **{
        f"experiment=fine_tune model.weights=F fine_tune.stages.{typed}": f"fine_tune.stages{name} is not valid: "
        "fine_tune.stages must be a list like [{epochs:1,from_part:all,learning_rate_factor:1.0}]"
        for typed, name in {"0.epoch=2": "[0].epoch", "0.epochs=x": "[0].epochs", "7.epochs=2": "[7]"}.items()
    },
    "tracking.uri=//me:pw@there": "tracking.uri must be http(s)://host:port or sqlite:///path (or another database's "
    "address), got 'there'; use e.g. tracking.uri=http://127.0.0.1:5000, or null for mlflow.db",
    "model={": "arguments must be key=value, got model={; quote special characters twice: key=\"'...'\"",
}


MODELS = "inception_resnet_v2, inception_v1, inception_v3, vgg16, vgg16_inception"
STAGES = "[{epochs:1,from_part:all,learning_rate_factor:1.0}]"

# Override -> the whole message, which needs no composed config.
HINTS = {
    "lr=1": 'unknown key "lr"; did you mean optimizer.learning_rate?',
    "optimizer.lr=1": 'unknown key "optimizer.lr"; did you mean optimizer.learning_rate?',
    "bs=8": 'unknown key "bs"; did you mean batch_size?',
    "epoch=3": 'unknown key "epoch"; did you mean epochs?',
    "training.epochs=3": 'unknown key "training.epochs"; did you mean epochs?',
    "arch=vgg16": 'unknown key "arch"; did you mean model?',
    "wd=0.1": 'unknown key "wd"; did you mean optimizer.weight_decay?',
    "optimizer.beta1=0.9": 'unknown key "optimizer.beta1"; did you mean optimizer.beta_1 (only with optimizer=adamw)?',
    "optimizer=adamw optimizer.momentum=0.9": "optimizer.momentum exists only for optimizer=sgd or rmsprop",
    "experiment=fashion_mnist data.root=x": "data.root exists only for data=folder or manifest",
    "vgg16": "arguments must be key=value, got vgg16; use model=vgg16",
    "model=googlenet": f"model must be one of {MODELS}, got googlenet; did you mean model=inception_v1?",
    "model=inceptionv3": f"model must be one of {MODELS}, got inceptionv3; did you mean model=inception_v3?",
    "model=null": f"model must be one of {MODELS}, got null",
    "model=": f"model must be one of {MODELS}, got ",
    "optimizer=adam": "optimizer must be one of adamw, rmsprop, sgd, got adam; did you mean optimizer=adamw?",
    "augment=null": "augment must be one of crop, flip_crop, inception, none, randaugment, got null; "
    "did you mean augment=none?",
    "experiment=sing_digits": "experiment must be one of fashion_mnist, fine_tune, sign_digits, got sing_digits; "
    "did you mean experiment=sign_digits?",
    "sweep=rate": "sweep must be one of blocks, rates, got rate; did you mean sweep=rates?",
    "precision=bf16": "precision must be one of auto, float32, mixed_bfloat16, mixed_float16, got bf16; "
    "did you mean precision=mixed_bfloat16?",
    "precision=fp16": "precision must be one of auto, float32, mixed_bfloat16, mixed_float16, got fp16; "
    "did you mean precision=mixed_float16?",
    "precision=fp32": "precision must be one of auto, float32, mixed_bfloat16, mixed_float16, got fp32; "
    "did you mean precision=float32?",
    "device=cuda": "device must be one of auto, cpu, gpu, got cuda; did you mean device=gpu?",
    "early_stopping.metric=validation/main_accuracy": "early_stopping.metric must be one of validation/accuracy, "
    "validation/loss, train/accuracy, train/loss, got validation/main_accuracy; "
    "did you mean early_stopping.metric=validation/accuracy?",
    "batch_size=32.0": "batch_size must be a whole number, got 32.0; use batch_size=32",
    "epochs=1e3": "epochs must be a whole number, got 1e3; use epochs=1000",
    "data.image_size=224x224": "data.image_size must be a whole number or null, got 224x224; use data.image_size=224",
    "data.image_size=[64,64]": "data.image_size must be a whole number or null, got [64,64]; use data.image_size=64",
    "data.image_size=64x32": "data.image_size must be a whole number or null, got 64x32",
    "epochs=[1,2]": "epochs must be a whole number, got [1,2]; use e.g. epochs=12",
    "fine_tune.stages=head": f"fine_tune.stages must be a list like {STAGES}, got head",
    "fine_tune.stages=[{epoch:1}]": f"fine_tune.stages must be a list like {STAGES}, got [{{epoch:1}}]",
    "fine_tune.stages=[{epochs:0}]": "fine_tune.stages[0].epochs must be at least 1, got 0; "
    "use e.g. fine_tune.stages[0].epochs=1",
    "early_stopping=validation/loss": "early_stopping is a section and takes no value, got validation/loss; "
    "set one of its keys, e.g. early_stopping.metric=...",
    "early_stopping={patience:3}": 'unknown key "early_stopping.patience"; '
    "did you mean early_stopping.patience_epochs?",
    "model.name=vgg16": "model.name cannot be set by itself, got vgg16; use model=vgg16",
    "+epochs=3": "+epochs: the key exists already; omit the +",
    "+experiment=fine_tune": "+experiment: the key exists already; omit the +",
    "~epochs": "~epochs: a key cannot be removed; set it instead: epochs=VALUE",
    "~model": "~model: a key cannot be removed; set it instead: model=VALUE",
    "model@data=vgg16": "model@data is not supported: the package of a group is fixed; use model=NAME",
    "model=[vgg16,inception_v1]": "model takes a single value, got vgg16,inception_v1; "
    "to run both: make sweep model=vgg16,inception_v1",
    "seed=range(0,3)": "seed takes a single value, got range(0,3); to run all: make sweep seed=range(0,3)",
    "tracking.uri=http://me:pw,b": "tracking.uri takes a single value, got several",
    "tracking.url=http://me:pw@there/x?token=y": "arguments must be key=value, got tracking.url=...; "
    "quote special characters twice: key=\"'...'\"",
    "tracking.uri=//me:pw)pw@there": "arguments must be key=value, got tracking.uri=...; "
    "quote special characters twice: key=\"'...'\"",
    "+tracking.uri=postgresql:me:pw)pw@there": "arguments must be key=value, got tracking.uri=...; "
    "quote special characters twice: key=\"'...'\"",
    "tracking={uri:postgresql:me:pw)pw@there}": "arguments must be key=value, got tracking=...; "
    "quote special characters twice: key=\"'...'\"",
    "tracking=http://me:pw@there:5000": "tracking is a section and takes no value; set one of its keys, "
    "e.g. tracking.uri=...",
    "tracking=http://me:pw,b": "tracking takes a single value, got several",
    "tracking.uri={a:http://me:pw@there}": "tracking.uri must be a string or null",
    "epochs=http://me:pw@there": "epochs must be a whole number; use e.g. epochs=12",
    "experiment={a:1}": "experiment must be one of fashion_mnist, fine_tune, sign_digits, got {a:1}",
    "model={widht:0.5}": 'unknown key "model.widht"; did you mean model.width?',
    "model={width:9}": "model.width must be above 0 and at most 4, got 9.0; use e.g. model.width=1.0",
    "model=timm/resnet50": f"model must be one of {MODELS}, got timm/resnet50",
    "experiment=fashion.yaml": "experiment must be one of fashion_mnist, fine_tune, sign_digits, got fashion.yaml; "
    "did you mean experiment=fashion_mnist?",
    "experiment=null": "experiment=null is not needed: omit it",
    "sweep=null": "sweep=null is not needed: omit it",
    "schedule.milestones=0.5,0.75": "schedule.milestones takes a single value, got 0.5,0.75; "
    "use a list: schedule.milestones=[0.5,0.75]",
    "model.blocks=[conv,conv],[conv]": "model.blocks takes a single value, got [conv,conv],[conv]; "
    "to run all: make sweep model.blocks=[conv,conv],[conv]",
    "epochs=-1.0": "epochs must be a whole number, got -1.0; use e.g. epochs=12",
    "threads=0.0": "threads must be a whole number or null, got 0.0",
}


@pytest.mark.parametrize("typed", HINTS)
def test_override_is_rejected_before_anything_is_composed(typed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hydra.compose", lambda *_, **__: pytest.fail("composed"))
    with pytest.raises(ConfigError) as caught:
        compose(typed.split(" "))
    assert str(caught.value) == HINTS[typed]


FAULTS = {
    "optimizer.lr=0.1 model=googlenet": [HINTS["model=googlenet"], HINTS["optimizer.lr=1"]],
    "epoch=3 bs=8 seed=1": [HINTS["epoch=3"], HINTS["bs=8"]],
    "~epochs lr=1": [HINTS["~epochs"], HINTS["lr=1"]],
    "model=googlenet model.batch_norm=true": [HINTS["model=googlenet"]],  # which exists with the model that was meant
    "model=vgg16,inception_v1 model.batch_norm=true": [
        "model takes a single value, got vgg16,inception_v1; to run both: make sweep model=vgg16,inception_v1"
    ],
    "experiment=sing_digits data.root=x": [HINTS["experiment=sing_digits"]],  # which may choose the data
    " ".join(f"x{number}=1" for number in range(13)): ["3 more faults"],
}


@pytest.mark.parametrize("typed", FAULTS)
def test_every_fault_is_told_in_a_line(typed: str):
    with pytest.raises(ConfigError) as caught:
        compose(typed.split(" "))
    messages = getattr(caught.value, "messages", [str(caught.value)])
    assert messages[10:] or messages == FAULTS[typed]
    assert messages[10:] in ([], FAULTS[typed])


def test_several_faults_are_printed_one_a_line():
    done = run_train("optimizer.lr=0.1", "model=googlenet", "--check")
    lines = [f"error: {HINTS[typed]}\n" for typed in ("model=googlenet", "optimizer.lr=1")]
    assert done == Done(2, "", "".join(lines))


def test_valid_override_is_composed_after_the_checks(monkeypatch: pytest.MonkeyPatch):
    """Negative control of the test above."""
    monkeypatch.setattr("hydra.compose", lambda *_, **__: pytest.fail("composed"))
    with pytest.raises(pytest.fail.Exception, match="composed"):
        compose(["epochs=3"])


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("++epochs=3", "epochs", 3),
        ("~augment", "augment.name", "none"),
        ("~schedule", "schedule.name", "constant"),
        ("early_stopping={metric:validation/loss}", "early_stopping.metric", "validation/loss"),
        ("model.name=vgg16_inception", "model.name", "vgg16_inception"),
        ("experiment=claims/depth", "tracking.experiment", "claims"),
        ("experiment=fashion_mnist data.manual_dir=/x", "data.manual_dir", "/x"),
        ("experiment=fashion_mnist.yaml", "data.name", "fashion_mnist"),
        ("model=vgg16.yaml", "model.name", "vgg16"),
        ("~experiment", "epochs", 12),
        ("~sweep", "epochs", 12),
        ("optimizer={learning_rate:0.02,momentum:0.8}", "optimizer.momentum", 0.8),
        ("model={width:0.5}", "model.width", 0.5),
        ("data=mnist data={channels:3}", "data.channels", 3),
        ("augment={pad:0.1}", "augment.pad", 0.1),
        ("schedule={warmup_epochs:0}", "schedule.warmup_epochs", 0.0),
        ("sweep={trials:3}", "sweep.trials", 3),
        ("experiment=fine_tune model.weights=F fine_tune.stages.0.epochs=1", "model.weights", "F"),
        ("epochs='3'", "epochs", 3),
        ("schedule.warmup_epochs=0", "schedule.warmup_epochs", 0.0),
        ("data.directory=7", "data.directory", "7"),
        ("epochs=${batch_size}", "epochs", 32),
    ],
)
def test_unusual_forms_of_valid_overrides(typed: str, key: str, value: object):
    assert flatten(dataclasses.asdict(compose(typed.split(" "))))[key] == value


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("model=vgg16,inception_v1 model.batch_norm=true,false", "model.batch_norm exists only for model=inception_v1"),
        ("model=vgg16,resnet", f"model must be one of {MODELS}, got resnet"),
        (
            "model=glob(vgg*) model.blocks=[conv]",
            "model.blocks exists only for model=vgg16_inception",
        ),
        ("batch_size=8,big", "batch_size must be a whole number, got big; use e.g. batch_size=32"),
        ("epochs=range(0,3)", "epochs must be at least 1, got 0; use e.g. epochs=12"),
        ("model.width=interval(0.1,9)", "model.width must be above 0 and at most 4, got 9.0; use e.g. model.width=1.0"),
        ("seed=range(0,1,0)", "seed must be a range with a step other than 0; use e.g. seed=range(0,10,2)"),
        ("epochs=interval(1,5)", "epochs must be a whole number, got interval(1,5); use epochs=range(1,6)"),
        (
            "batch_size=interval(1.5,8)",
            "batch_size must be a whole number, got interval(1.5,8); use batch_size=range(2,9)",
        ),
        (
            "optimizer={learning_rate:1},{learning_rate:2}",
            "optimizer takes no mapping in a sweep; sweep over its keys: optimizer.KEY=a,b",
        ),
        ("optimizer.lr=tag(log,interval(0.1,1))", 'unknown key "optimizer.lr"; did you mean optimizer.learning_rate?'),
    ],
)
def test_every_value_of_a_sweep_is_checked(typed: str, expected: str):
    with composer.conf_loader() as loader, pytest.raises(ConfigError) as caught:
        overrides.check_overrides(typed.split(" "), loader, in_sweep=True)
    assert str(caught.value) == expected


def test_valid_sweep_passes_the_checks():
    typed = ["model=glob(*)", "seed=range(0,3)", "optimizer=sgd,rmsprop", "optimizer.momentum=interval(0.8,0.9)"]
    with composer.conf_loader() as loader:
        overrides.check_overrides(typed, loader, in_sweep=True)
        with pytest.raises(ConfigError, match="model takes a single value"):
            overrides.check_overrides(typed, loader)


def test_hydra_may_add_keys_that_only_swept_options_have():
    typed = ["optimizer=adamw,rmsprop", "optimizer.epsilon=1e-3", "optimizer.weight_decay=0", "seed=0,1", "data=mnist"]
    with composer.conf_loader() as loader:
        overrides.check_overrides(typed, loader, in_sweep=True)
        handed_over = overrides.add_missing_keys(typed, loader)
        alone = overrides.add_missing_keys(["optimizer=adamw", "optimizer.epsilon=1e-3"], loader)
    assert handed_over == [typed[0], "++optimizer.epsilon=1e-3", *typed[2:]]
    assert alone == ["optimizer=adamw", "optimizer.epsilon=1e-3"]


def test_sweep_over_options_takes_a_key_that_the_default_option_lacks():
    done = run_train("-m", "optimizer=adamw,rmsprop", "optimizer.epsilon=1e-3", "--check")
    assert done == Done(0, "1: optimizer=adamw\n2: optimizer=rmsprop\nthe config is valid\n", "")


BROKEN_FILES = {
    "epochs: [1": ("config.yaml, line ", "; correct the file"),
    "epochs: many": ("", "epochs must be a whole number; use e.g. epochs=12"),
    "epochz: 3": ("", 'unknown key "epochz"; did you mean epochs?'),
    "optimizer: {learning_rate: fast}": ("", "optimizer.learning_rate must be a number; use e.g. "),
    "optimizer: {lr: 1}": ("", 'unknown key "optimizer.lr"; did you mean optimizer.learning_rate?'),
    "model: {batch_norm: true}": ("", "model.batch_norm exists only for model=inception_v1"),
    "run_dir: ${nothing}": ("", "the reference ${...} in run_dir cannot be resolved; check its name, or set the env"),
    "epochs: 0": ("", "epochs must be at least 1, got 0; use e.g. epochs=12"),
}


@pytest.mark.parametrize("line", BROKEN_FILES)
def test_mistake_in_a_file_of_conf_is_reported_in_one_line(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    with (tmp_path / "conf/config.yaml").open("a") as file:
        file.write(f"\n{line}\n")
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose([])
    start, end = BROKEN_FILES[line]
    assert start in str(caught.value)
    assert end in str(caught.value)
    assert "\n" not in str(caught.value)


def test_option_of_the_users_own_has_the_keys_of_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    own = "defaults:\n  - /schema/model/inception_v1@_here_\n\nwidth: 0.5\n"
    (tmp_path / "conf/model/mine.yaml").write_text(own)
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    assert compose(["model=mine", "model.batch_norm=false"]).model == schema.InceptionV1(width=0.5, batch_norm=False)
    with pytest.raises(ConfigError, match=r"model must be one of .*, mine, .*, got mien; did you mean model=mine"):
        compose(["model=mien"])


def test_group_of_the_users_own_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/recipe").mkdir()
    (tmp_path / "conf/recipe/quick.yaml").write_text("# @package _global_\nepochs: 3\n")
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    assert compose(["+recipe=quick"]).epochs == 3
    with pytest.raises(ConfigError, match=r"^\+recipe must be one of quick, got quik; did you mean \+recipe=quick\?$"):
        compose(["+recipe=quik"])


def test_keys_are_checked_with_a_further_config_folder(tmp_path: Path):
    """Then only Hydra knows the options, so that it composes before anything is checked."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("defaults:\n  - /schema/model/vgg16@_here_\n")
    for typed, expected in (
        (["model=mine"], None),
        (["model=mine", "+model.q=2"], 'unknown key "model.q"; valid keys: model.aux_weight, '),
        (["model=mine", "epochz=3"], 'unknown key "epochz"; did you mean epochs?\n'),
        (["model=mine", "epochs=three"], "epochs must be a whole number; use e.g. epochs=12\n"),
        (["tracking.uri=http://me:pw@h,x"], "tracking.uri takes a single value, got several\n"),
        (["tracking.uri=http://me:pw)pw@h"], "arguments must be key=value, got tracking.uri=...; quote "),
        (["tracking=http://me:pw@h"], "tracking is a section and takes no value; set one of its keys, e.g. "),
        (["model=mien"], f"model must be one of {MODELS.replace('vgg16,', 'mine, vgg16,')}, got mien; did you mean "),
    ):
        done = run_train("--config-dir", str(tmp_path), *typed, "--check")
        assert done.code == (2 if expected else 0)
        assert done.err.startswith(f"error: {expected}" if expected else "")
        assert done.err.count("\n") <= 1


def test_mistakes_in_keys_of_hydra_are_reported_in_one_line():
    for typed, expected in (
        (
            "hydra/launcher=nothing",
            "hydra/launcher must be one of basic, processes, submitit_local, submitit_slurm, got ",
        ),
        ("hydra.jobb.name=x", 'unknown key "hydra.jobb'),
    ):
        done = run_train("-m", "seed=0,1", typed, "--check")
        assert done.code == 2
        assert done.err.startswith(f"error: {expected}")
        assert done.err.count("\n") == 1


def test_unknown_flag_is_named_in_one_line():
    assert run_train("--chekc") == Done(2, "", "error: unrecognized arguments: --chekc; --help lists the flags\n")


@pytest.mark.parametrize("words", [["--cfg", "jobs"], ["--info", "x"]])
def test_choices_of_a_flag_are_named_in_one_line(words: list[str]):
    from train.__main__ import ArgumentParser

    with pytest.raises(ValueError, match=r"invalid choice: '(jobs|x)' \(choose from .*\); --help lists the flags$"):
        ArgumentParser().parse_intermixed_args(words)


def test_flags_are_those_of_hydra():
    from hydra._internal.utils import get_args_parser

    from train.__main__ import ArgumentParser

    def options(parser: argparse.ArgumentParser) -> set[str]:
        return {option for action in parser._actions for option in action.option_strings}

    assert options(get_args_parser()) - {"-h", "--help", "--version"} == options(ArgumentParser()) - {"--check"}


def test_files_of_conf_repeat_no_default_of_the_schema():
    for group, names in schema.GROUPS.items():
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            values = yaml.safe_load(path.read_text())
            defaults = dataclasses.asdict(names[path.stem]())
            assert [name for name, value in values.items() if name in defaults and defaults[name] == value] == [], path
    values = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
    defaults = dataclasses.asdict(Config())
    assert [name for name, value in values.items() if name in defaults and defaults[name] == value] == []


def test_default_config_matches_the_expected_values():
    config = dataclasses.asdict(compose([]))
    assert config.pop("sweep") == dataclasses.asdict(Sweep())
    assert config.pop("claim") == dataclasses.asdict(schema.Claim())
    assert flatten(config) == DEFAULT


@pytest.mark.parametrize("typed", MISTAKES)
def test_invalid_config_is_reported_in_one_line(typed: str):
    with pytest.raises(ConfigError) as caught:
        compose(typed.split(" "))
    assert str(caught.value) == MISTAKES[typed]


def test_minimum_image_size_depends_on_the_model():
    with pytest.raises(ConfigError, match="at least 75 for inception_v3, got 74;"):
        compose(["model=inception_v3", "data.image_size=74"])
    assert compose(["model=inception_v3"]).data.image_size == 75
    assert compose(["model=inception_v3", "data=imagenette"]).data.image_size == 160


OPTIONS = [(group, path.stem) for group in schema.GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_shipped_option_composes(group: str, name: str):
    config = compose([f"{group}={name}"])
    chosen = getattr(config, group)
    assert chosen.name == name
    assert type(chosen) is schema.GROUPS[group][name]


def test_every_option_of_the_schema_is_shipped():
    assert {(group, name) for group, names in schema.GROUPS.items() for name in names} == set(OPTIONS)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))])
def test_every_shipped_experiment_composes_and_opens_with_its_command(name: str):
    compose([f"experiment={name}", *(["model.weights=x.h5"] if name == "fine_tune" else [])])
    first = (ROOT / "conf/experiment" / f"{name}.yaml").read_text().splitlines()[:3]
    assert any(f"make train experiment={name}" in line for line in first)


def test_every_key_has_a_description():
    nodes = [
        Config,
        schema.EarlyStopping,
        schema.Evaluate,
        schema.Tracking,
        schema.FineTuneStage,
        schema.FineTune,
        schema.Distill,
    ]
    nodes += [node for options in schema.GROUPS.values() for node in options.values()]
    for node in nodes:
        for item in dataclasses.fields(node):
            assert dataclasses.is_dataclass(item.default_factory) or item.metadata["text"], f"{node}.{item.name}"


def test_schema_names_and_sizes_match_the_implementations():
    from train import data, models
    from train.data.augmentation.policy import AUGMENTS
    from train.training import optimizers, schedules

    assert schema.MIN_IMAGE_SIZE == models.MIN_IMAGE_SIZE
    assert set(schema.BLOCK_KINDS) == set(models.BLOCK_KINDS)
    assert set(schema.DEFAULT_IMAGE_SIZE) == set(data.SOURCES)
    assert set(schema.GROUPS["model"]) == set(models.BUILDERS)
    assert set(schema.GROUPS["augment"]) == set(AUGMENTS)
    assert set(schema.GROUPS["optimizer"]) == set(optimizers.OPTIMIZERS)
    assert set(schema.GROUPS["schedule"]) == set(schedules.SCHEDULES)


def test_every_key_has_a_reader():
    """A group's keys are exactly what its builder takes; any other key is read by name somewhere."""
    from train import data, models
    from train.data import pipeline, pixel_cache
    from train.data.augmentation.policy import AUGMENTS, build
    from train.training import optimizers, schedules

    def keys(group: str, name: str) -> set[str]:
        return {item.name for item in dataclasses.fields(schema.GROUPS[group][name])} - {"name"}

    def takes(function) -> set[str]:
        data_and_state = {"images", "draws", "peak", "span", "_"}
        return {parameter.name for parameter in inspect.signature(function).parameters.values()} - data_and_state

    for name in schema.GROUPS["model"]:
        assert keys("model", name) == {*models.option_names(name), "weights"}, name
    for name in schema.GROUPS["augment"]:
        assert keys("augment", name) == takes(AUGMENTS[name]) | takes(build) - {"name", "options"}, name
    for name in schema.GROUPS["schedule"]:
        assert keys("schedule", name) == takes(schedules.SCHEDULES[name]) | {"warmup_epochs"}, name
    for name in schema.GROUPS["optimizer"]:
        keras_class = optimizers.OPTIMIZERS[name].__mro__[2]  # after ours
        assert keras_class.__module__.startswith("keras."), name
        assert keys("optimizer", name) - {"weight_decay"} <= takes(keras_class), name
    for name in schema.GROUPS["data"]:
        used = takes(data.load) | takes(pixel_cache.choose_cache) | takes(pipeline.train_batches)
        assert keys("data", name) - {"directory", "fingerprint"} <= used, name
    readers = [path for path in (ROOT / "train").rglob("*.py") if path.name != "schema.py"]
    sources = "".join(path.read_text() for path in [*readers, ROOT / "scripts/claims/claims.py"])
    for item in dataclasses.fields(Config):
        assert re.search(rf"\b(config|settings)\.{item.name}\b", sources), item.name  # settings: of the runtime
    for name in ("evaluate", "tracking", "fine_tune", "distill"):
        for item in dataclasses.fields(type(getattr(Config(), name))):
            assert re.search(rf"\b(config\.{name}|tracking|tuning)\.{item.name}\b", sources), item.name
    for item in dataclasses.fields(schema.FineTuneStage):
        assert re.search(rf"\bstage\.{item.name}\b", sources), item.name


def test_config_hash_covers_exactly_what_decides_the_result():
    base = config_hash(to_dict(compose([]), Redactor()))
    same = compose(["run_dir=/x", "tracking.uri=sqlite:////x.db", "tracking.every_steps=1"])
    assert config_hash(to_dict(same, Redactor())) == base
    for word in ("seed=1", "model.width=0.5", "augment=none", "precision=float32", "data.channels=3"):
        assert config_hash(to_dict(compose([word]), Redactor())) != base, word


def test_secrets_are_not_stored():
    config = compose(["tracking.uri='https://me:hunter2@host:5000/path?token=abc'"])
    assert to_dict(config, Redactor())["tracking"]["uri"] == "https://host:5000/path"
    for uri in ("sqlite:///mlflow.db", "sqlite:////abs/x.db", "http://127.0.0.1:5000"):
        assert strip_credentials(uri) == uri


def composed(*overrides: str) -> tuple[Redactor, dict]:
    """The redactor of a config, and what would be stored of it."""
    composer.register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = hydra_compose("config", overrides=list(overrides))
    private = composer.make_redactor(node)
    return private, to_dict(composer.to_config(node), private)


def test_environment_values_are_stored_as_references(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLACE", "/hunter2/place")
    monkeypatch.setenv("HOST", "host-hunter2")
    for word, key, shown in (
        ("run_dir=${oc.env:PLACE}", "run_dir", "${oc.env:PLACE}"),
        ("run_dir='${ oc.env:PLACE}'", "run_dir", "${ oc.env:PLACE}"),
        ("run_dir=${oc.env:PLACE}/x", "run_dir", "(from the environment)"),
        ("tracking.uri='http://me:typed-hunter2@${oc.env:HOST}:1'", "tracking.uri", "(from the environment)"),
        ("data.directory=${run_dir}", "data.directory", "${run_dir}"),
    ):
        text = "http://me:typed-hunter2@host-hunter2:1" if "HOST" in word else "at /hunter2/place/x"
        private, stored = composed(word, *(["run_dir=${oc.env:PLACE}"] if "data" in word else []))
        assert flatten(stored)[key] == shown, word
        assert "hunter2" not in str(stored), word
        assert "hunter2" not in private.redact(text), word


def test_password_of_a_url_is_redacted_encoded_and_decoded():
    private, _ = composed("tracking.uri='http://me:p%40ss-word@host:1'")
    assert private.redact("p%40ss-word or p@ss-word, me at home") == "*** or ***, me at home"


# ------------------------------------------------------------------------------------------------ the command line


def test_config_error_exits_with_2_in_one_line_without_tensorflow():
    done = run_train("epochs=three", env={"PYTHONPROFILEIMPORTTIME": "1"})
    error_lines = [line for line in done.err.splitlines() if not line.startswith("import time:")]
    assert (done.code, done.out) == (2, "")
    assert error_lines == ["error: epochs must be a whole number, got three; use e.g. epochs=12"]
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert "hydra" in imported
    assert not imported & {"tensorflow", "keras", "mlflow", "numpy", "sklearn", "matplotlib", "optuna", "rich.console"}
    assert len(imported) < 500  # a change that doubles the wait is seen; seconds would depend on the machine


def test_check_accepts_a_valid_config_without_training(tmp_path: Path):
    done = run_train("model=inception_v3", f"run_dir={tmp_path / 'run'}", "--check")
    assert (done.code, done.out, done.err) == (0, "the config is valid\n", "")
    assert not (tmp_path / "run").exists()
    assert run_train("model=inception_v3", "data.image_size=32", "--check").code == 2


def test_data_errors_are_found_before_tensorflow_is_imported(tmp_path: Path):
    done = run_train("data=folder", "--check")
    assert done.code == 2
    assert "data.root is missing; use data.root=PATH, a folder with one sub-folder of images per class" in done.err
    (tmp_path / "only").mkdir()
    done = run_train("data=folder", f"data.root={tmp_path}", "--check")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_value_of_an_environment_reference_is_not_shown_in_an_error():
    done = run_train("tracking.uri=${oc.env:PLACE}", "--check", env={"PLACE": "hunter2"})
    assert done.code == 2
    assert "hunter2" not in done.err + done.out
    assert "${oc.env:PLACE}" in done.err


def test_environment_value_of_the_wrong_type_is_not_shown():
    done = run_train("epochs=${oc.env:PLACE}", "--check", env={"PLACE": "hunter2"})
    assert done.code == 2
    assert "hunter2" not in done.err + done.out


def test_sweep_leaves_no_overrides_behind(tmp_path: Path):
    done = run_train(
        "-m", "seed=0,1", "tracking.uri='http://me:hunter2@host:1'", "--check", env={"TMPDIR": str(tmp_path)}
    )
    assert (done.code, done.out) == (0, "1: seed=0\n2: seed=1\nthe config is valid\n")
    assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "multirun").exists()


def test_missing_weights_are_reported_before_tensorflow_is_imported():
    done = run_train("model.weights='~/no/such.weights.h5'", "--check")
    assert done.code == 2
    assert done.err.startswith(f"error: model.weights={Path.home()}/no/such.weights.h5 is not a file")


def test_completion_offers_groups_and_keys():
    script = "source <(.venv/bin/inception-train -sc install=bash 2>/dev/null); complete -p inception-train"
    assert "hydra_bash_completion" in run_command("bash", "-c", script).out
    query = {"COMP_LINE": "inception-train model=", "COMP_POINT": "22"}
    done = run_command(sys.executable, "-m", "train", "-sc", "query=bash", env=query)
    assert {"model=vgg16", "model=inception_v3"} <= set(done.out.split())
    query = {"COMP_LINE": "inception-train optimizer.", "COMP_POINT": "26"}
    done = run_command(sys.executable, "-m", "train", "-sc", "query=bash", env=query)
    assert "optimizer.learning_rate=" in done.out.split()


def test_trainer_does_not_import_mlflow():
    """Nothing that training imports brings it in; the modules of the uploader import it when they need it."""
    script = "import sys, train.run.lifecycle, train.tracking.uploader; sys.exit('mlflow' in sys.modules)"
    assert run_command(sys.executable, "-c", script).code == 0


def test_unknown_hydra_error_is_not_hidden():
    from hydra.errors import HydraException

    assert overrides.explain(HydraException("something\nnew")) == "something new"
