"""A few steps of training on whatever backend Keras has: what tests compare, and run by itself another backend's.

KERAS_BACKEND=jax python tests/steps.py FOLDER      (FOLDER has a start.npz for every case; an end.npz is added)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from train import engine, losses, models, optim, step
from train.config import Config
from train.step.layerwise import Plan

STEPS, EXAMPLES, CLASSES = 4, 8, 5
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "ema": 0.9, "gradient_clip": 0.5, "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop"},
    "accumulation": {"optimizer": "adamw", "gradient_accumulation": 2},
    "slowed": {"optimizer": "sgd", "slow": 0.25},
    "staged": {"optimizer": "adamw", "stages": ((2, "head"), (2, "all")), "ema": 0.9},
    "taught": {"optimizer": "sgd", "taught": True},
    "mixed_float16": {"optimizer": "sgd", "policy": "mixed_float16"},
}
RULES = {
    "sgd": {"momentum": 0.0, "nesterov": False},
    "adamw": {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3},  # large: tiny gradients differ in their last bits
    "rmsprop": {"rho": 0.9, "momentum": 0.9, "epsilon": 1e-2},
}


def begin_anew(policy: str, seed: int) -> None:
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(seed)


def make(case: str, seed: int = 1) -> Any:
    """The step of a case."""
    chosen = dict(CASES[case])
    policy, name, taught = chosen.pop("policy", "float32"), chosen.pop("optimizer"), chosen.pop("taught", False)
    stages, slow = chosen.pop("stages", ()), chosen.pop("slow", 1.0)
    begin_anew(policy, seed)
    teacher = models.inference(models.build("vgg16", (32, 32, 1), CLASSES, width=0.03)) if taught else None
    if teacher:  # the same one on every backend
        draw = np.random.default_rng(5)
        teacher.set_weights([draw.normal(0, 0.1, weight.shape) for weight in teacher.get_weights()])
    model = models.build("vgg16_inception", (32, 32, 1), CLASSES, width=0.05, blocks=["conv_bn"] * 5)
    common = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None}
    rules = RULES[name] | {key: chosen.pop(key) for key in tuple(chosen) if key in RULES[name]}
    rate = optim.build_schedule("cosine", stages=[(1, 0.01)], epoch_steps=20, warmup_epochs=0, final_fraction=0.0)
    optimizer = optim.build(name, rate, **rules, **common | chosen)
    outputs = tuple(model.output)
    weighted, weights = losses.build(outputs, 0.3, 0.1, (0.5, 2.0) if taught else None)
    metrics = losses.metrics(outputs, taught=taught)
    model.compile(optimizer, weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    plan = Plan(models.parts(model), stages, 0.7, 1.0) if stages else None
    kind = step.of(keras.backend.backend())
    made = kind(model, models.inference(model), rate, EXAMPLES, False, gradients=True, plan=plan, teacher=teacher)
    made.slow_down(slow)
    return made


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(number)
    images = draw.integers(256, size=(EXAMPLES, 32, 32, 1)).astype(np.uint8)
    return images, np.eye(CLASSES, dtype="float32")[draw.integers(CLASSES, size=EXAMPLES)]


def take(made: Any, first: int = 0, last: int = STEPS) -> dict[str, Any]:
    """Steps; an epoch has one. What is told after the last one."""
    told = []
    for number in range(first, last):
        made.begin_epoch(number)
        made.reset_metrics()
        made(*map(given, batch(number)))
        told.append(made.metrics() | {"learning_rate": made.learning_rate()})
    return {"told": told, "fault": made.fault()}


def given(array: np.ndarray) -> Any:
    """As the stream hands it over."""
    import tensorflow as tf

    return tf.constant(array)


def course(case: str, start: dict[str, np.ndarray]) -> dict[str, Any]:
    """From a start to an end, once straight and once by way of a second network; and what is told."""
    made = make(case)
    made.load({name: value.astype(has.dtype) for name, has, value in matched(made.state(), start)})
    told = take(made)
    with made.averaged():
        answers = made.predict(batch(0)[0][:5])
    halves = make(case)
    halves.load({name: value.astype(has.dtype) for name, has, value in matched(halves.state(), start)})
    take(halves, last=2)
    other = make(case, seed=2)
    other.load(halves.state())
    take(other, first=2)
    whole, again = made.state(), other.state()
    same = all(whole[name].tobytes() == again[name].tobytes() for name in whole)
    images, labels = batch(0)
    made(given(images), given(labels * np.float32("nan")))
    return {"state": whole, "told": told, "answers": answers, "goes_on": same, "broken": made.fault()}


def matched(own: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> Any:
    """Backends count in integers of other sizes."""
    assert set(own) == set(start), set(own) ^ set(start)
    return ((name, own[name], start[name]) for name in own)


def main(case: str, folder: Path) -> None:
    engine.of(keras.backend.backend()).set_up(Config(device="cpu"))
    with np.load(folder / "start.npz") as held:
        found = course(case, {name: held[name] for name in held.files})
    np.savez(folder / "end.npz", answers=found["answers"], **found["state"])
    (folder / "told.json").write_text(json.dumps({key: found[key] for key in ("told", "goes_on", "broken")}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
