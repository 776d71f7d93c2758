"""Networks small enough to compute by hand, their training steps, and short runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from support.commands import run_train
from train.training import losses, optimizers, schedules
from train.training.step.tensorflow import Step

CLASSES = 3
EXAMPLES = 8
FLAW_PIXEL = 255  # such a pixel makes a batch flawed; all others are darker


def reset_keras(policy: str = "float32", seed: int = 1) -> None:
    """Resets Keras as in a new process: its layer numbers start over."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(seed)


class Flaw(keras.layers.Layer):
    """Makes only the loss, or only the gradients, non-finite in a batch with a pixel of `FLAW_PIXEL`."""

    def __init__(self, what: str):
        super().__init__(name="flaw")
        self.what = what

    def call(self, x, images):
        marked = tf.reduce_max(images) >= FLAW_PIXEL
        if self.what == "loss":
            self.add_loss(tf.where(marked, math.inf, 0.0))  # no weight has a part in it
            return x

        @tf.custom_gradient
        def pass_on(value):
            return tf.identity(value), lambda upstream: tf.where(marked, tf.cast(math.inf, upstream.dtype), upstream)

        return pass_on(x)


def dense_model(aux: bool = False, dropout: float = 0.0, flaw: str | None = None) -> keras.Model:
    """One dense layer after batch normalisation; `aux` adds a second head."""
    images = keras.Input((4,))
    x = keras.layers.Rescaling(1 / 64, offset=-2)(images)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.Dropout(dropout)(x) if dropout else x
    x = Flaw(flaw)(x, images) if flaw else x
    # Logits are float32 under every policy, as those of the real networks.
    outputs = {"main": keras.layers.Dense(CLASSES, name="dense", bias_initializer="ones", dtype="float32")(x)}
    if aux:
        outputs["aux"] = keras.layers.Dense(CLASSES, name="aux_dense", dtype="float32")(x)
    return keras.Model(images, outputs)


def constant_schedule(rate: float) -> schedules.ScaledSchedule:
    return schedules.build_schedule("constant", stages=[(1, rate)], steps_per_epoch=100, warmup_epochs=0)


def make_sgd(rate: float | Callable = 0.1, momentum: float = 0.0, **common) -> keras.optimizers.Optimizer:
    options = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None} | common
    schedule = constant_schedule(rate) if isinstance(rate, float) else rate
    return optimizers.build_optimizer("sgd", schedule, momentum=momentum, nesterov=False, **options)


def compile_model(model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **loss) -> keras.Model:
    names = tuple(model.output)
    weighted, weights = losses.build_losses(names, **({"aux_weight": 0.3, "label_smoothing": 0.0} | loss))
    model.compile(
        optimizer or make_sgd(), weighted, loss_weights=weights, metrics=losses.build_metrics(names), jit_compile=False
    )
    return model


def make_step(model: keras.Model, examples: int = EXAMPLES, **kind: Any) -> Step:
    options = dict.fromkeys(("float_images", "example_weights", "measure_gradients"), False)
    options |= {"freeze_schedule": None, "teacher": None} | kind
    rate = getattr(model.optimizer, "inner_optimizer", model.optimizer)._learning_rate  # the schedule, not its value
    return Step(model, keras.Model(model.input, model.output["main"]), rate, examples, jit=False, **options)


def make_batch(examples: int = EXAMPLES, seed: int = 0, flawed: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Images uint8 [N, 4] and labels float32 [N, classes]."""
    draw = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype="float32")[draw.integers(CLASSES, size=examples)]
    images = draw.integers(FLAW_PIXEL, size=(examples, 4))
    images[0, 0] = FLAW_PIXEL if flawed else images[0, 0]
    return tf.constant(images, tf.uint8), tf.constant(labels)


@functools.cache
def _traced(build: Callable[..., Step], *arguments: Any) -> tuple[Step, dict[str, np.ndarray]]:
    step = build(*arguments)
    return step, step.state()


def reuse_traced(build: Callable[..., Step], *arguments: Any) -> Step:
    """The result of `build` in its initial state; built and traced once, since tracing takes most of the time."""
    step, start = _traced(build, *arguments)
    step.load(start)
    return step


def build_plain_step(flaw: str | None, policy: str) -> Step:
    reset_keras(policy)
    return make_step(compile_model(dense_model(flaw=flaw), make_sgd(momentum=0.9)))


def plain_step(flaw: str | None = None, policy: str = "float32") -> Step:
    """A step of the dense network."""
    return reuse_traced(build_plain_step, flaw, policy)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "mixed_float16": ("mixed_float16", {}),
    "ema": ("float32", {"ema": 0.9}),
    "accumulation": ("float32", {"gradient_accumulation": 2}),
    "everything": ("mixed_float16", {"ema": 0.9, "gradient_accumulation": 2}),
}


def build_full_step(kind: str, seed: int) -> Step:
    policy, options = KINDS[kind]
    reset_keras(policy, seed)
    rate = schedules.build_schedule(
        "cosine", stages=[(1, 0.3)], steps_per_epoch=20, warmup_epochs=0.1, final_fraction=0.0
    )
    model = compile_model(dense_model(aux=True, dropout=0.5), make_sgd(rate, momentum=0.9, **options))
    if policy == "mixed_float16":
        model.optimizer.dynamic_growth_steps = 2  # or the scale would stand still for the first 2,000
    return make_step(model)


def full_step(kind: str, seed: int = 1) -> Step:
    """A step with every kind of state: dropout, batch normalisation, momentum, a falling rate, a loss scale."""
    return reuse_traced(build_full_step, kind, seed)


def equal_states(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """To the bit, with types, shapes and names."""
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in one.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in other.items()
    }


def digits(seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    draw = np.random.default_rng(seed)
    images = draw.integers(256, size=(8, 32, 32, 1)).astype(np.uint8)
    return tf.constant(images), tf.constant(np.eye(10, dtype="float32")[draw.integers(10, size=8)])


TINY = ("model.width=0.05", "steps_per_epoch=4", "batch_size=8", "tracking.wait_seconds=0", "tracking.log_model=false",
        "evaluate.test=false", "checkpoint.every_steps=1", "precision=float32")  # fmt: skip


def train_tiny(run_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> Any:
    paths = [f"run_dir={run_dir}", f"tracking.uri=sqlite:///{run_dir.parent / 'mlflow.db'}"]
    return run_train(*TINY, *overrides, *paths, env=env)
