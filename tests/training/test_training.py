"""Losses, optimizers, schedules, the step, the loop and the evaluation, on networks small enough to reckon by hand."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from support.commands import ROOT
from train import models
from train.cli import progress
from train.evaluation.metrics import cross_entropy, evaluate, label_rank
from train.training import losses, optimizers
from train.training.checkpoint import CheckpointPolicy
from train.training.loop import DivergedError, EarlyStopping, Interrupted, Loop, Progress, SignalHandler
from train.training.step.base import MIN_LOSS_SCALE
from train.training.step.tensorflow import Step

CLASSES = 3
EXAMPLES = 8
MARK = 255  # a pixel as bright as this makes a batch a flawed one; the others are darker


@pytest.fixture(autouse=True)
def same_start():
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)


def begin_anew(policy: str = "float32", seed: int = 1) -> None:
    """As in a new process: Keras numbers its names from the start."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(seed)


class Flaw(keras.layers.Layer):
    """In a batch with a pixel as bright as `MARK` makes one thing not finite, and that alone: `loss` or `gradients`."""

    def __init__(self, what: str):
        super().__init__(name="flaw")
        self.what = what

    def call(self, x, images):
        marked = tf.reduce_max(images) >= MARK
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


def constant_rate(rate: float) -> optimizers.ScaledSchedule:
    return optimizers.build_schedule("constant", stages=[(1, rate)], steps_per_epoch=100, warmup_epochs=0)


def sgd(rate: float | Callable = 0.1, momentum: float = 0.0, **common) -> keras.optimizers.Optimizer:
    given = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None} | common
    schedule = constant_rate(rate) if isinstance(rate, float) else rate
    return optimizers.build_optimizer("sgd", schedule, momentum=momentum, nesterov=False, **given)


def compiled(model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **loss) -> keras.Model:
    names = tuple(model.output)
    weighted, weights = losses.build_losses(names, **({"aux_weight": 0.3, "label_smoothing": 0.0} | loss))
    model.compile(
        optimizer or sgd(), weighted, loss_weights=weights, metrics=losses.build_metrics(names), jit_compile=False
    )
    return model


def step_of(model: keras.Model, examples: int = EXAMPLES, **kind: bool) -> Step:
    rate = getattr(model.optimizer, "inner_optimizer", model.optimizer)._learning_rate  # the schedule, not its value
    return Step(model, keras.Model(model.input, model.output["main"]), rate, examples, jit=False, **kind)


def batch(examples: int = EXAMPLES, seed: int = 0, flawed: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Images uint8 [N, 4] and labels float32 [N, classes]."""
    draw = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype="float32")[draw.integers(CLASSES, size=examples)]
    images = draw.integers(MARK, size=(examples, 4))
    images[0, 0] = MARK if flawed else images[0, 0]
    return tf.constant(images, tf.uint8), tf.constant(labels)


@functools.cache
def _traced(build: Callable[..., Step], *given: Any) -> tuple[Step, dict[str, np.ndarray]]:
    step = build(*given)
    return step, step.state()


def at_start(build: Callable[..., Step], *given: Any) -> Step:
    """What `build` gives, as it was when it was built: tracing is what takes time here, so it is done once for all."""
    step, start = _traced(build, *given)
    step.load(start)
    return step


def build_plain(flaw: str | None, policy: str) -> Step:
    begin_anew(policy)
    return step_of(compiled(dense_model(flaw=flaw), sgd(momentum=0.9)))


def plain(flaw: str | None = None, policy: str = "float32") -> Step:
    """The dense network in training."""
    return at_start(build_plain, flaw, policy)


# ---------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_main_plus_a_third_of_each_auxiliary_loss(name: str, heads: list[str], smoothing: float):
    model = compiled(models.build(name, (32, 32, 1), 10, width=0.05), label_smoothing=smoothing)
    assert sorted(model.output) == sorted(["main", *heads])
    draw = np.random.default_rng(0)
    logits = {output: draw.normal(size=(16, 10)).astype("float32") for output in model.output}
    truth = draw.integers(10, size=16)
    labels = np.eye(10, dtype="float32")[truth]
    found = model.compute_loss(y=dict.fromkeys(logits, tf.constant(labels)), y_pred=logits)

    def by_hand(output: str) -> float:
        soft = labels.astype("float64") * (1 - smoothing) + smoothing / 10
        x = logits[output].astype("float64")
        return float(-(soft * (x - np.log(np.exp(x).sum(1, keepdims=True)))).sum(1).mean())

    expected = by_hand("main") + 0.3 * sum(by_hand(head) for head in heads)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert abs(expected - by_hand("main")) > 0.5  # the auxiliary part is no rounding error


def test_without_auxiliary_heads_the_loss_is_the_main_one():
    model = compiled(models.build("vgg16_inception", (32, 32, 1), 10, width=0.05, aux_weight=0), aux_weight=0.0)
    assert list(model.output) == ["main"]
    step = step_of(model, examples=4)
    images = tf.zeros((4, 32, 32, 1), tf.uint8)
    step(images, tf.one_hot([0, 1, 2, 3], 10))
    assert sorted(step.metrics()) == ["accuracy", "loss", "total_loss"]


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
def test_the_auxiliary_losses_reach_their_heads_and_the_trunk(name: str, heads: list[str]):
    """With a weight of nought for the auxiliary losses their heads get no gradient, and the trunk another one."""
    model = models.build(name, (32, 32, 1), 10, width=0.05)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1)).astype("float32")
    labels = dict.fromkeys(model.output, tf.one_hot([0, 1, 2, 3], 10))

    def gradients(aux_weight: float) -> dict[str, float]:
        compiled(model, aux_weight=aux_weight)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=labels, y_pred=model(images, training=False))
        found = tape.gradient(loss, [v.value for v in model.trainable_variables], unconnected_gradients="zero")
        return {v.path: float(tf.norm(g)) for v, g in zip(model.trainable_variables, found, strict=True)}

    with_heads, without = gradients(0.3), gradients(0.0)
    kernels = [path for path in with_heads if path.startswith("aux") and path.endswith("kernel")]
    assert len(kernels) >= len(heads)
    assert all(with_heads[path] > 0 and without[path] == 0 for path in kernels)
    first = next(path for path in with_heads if path.endswith("kernel"))
    assert with_heads[first] > 0
    assert with_heads[first] != without[first]


def test_a_loss_needs_a_main_output():
    with pytest.raises(ValueError, match="outputs must contain main, got aux"):
        losses.build_losses(["aux"], 0.3, 0.0)


# ------------------------------------------------------------------------------------------- optimizers, schedules


def test_weight_decay_spares_biases_and_batch_normalisation():
    model = compiled(dense_model(), sgd(rate=0.5, weight_decay=0.1))
    before = {variable.path: variable.numpy() for variable in model.trainable_variables}
    model.optimizer.build(model.trainable_variables)
    model.optimizer.apply([tf.zeros_like(v.value) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        factor = 1 - 0.5 * 0.1 if variable.path.endswith("kernel") else 1.0
        np.testing.assert_allclose(variable.numpy(), before[variable.path] * factor, rtol=1e-6, err_msg=variable.path)


def test_gradients_are_clipped_to_a_global_norm():
    model = compiled(dense_model(), sgd(rate=1.0, gradient_clip=0.01))
    before = [variable.numpy() for variable in model.trainable_variables]
    step_of(model)(*batch())
    moved = [v.numpy() - old for v, old in zip(model.trainable_variables, before, strict=True)]
    assert math.sqrt(sum(float((m**2).sum()) for m in moved)) == pytest.approx(0.01, rel=1e-4)


def test_accumulated_gradients_move_the_weights_once_by_their_mean():
    def run(accumulation: int, rounds: list[int]) -> np.ndarray:
        begin_anew()
        model = compiled(dense_model(), sgd(gradient_accumulation=accumulation))
        model.get_layer("bn").trainable = False  # its batch statistics would differ between the two ways
        step, start = step_of(model), model.get_layer("dense").kernel.numpy()
        for seed in rounds:
            step(*batch(seed=seed))
        return model.get_layer("dense").kernel.numpy() - start

    assert not run(2, [1]).any()
    both, first, second = run(2, [1, 2]), run(1, [1]), run(1, [2])
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-7)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averaged_weights_are_swapped_in_and_back_to_the_bit(policy: str):
    begin_anew(policy)
    model = compiled(dense_model(), sgd(ema=0.5))
    step, kernel = step_of(model), model.get_layer("dense").kernel
    step(*batch())
    first = kernel.numpy()  # Keras starts the average here
    step(*batch(seed=1))
    after = kernel.numpy()
    with step.using_ema_weights():
        np.testing.assert_allclose(kernel.numpy(), (first + after) / 2, rtol=1e-6)
    assert kernel.numpy().tobytes() == after.tobytes()


def rates(name: str, steps: list[int], warmup: float = 0.0, **options) -> list[float]:
    rate = optimizers.build_schedule(name, stages=[(10, 0.8)], steps_per_epoch=10, warmup_epochs=warmup, **options)
    return [round(float(rate(step)), 6) for step in steps]


def test_schedules_give_these_rates():
    assert rates("constant", [0, 99]) == [0.8, 0.8]
    assert rates("constant", [0, 9, 19, 20, 99], warmup=2) == [0.04, 0.4, 0.8, 0.8, 0.8]
    assert rates("cosine", [0, 50, 100], final_fraction=0.1) == [0.8, 0.44, 0.08]
    assert rates("cosine", [0, 9, 10, 55, 100], warmup=1, final_fraction=0.0) == [0.08, 0.8, 0.8, 0.4, 0.0]
    assert rates("exponential", [0, 19, 20, 40], factor=0.5, every_epochs=2) == [0.8, 0.8, 0.4, 0.2]
    assert rates("step", [0, 50, 51, 76], factor=0.1, milestones=[0.5, 0.75]) == [0.8, 0.8, 0.08, 0.008]


def test_every_stage_has_its_own_schedule():
    rate = optimizers.build_schedule(
        "cosine", stages=[(2, 0.8), (3, 0.2)], steps_per_epoch=10, warmup_epochs=0.5, final_fraction=0.0
    )
    found = {step: round(float(rate(step)), 6) for step in (0, 4, 5, 19, 20, 24, 25, 49)}
    assert (found[0], found[4]) == (0.16, 0.8)
    assert found[5] == 0.8
    assert found[19] < 0.02
    assert (found[20], found[24], found[25]) == (0.04, 0.2, 0.2)
    assert found[49] < 0.01


def test_a_factor_of_one_changes_no_bit_of_a_rate_and_another_multiplies_it():
    decay = keras.optimizers.schedules.CosineDecay(0.3, 90, alpha=0.1)
    rate = optimizers.ScaledSchedule(optimizers.PiecewiseSchedule([(100, optimizers.with_warmup(decay, 10))]))
    for step in map(tf.constant, np.arange(100, dtype="float32")):
        bare = decay(tf.maximum(step - 10, 0.0)) * tf.minimum((step + 1) / 10, 1.0)
        rate.scale.assign(1.0)
        assert rate(step).numpy().tobytes() == bare.numpy().tobytes()
        rate.scale.assign(0.25)  # a power of two: not even the last bit is rounded
        assert rate(step).numpy() == 0.25 * bare.numpy()


def test_a_factor_of_one_changes_no_bit_of_a_weight():
    def weights(rate: Callable) -> str:
        begin_anew()
        step = step_of(compiled(dense_model(), sgd(rate, momentum=0.9)))
        for seed in range(4):
            step(*batch(seed=seed))
        return step.weights_sha256()

    decay = keras.optimizers.schedules.CosineDecay(0.3, 5)
    slowed = optimizers.ScaledSchedule(decay)
    slowed.scale.assign(0.5)
    decay.factor = keras.Variable(1.0)  # the step wants one to write down; the schedule by itself does not read it
    assert weights(optimizers.ScaledSchedule(decay)) == weights(decay) != weights(slowed)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, exponential, step, got linear"):
        optimizers.build_schedule("linear", stages=[(1, 1.0)], steps_per_epoch=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, rmsprop, got lion"):
        optimizers.build_optimizer(
            "lion", constant_rate(1), weight_decay=0, gradient_clip=None, gradient_accumulation=1, ema=None
        )


# ------------------------------------------------------------------------------------------------------------ step


def test_the_step_measures_what_keras_would():
    step = step_of(compiled(dense_model(aux=True)))
    images, labels = batch()
    step(images, labels)
    first = step.metrics()
    assert sorted(first) == ["accuracy", "aux_accuracy", "aux_loss", "loss", "total_loss"]
    assert first["total_loss"] == pytest.approx(first["loss"] + 0.3 * first["aux_loss"], rel=1e-6)
    step.reset_metrics()
    assert step.metrics()["total_loss"] == 0.0


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_norms_of_gradients_are_those_of_the_last_step_and_change_no_bit(policy: str):
    images, labels = batch()

    def trained(*, gradients: bool) -> Step:
        begin_anew(policy)
        step = step_of(compiled(dense_model(aux=True), sgd(momentum=0.9)), measure_gradients=gradients)
        step(images, labels)
        return step

    begin_anew(policy)
    model = compiled(dense_model(aux=True))
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        each = {k: keras.losses.categorical_crossentropy(labels, v, from_logits=True) for k, v in outputs.items()}
        loss = tf.reduce_mean(each["main"]) + 0.3 * tf.reduce_mean(each["aux"])
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    first = gradients[[v.path for v in model.trainable_variables].index(kernels[0].path)]
    measured, plain_ = trained(gradients=True), trained(gradients=False)
    found = measured.metrics()
    assert found["gradient_norm/all"] == pytest.approx(float(tf.linalg.global_norm(gradients)), rel=1e-3)
    assert found["gradient_norm/first_layer"] == pytest.approx(float(tf.norm(first)), rel=1e-3)
    assert measured.weights_sha256() == plain_.weights_sha256()
    assert set(found) - set(plain_.metrics()) == {"gradient_norm/all", "gradient_norm/first_layer"}


def test_a_weight_of_an_example_multiplies_its_losses_and_leaves_the_accuracy():
    weights = np.linspace(0, 2, EXAMPLES, dtype="float32")
    images, labels = batch()
    model = compiled(dense_model(aux=True), sgd(0.0))
    step = step_of(model, example_weights=True)
    outputs = model(images, training=True)
    each = {
        name: keras.losses.categorical_crossentropy(labels, logits, from_logits=True)
        for name, logits in outputs.items()
    }
    right = np.argmax(outputs["main"], axis=1) == np.argmax(labels, axis=1)
    step(images, labels, tf.constant(weights))
    found = step.metrics()
    mean = {name: float(np.mean(loss * weights)) for name, loss in each.items()}
    assert found["loss"] == pytest.approx(mean["main"], rel=1e-5)
    assert found["total_loss"] == pytest.approx(mean["main"] + 0.3 * mean["aux"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(right.mean())
    assert mean["main"] != pytest.approx(float(np.mean(each["main"])), rel=1e-3)  # the weights make a difference


def test_mixed_images_are_not_rounded():
    """A step of mixed images takes float32 in 0..255; the same numbers as bytes give the same loss."""
    images, labels = batch()
    floats = tf.cast(images, tf.float32)
    between = floats + tf.one_hot([0], 4) * tf.one_hot([0], EXAMPLES, on_value=0.4, axis=0)
    found = []
    for mixed, given in ((False, images), (True, floats), (True, between)):
        begin_anew()
        step = step_of(compiled(dense_model(), sgd(0.0)), float_images=mixed)
        step(given, labels)
        found.append(step.metrics()["total_loss"])
    assert found[0] == found[1] != found[2]


def test_the_digest_of_the_weights_tells_one_bit():
    model = compiled(dense_model())
    step = step_of(model)
    digest = step.weights_sha256()
    assert digest == step.weights_sha256()
    bias = model.get_layer("dense").bias
    bias.assign(np.nextafter(bias.numpy(), np.float32(2)))
    assert step.weights_sha256() != digest


def test_slowing_down_halves_what_a_step_that_is_traced_already_moves():
    step = step_of(compiled(dense_model(), sgd(0.5)))
    kernel, start = step.model.get_layer("dense").kernel, step.state()

    def moved() -> np.ndarray:
        step.load(start | {"learning_rate_factor": np.float32(step.lr_scale())})
        before = kernel.numpy()
        step(*batch())
        return kernel.numpy() - before

    whole = moved()
    step.set_lr_scale(0.125)
    step.set_lr_scale(0.5)  # in place of what was given before, not on top of it
    assert (step.lr_scale(), step.learning_rate()) == (0.5, 0.25)
    np.testing.assert_allclose(moved(), whole / 2, atol=1e-7)
    assert np.abs(whole).max() > 1e-2
    step.load(start)
    assert (step.lr_scale(), step.learning_rate()) == (1.0, 0.5)


# ----------------------------------------------------------------------------------------------------- the step's state

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "mixed_float16": ("mixed_float16", {}),
    "ema": ("float32", {"ema": 0.9}),
    "accumulation": ("float32", {"gradient_accumulation": 2}),
    "everything": ("mixed_float16", {"ema": 0.9, "gradient_accumulation": 2}),
}


def build_trainee(kind: str, seed: int) -> Step:
    policy, options = KINDS[kind]
    begin_anew(policy, seed)
    rate = optimizers.build_schedule(
        "cosine", stages=[(1, 0.3)], steps_per_epoch=20, warmup_epochs=0.1, final_fraction=0.0
    )
    model = compiled(dense_model(aux=True, dropout=0.5), sgd(rate, momentum=0.9, **options))
    if policy == "mixed_float16":
        model.optimizer.dynamic_growth_steps = 2  # or the scale would stand still for the first 2,000
    return step_of(model)


def trainee(kind: str, seed: int = 1) -> Step:
    """A step whose every part has a state: dropout, batch normalisation, momentum, a rate that falls, a loss scale."""
    return at_start(build_trainee, kind, seed)


def go_on(step: Step, seeds: Iterator[int] | range) -> dict[str, Any]:
    """Further steps, and all that can be seen of what came out."""
    for seed in seeds:
        step(*batch(seed=seed))
    found = {
        "weights": [variable.numpy().tobytes() for variable in step.model.trainable_variables],
        "metrics": step.metrics(),
        "predictions": step.predict(batch(seed=99)[0]).tobytes(),
        "digest": step.weights_sha256(),
    }
    with step.using_ema_weights():
        return found | {"averages": step.predict(batch(seed=99)[0]).tobytes()}


@dataclasses.dataclass
class Course:
    """Three steps, where a checkpoint is made, and three more; an odd number leaves gradients accumulated."""

    step: Step
    start: dict[str, np.ndarray]
    saved: dict[str, np.ndarray]
    outcome: dict[str, Any]
    end: dict[str, np.ndarray]


@functools.cache
def course(kind: str) -> Course:
    step = trainee(kind)
    start = step.state()
    go_on(step, range(1))
    step.set_lr_scale(0.5)
    go_on(step, range(1, 3))
    saved = step.state()
    outcome = go_on(step, range(3, 6))
    return Course(step, start, saved, outcome, step.state())


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """To the bit, with types, shapes and names."""
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in one.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in other.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_goes_on_to_the_same_bits(kind: str):
    """Its network begins with other weights and other seeds; all of them come out of the state."""
    first = course(kind)
    other = trainee(kind, seed=2)
    assert not same(other.state(), first.start)
    other.load(first.saved)
    assert same(other.state(), first.saved)
    assert go_on(other, range(3, 6)) == first.outcome
    assert same(other.state(), first.end)
    assert other.non_finite() is None


@pytest.mark.parametrize(
    ("kind", "part", "seen"),
    [
        ("float32", "seed_generator_state", "weights"),
        ("float32", "_momentum", "weights"),
        ("float32", "sgd/iteration", "weights"),  # the rate falls by it
        ("float32", "learning_rate_factor", "weights"),
        ("float32", "^metrics/", "metrics"),
        ("float32", "/bn/moving_", "predictions"),
        ("ema", "_average", "averages"),
        ("accumulation", "_gradient_accumulator", "weights"),
        ("accumulation", "sgd/iteration", "weights"),
        ("mixed_float16", "dynamic_scale", "metrics"),
        ("mixed_float16", "step_counter", "metrics"),
        ("mixed_float16", "^count$", "metrics"),  # the skipped steps are reckoned from it
        ("everything", "seed_generator_state", "weights"),
        ("everything", "_momentum", "weights"),
        ("everything", "^metrics/", "metrics"),
        ("everything", "_average", "averages"),
        ("everything", "_gradient_accumulator", "weights"),
    ],
)
def test_no_part_of_the_state_could_be_left_out(kind: str, part: str, seen: str):
    """What the test before shows would not be so with this part as it was at the start."""
    first = course(kind)
    reset = {name: value for name, value in first.start.items() if re.search(part, name)}
    assert reset
    first.step.load(first.saved)
    assert go_on(first.step, range(3, 6)) == first.outcome
    first.step.load(first.saved | reset)
    assert go_on(first.step, range(3, 6))[seen] != first.outcome[seen]


@pytest.mark.parametrize("kind", ["float32", "everything"])
def test_every_variable_is_in_the_state_exactly_once(kind: str):
    """Each gets a value of its own, so that one that stands there twice, or hides another, would be seen."""
    step = trainee(kind)
    model = step.model
    listed = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    assert len({id(variable) for variable in listed}) == len(listed)
    for number, variable in enumerate(listed, start=2):
        variable.assign(np.full(variable.shape, number))
    state = step.state()
    own = {"count": 0, "learning_rate_factor": 1}
    assert {name: state[name] for name in own} == own
    values = [np.unique(value).tolist() for name, value in state.items() if name not in own]
    assert sorted(values) == [[number] for number in range(2, len(listed) + 2)]


def test_a_state_is_a_copy_that_further_steps_leave_alone():
    """A thread writes it to disk while training goes on."""
    step = course("float32").step
    step.load(course("float32").saved)
    taken = step.state()
    go_on(step, range(3))
    assert same(taken, course("float32").saved)
    assert not same(taken, step.state())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"metrics/0000/loss/total": None, "model/0002/bn/moving_mean": None},
            "metrics/0000/loss/total must be as the network and its optimizer have it (float32 ()), got none",
        ),
        (
            {"model/0002/bn/extra": np.zeros(2, "float32"), "zebra": np.zeros(1)},
            "model/0002/bn/extra must be as the network and its optimizer have it (none), got float32 (2,)",
        ),
        (
            {"model/0002/bn/moving_mean": np.zeros((4, 1), "float32")},
            "model/0002/bn/moving_mean must be as the network and its optimizer have it (float32 (4,)), "
            "got float32 (4, 1)",
        ),
        (
            {"count": np.int32(3)},
            "count must be as the network and its optimizer have it (int64 ()), got int32 ()",
        ),
    ],
    ids=["missing", "unknown", "other shape", "other type"],
)
def test_a_state_of_another_network_is_refused_by_the_first_tensor(change: dict[str, np.ndarray | None], sentence: str):
    step, saved = course("float32").step, course("float32").saved
    step.load(saved)
    other = {name: value for name, value in (course("float32").start | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        step.load(other)
    assert same(step.state(), saved)  # half of another state would be worse than none


# --------------------------------------------------------------------------------------- what is not finite any more


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_without_a_flaw_there_is_no_fault(policy: str, what: str):
    step = plain(what, policy)
    for seed in range(5):
        step(*batch(seed=seed))
        assert step.non_finite() is None


@pytest.mark.parametrize(("what", "policy"), [("loss", "float32"), ("loss", "mixed_float16"), ("gradients", "float32")])
def test_a_fault_names_the_first_bad_step_though_it_is_read_later(what: str, policy: str):
    step = plain(what, policy)
    for number in range(1, 6):
        step(*batch(seed=number, flawed=number == 2))
        if number == 2:  # it is this one thing that is bad, and nothing else yet
            assert math.isfinite(step.metrics()["total_loss"]) == (what != "loss")
            bad = [v.path for v in step.model.trainable_variables if not np.isfinite(v.numpy()).all()]
            assert sorted(bad) == ([] if what == "loss" else ["bn/beta", "bn/gamma"])
            assert np.isfinite(step.model.get_layer("bn").moving_mean.numpy()).all()
    step.reset_metrics()  # a new epoch
    assert step.non_finite() == (f"the {what}", 2)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_a_fault_of_the_statistics_shows_before_validation_does(policy: str, name: str):
    """Training does not read them, so that loss and gradients stay finite."""
    step = plain(policy=policy)
    for number in range(1, 6):
        if number == 2:
            statistics = getattr(step.model.get_layer("bn"), name)
            statistics.assign([0.0, 0.0, math.nan, 0.0])
        step(*batch(seed=number))
    assert math.isfinite(step.metrics()["total_loss"])
    assert step.non_finite() == ("the statistics of batch normalisation", 2)


def test_of_two_faults_the_earlier_is_named():
    step = plain("loss")
    step(*batch())
    step.model.get_layer("bn").moving_mean.assign([math.inf] * 4)
    step(*batch())
    step(*batch(flawed=True))
    assert step.non_finite() == ("the statistics of batch normalisation", 2)


def test_a_state_that_is_put_back_has_no_fault():
    step = plain("gradients")
    step(*batch())
    good = step.state()
    step(*batch(flawed=True))
    assert step.non_finite() == ("the gradients", 2)
    step.load(good)
    step(*batch())
    assert step.non_finite() is None
    step(*batch(flawed=True))
    assert step.non_finite() == ("the gradients", 3)


def test_gradients_that_overflow_cost_a_step_under_loss_scaling_and_are_no_fault():
    step = plain("gradients", "mixed_float16")
    step(*batch())
    assert {"loss_scale": 32768.0, "skipped_steps": 0.0}.items() <= step.metrics().items()
    before = step.state()
    step(*batch(flawed=True))
    changed = {name for name, value in step.state().items() if value.tobytes() != before[name].tobytes()}
    trained = {name for name in before if re.search(r"/(dense|bn)/(kernel|bias|gamma|beta)$|_momentum$", name)}
    assert len(trained) == 8
    assert not trained & changed
    assert {"loss_scale": 16384.0, "skipped_steps": 1.0}.items() <= step.metrics().items()
    step(*batch(flawed=True))
    step(*batch())
    assert {"loss_scale": 8192.0, "skipped_steps": 2.0}.items() <= step.metrics().items()
    assert not trained & {n for n, v in step.state().items() if v.tobytes() == before[n].tobytes()}
    assert step.non_finite() is None


def test_a_loss_scale_below_its_floor_is_a_fault():
    step = plain("gradients", "mixed_float16")
    step.model.optimizer.dynamic_scale.assign(2 * MIN_LOSS_SCALE)
    step(*batch(flawed=True))
    assert (step.metrics()["loss_scale"], step.non_finite()) == (1.0, None)
    step(*batch(flawed=True))
    assert (step.metrics()["loss_scale"], step.non_finite()) == (0.5, ("the gradients (loss scale below 1)", 2))


def test_accumulated_steps_are_not_skipped_ones():
    begin_anew("mixed_float16")
    step = step_of(compiled(dense_model(), sgd(gradient_accumulation=2)))
    for seed in range(4):
        step(*batch(seed=seed))
    assert step.metrics()["skipped_steps"] == 0.0


class Huge(keras.layers.Layer):
    """Gradients so large that their global norm overflows: clipping makes weights of them that are no numbers."""

    def call(self, x):
        @tf.custom_gradient
        def pass_on(value):
            return tf.identity(value), lambda upstream: upstream * 1e21

        return pass_on(x)


def test_weights_that_an_update_breaks_are_a_fault_of_that_step():
    begin_anew()
    images = keras.Input((4,))
    x = keras.layers.Rescaling(1 / 64, offset=-2)(images)
    x = Huge()(keras.layers.BatchNormalization(name="bn")(x))
    model = keras.Model(images, {"main": keras.layers.Dense(CLASSES, name="dense")(x)})
    step = step_of(compiled(model, sgd(gradient_clip=1.0)))
    step(*batch())
    assert math.isfinite(step.metrics()["total_loss"])
    assert step.non_finite() == ("the weights", 1)


# ------------------------------------------------------------------------------------------------------------ loop


class Quiet:
    """Nobody looks on."""

    def step(self, *_): ...
    def epoch(self, *_): ...


@dataclasses.dataclass
class Saved:
    """What a checkpoint has: how far the run was, its state, and the lines of the journal up to there."""

    progress: dict[str, Any]
    state: dict[str, np.ndarray]
    lines: int

    def read(self) -> Progress:
        """As from disk."""
        return Progress.from_dict(json.loads(json.dumps(self.progress)))

    @property
    def place(self) -> tuple[int, int, int]:
        return self.progress["epoch"], self.progress["batch"], self.progress["steps"]


class Recorder:
    """Keeps in memory what the loop gives it."""

    def __init__(self, step: Step, interval: CheckpointPolicy | None = None):
        self.trained, self.interval = step, interval
        self.journal: list[tuple[int, int, dict[str, float]]] = []
        self.best: list[int] = []
        self.saved: list[Saved] = []
        self.periodic: list[bool] = []
        self.events: list[tuple] = []

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append((epoch, step, values))

    def save_best(self, epoch: int, _: dict[str, float]) -> None:
        self.best.append(epoch)

    def on_step_end(self, progress: Progress) -> None:
        self.events.append(("trained", progress.steps))

    def should_checkpoint(self, progress: Progress) -> bool:
        if self.interval is None:
            return False
        return self.interval.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        self.periodic.append(periodic)
        self.saved.append(Saved(dataclasses.asdict(progress), self.trained.state(), len(self.journal)))

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Epoch, batch and step of each checkpoint."""
        return [saved.place for saved in self.saved]

    @property
    def told(self) -> list[tuple[int, int, dict[str, float]]]:
        """The journal without what no two runs have in common."""
        clock = {"images_per_second", "data_wait_fraction"}
        return [(e, s, {k: v for k, v in values.items() if k not in clock}) for e, s, values in self.journal]


def loop_of(
    step: Step,
    *,
    epochs: int = 3,
    progress: Progress | None = None,
    accuracies: list[float] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    interval: CheckpointPolicy | None = None,
    stops: SignalHandler | None = None,
    flawed: int = 0,
    **stopper,
) -> tuple[Loop, Recorder]:
    """Three batches an epoch; `accuracies` are what validation is to find; `flawed` is the number of a step."""
    recorder, found = Recorder(step, interval), iter(accuracies or [0.1] * epochs)

    def batches(epoch: int, first: int) -> Iterator[tuple]:
        recorder.events.append(("asked", epoch, first))
        return (batch(seed=10 * epoch + n, flawed=3 * epoch + n + 1 == flawed) for n in range(first, 3))

    def validated() -> dict[str, float]:
        recorder.events.append(("validated",))
        return validate() if validate else {"accuracy": next(found), "loss": 1.0}

    loop = Loop(
        step=step,
        progress=progress or Progress(),
        epochs=epochs,
        steps_per_epoch=3,
        batch_size=EXAMPLES,
        log_every=2,
        batches=batches,
        validate=validated,
        callbacks=recorder,
        early_stopping=EarlyStopping(**({"metric": None, "patience_epochs": 1, "min_delta": 0.0} | stopper)),
        display=Quiet(),
        signals=stops or SignalHandler(),
    )
    return loop, recorder


def run_loop(step: Step, **options) -> tuple[Progress, Recorder]:
    loop, recorder = loop_of(step, **options)
    loop.run()
    return loop.progress, recorder


class Noisy:
    """A step in the middle of whose `at`-th call these signals come."""

    def __init__(self, step: Step, at: int, *signals: int):
        self._step, self._at, self._signals, self._calls = step, at, signals, 0

    def __call__(self, images, labels):
        self._calls += 1
        if self._calls == self._at:
            for number in self._signals:
                os.kill(os.getpid(), number)
        self._step(images, labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def test_steps_count_over_the_whole_run_and_epochs_end_with_a_line():
    progress, recorder = run_loop(plain())
    assert (progress.epoch, progress.batch, progress.steps) == (3, 0, 9)
    assert [(epoch, step) for epoch, step, _ in recorder.journal] == [
        (0, 2), (0, 3), (1, 4), (1, 6), (2, 8), (2, 9),
    ]  # fmt: skip
    assert {
        "train/loss",
        "train/total_loss",
        "validation/accuracy",
        "learning_rate",
        "images_per_second",
        "data_wait_fraction",
    } <= set(recorder.journal[-1][2])
    assert progress.timer.images == 8 * 8  # the first step, which makes buffers and kernels, is left out


def test_the_best_epoch_is_the_highest_and_of_equals_the_earlier():
    step = plain()
    progress, recorder = run_loop(step, epochs=5, accuracies=[0.2, 0.5, 0.5, 0.4, 0.6])
    assert recorder.best == [0, 1, 4]
    assert (progress.best_epoch, progress.best_accuracy) == (4, 0.6)


PATIENT = {"metric": "validation/accuracy", "patience_epochs": 3, "min_delta": 0.01}


def test_early_stopping_waits_for_its_patience():
    accuracies = [0.2, 0.5, 0.5, 0.504, 0.5, 0.9, 0.9, 0.9, 0.9]
    progress, _ = run_loop(plain(), epochs=9, accuracies=accuracies, **PATIENT)
    assert (progress.epoch, progress.stopped_early, progress.best_accuracy) == (5, True, 0.504)


def test_a_metric_that_is_no_number_is_no_improvement():
    stopper, progress = EarlyStopping("validation/loss", patience_epochs=3, min_delta=0.0), Progress()
    for loss in (math.nan, 3.0, 2.0, math.nan):
        stopper.update({"validation/loss": loss}, progress)
    assert (progress.best_metric, progress.epochs_without_improvement, progress.stopped_early) == (-2.0, 1, False)


def test_a_falling_metric_improves_downwards():
    stopper, progress = EarlyStopping("validation/loss", patience_epochs=2, min_delta=0.0), Progress()

    def stops_at(loss: float) -> bool:
        stopper.update({"validation/loss": loss}, progress)
        return progress.stopped_early

    assert [stops_at(loss) for loss in (3.0, 2.0, 2.5, 2.1)] == [False, False, False, True]


def test_how_far_a_run_is_survives_a_checkpoint():
    step = plain()
    progress, _ = run_loop(step, epochs=2, accuracies=[0.5, 0.4], **PATIENT)
    progress.rollbacks = 2
    assert (progress.best_metric, progress.epochs_without_improvement, progress.timer.images) == (0.5, 1, 5 * 8)
    again = Progress.from_dict(json.loads(json.dumps(dataclasses.asdict(progress))))
    assert again == progress
    assert again.timer is not progress.timer


@pytest.mark.parametrize("place", [(2, 0, 6), (2, 1, 7), (3, 0, 9), (3, 2, 11)])
def test_early_stopping_counts_on_in_another_life(place: tuple[int, int, int]):
    step = plain()
    accuracies = [0.5, 0.505, 0.4, 0.4, 0.9, 0.9]
    whole, first = run_loop(step, epochs=6, accuracies=accuracies, interval=CheckpointPolicy(every_steps=1), **PATIENT)
    assert (whole.epoch, whole.epochs_without_improvement) == (4, 3)
    saved = first.saved[first.places.index(place)]
    progress, _ = run_loop(step, epochs=6, accuracies=accuracies[place[0] :], progress=saved.read(), **PATIENT)
    assert (progress.epoch, progress.steps, progress.stopped_early) == (4, 12, True)
    assert (progress.best_epoch, progress.best_accuracy) == (1, 0.505)


def test_a_run_that_has_stopped_early_trains_no_more():
    step = plain()
    stopped = Progress(epoch=2, steps=6, epochs_without_improvement=3, stopped_early=True)
    progress, recorder = run_loop(step, epochs=6, progress=dataclasses.replace(stopped), **PATIENT)
    assert progress == stopped
    assert recorder.events == []


# ------------------------------------------------------------------------------------------ the loop and what it saves


@pytest.mark.parametrize(
    ("interval", "places"),
    [
        (CheckpointPolicy(every_steps=2), [(0, 2, 2), (1, 1, 4), (2, 0, 6)]),
        (CheckpointPolicy(every_steps=3), [(1, 0, 3), (2, 0, 6)]),
        (CheckpointPolicy(), [(1, 0, 3), (2, 0, 6)]),
        (CheckpointPolicy(every_epochs=2), [(2, 0, 6)]),
        (None, []),
    ],
)
def test_a_checkpoint_is_made_where_one_is_due_and_at_the_end(interval: CheckpointPolicy | None, places: list):
    """Once each; the end of an epoch is a place in the next one, with everything about the last behind it."""
    progress, recorder = run_loop(plain(), epochs=2, interval=interval)
    assert recorder.places == [*places, (2, 0, 6)]
    assert recorder.saved[-1].progress == dataclasses.asdict(progress)
    assert [saved.lines for saved in recorder.saved if saved.place == (1, 0, 3)] == [2] * places.count((1, 0, 3))
    assert all(saved.state["count"] == saved.progress["steps"] for saved in recorder.saved)


@pytest.mark.parametrize("what", ["loss", "gradients"])
@pytest.mark.parametrize(
    ("flawed", "interval", "saved", "lines"),
    [
        (4, None, [], [2, 3]),  # found where a line is due
        (5, None, [], [2, 3, 4]),  # found at the end of the epoch, a step later
        (5, CheckpointPolicy(every_steps=1), [1, 2, 3, 4], [2, 3, 4]),  # found where a checkpoint is due
        (6, CheckpointPolicy(every_steps=6), [], [2, 3, 4]),
        (7, CheckpointPolicy(every_steps=4), [4], [2, 3, 4, 6]),
    ],
)
def test_a_state_that_is_broken_is_neither_saved_nor_told(
    what: str, flawed: int, interval: CheckpointPolicy | None, saved: list[int], lines: list[int]
):
    step = plain(what)
    loop, recorder = loop_of(step, interval=interval, flawed=flawed)
    epoch = (flawed - 1) // 3
    sentence = f"^the {what} must stay finite, but did not in epoch {epoch + 1} at step {flawed}$"
    with pytest.raises(DivergedError, match=sentence) as diverged:
        loop.run()
    assert (diverged.value.epoch, diverged.value.step) == (epoch, flawed)
    assert [saved.progress["steps"] for saved in recorder.saved] == saved
    assert all(np.isfinite(value).all() for saved in recorder.saved for value in saved.state.values())
    assert [step for _, step, _ in recorder.journal] == lines
    assert recorder.best == [0]


def test_a_rate_far_too_high_ends_the_run_and_names_the_step():
    step = step_of(compiled(dense_model(), sgd(1e38)))
    loop, recorder = loop_of(step)
    with pytest.raises(DivergedError, match=r"^the loss must stay finite, but did not in epoch 1 at step 2$"):
        loop.run()
    assert (recorder.journal, recorder.saved) == ([], [])


def test_a_signal_is_obeyed_between_two_batches():
    """It comes in the middle of the second step, which is finished and saved, and no third is begun."""
    step = Noisy(plain(), 2, signal.SIGTERM)
    with SignalHandler().installed() as stops, pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as stop:
        loop, recorder = loop_of(step, stops=stops)
        loop.run()
    assert recorder.events == [("asked", 0, 0), ("trained", 1), ("trained", 2)]
    assert (recorder.places, recorder.periodic) == ([(0, 2, 2)], [False])
    assert (stop.value.signal_number, stop.value.immediate) == (signal.SIGTERM, False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_leaves_the_loop_without_a_checkpoint():
    step = Noisy(plain(), 2, signal.SIGINT, signal.SIGTERM)
    with SignalHandler().installed() as stops, pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as stop:
        loop, recorder = loop_of(step, stops=stops)
        loop.run()
    assert recorder.events == [("asked", 0, 0), ("trained", 1)]
    assert recorder.saved == []
    assert (stop.value.signal_number, stop.value.immediate) == (signal.SIGTERM, True)


def test_a_signal_does_not_save_a_state_that_is_broken():
    step = Noisy(plain("loss"), 2, signal.SIGINT)
    with SignalHandler().installed() as stops, pytest.raises(DivergedError, match="in epoch 1 at step 1"):
        loop, recorder = loop_of(step, stops=stops, flawed=1)
        loop.run()
    assert recorder.saved == []


# -------------------------------------------------------------------------------------------- the loop in another life


def validation_of(step: Step) -> Callable[[], dict[str, float]]:
    def validate() -> dict[str, float]:
        with step.using_ema_weights():
            found = evaluate(step.predict, [tuple(part.numpy() for part in batch(seed=99))], EXAMPLES)
        return {"accuracy": found["accuracy"], "loss": found["loss"]}

    return validate


def without_clock(progress: Progress) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "timer"}


@pytest.mark.parametrize("kind", ["float32", "everything"])
def test_from_any_batch_another_life_tells_the_same_and_ends_at_the_same_bits(kind: str):
    first = trainee(kind)
    whole, uncut = run_loop(first, validate=validation_of(first), interval=CheckpointPolicy(every_steps=1))
    assert uncut.places[:-1] == [(n // 3, n % 3, n) for n in range(1, 10)]
    end = first.state()
    other = trainee(kind, seed=2)
    for saved in uncut.saved[:-2]:
        other.load(saved.state)
        progress, rest = run_loop(other, validate=validation_of(other), progress=saved.read())
        epoch, first_batch, _ = saved.place
        asked = [event[1:] for event in rest.events if event[0] == "asked"]
        assert asked == [(epoch, first_batch), *((later, 0) for later in range(epoch + 1, 3))]
        # An epoch's means are over all of its batches, also those of the life before.
        assert uncut.told[: saved.lines] + rest.told == uncut.told
        assert same(other.state(), end)
        assert other.weights_sha256() == first.weights_sha256()
        assert without_clock(progress) == without_clock(whole)


@pytest.mark.parametrize("when", ["the epoch's last step", "validation"])
def test_an_epoch_that_lacks_only_its_validation_is_validated_first(when: str):
    """Nothing is trained twice, and what the epoch's batches came to is not forgotten."""
    first = trainee("float32")
    whole, uncut = run_loop(first, validate=validation_of(first))
    end = first.state()

    def stopped() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        list(stops.guard(range(2)))
        raise AssertionError("a signal was not heeded")

    step = Noisy(trainee("float32"), 3 if when == "the epoch's last step" else 0, signal.SIGINT)
    with SignalHandler().installed() as stops, pytest.raises(Interrupted):
        loop, cut = loop_of(step, stops=stops, validate=stopped)
        loop.run()
    assert [event for event in cut.events if event[0] == "validated"] == [("validated",)] * (when == "validation")
    assert cut.places == [(0, 3, 3)]
    assert [line[1] for line in cut.journal] == [2]

    other = trainee("float32", seed=2)
    other.load(cut.saved[0].state)
    progress, rest = run_loop(other, validate=validation_of(other), progress=cut.saved[0].read())
    assert rest.events[:4] == [("asked", 0, 3), ("validated",), ("asked", 1, 0), ("trained", 4)]
    assert cut.told + rest.told == uncut.told
    assert same(other.state(), end)
    assert without_clock(progress) == without_clock(whole)


# ------------------------------------------------------------------------------------------------------------ signals


def test_a_second_signal_leaves_at_once_and_so_does_one_outside_the_loop():
    with SignalHandler().installed() as stops, stops.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stops.exit_code() == 143
    with SignalHandler().installed(), pytest.raises(Interrupted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_signal_at_once_again_is_the_same_wish(monkeypatch: pytest.MonkeyPatch):
    """make hands a SIGTERM on to a process that has got it already."""
    with SignalHandler().installed() as stops, stops.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(SignalHandler, "REPEAT_SECONDS", 0.0)
        with pytest.raises(Interrupted) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.immediate


def test_validation_heeds_a_signal_too():
    with SignalHandler().installed() as stops, stops.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            list(stops.guard([1, 2, 3]))
    assert list(SignalHandler().guard([1, 2, 3])) == [1, 2, 3]


# A lock that is held already is waited for in one call: signals don't end it, and Python runs nothing until it ends.
STUCK = """
import ctypes
from train.training.loop import SignalHandler
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with SignalHandler().installed() as signals, signals.deferred():
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""

LEAVING = """
import sys, time
from train.training.loop import Interrupted, SignalHandler
try:
    with SignalHandler().installed() as signals, signals.deferred():
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
except Interrupted as stop:
    while not stop.immediate:
        time.sleep(0.01)
    sys.exit(7)
"""


def test_a_second_signal_ends_a_process_that_is_stuck_and_spares_one_that_leaves():
    """The first one ends neither."""
    cases = [
        (STUCK, signal.SIGINT, signal.SIGINT, 130),
        (STUCK, signal.SIGINT, signal.SIGTERM, 143),
        (LEAVING, signal.SIGINT, signal.SIGINT, 7),
    ]
    with ExitStack() as stack:
        found = []
        for script, *_ in cases:
            words = [sys.executable, "-c", script]
            process = stack.enter_context(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            found.append(process)
        assert [process.stdout.readline() for process in found] == ["ready\n"] * 3
        time.sleep(0.3)  # the second lock is tried right after the line is printed
        for process, (_, first, _, _) in zip(found, cases, strict=True):
            process.send_signal(first)
        time.sleep(SignalHandler.GRACE_SECONDS + 0.5)
        assert [process.poll() for process in found] == [None] * 3
        start = time.monotonic()
        for process, (_, _, second, _) in zip(found, cases, strict=True):
            process.send_signal(second)
        codes = [process.wait(timeout=120) for process in found[:2]]
        assert time.monotonic() - start >= SignalHandler.GRACE_SECONDS  # who can leave by itself has so long
        assert [*codes, found[2].wait(timeout=120)] == [code for *_, code in cases]


def test_the_bar_shows_training_and_validation_together(monkeypatch: pytest.MonkeyPatch):
    """On a terminal of its own: after the first epoch both accuracies stay in sight."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    epoch = {"train/loss": 1.0, "train/accuracy": 0.25, "validation/accuracy": 0.75}
    with progress.TerminalProgressDisplay(epochs=2, steps=3, batch_size=8) as bar:
        bar.epoch(0, epoch | {"images_per_second": 5.0, "data_wait_fraction": 0.01})
        bar.step(1, 4, {"train/accuracy": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "epoch 2/2" in shown
    assert "4/6" in shown
    assert "accuracy train 0.5000  validation 0.7500" in shown


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_reckons_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.4, 0.4, 0.2]]))
    labels = np.eye(3)[[0, 0, 1]]
    found = evaluate(lambda images: logits[images], [(np.array([0, 1]), labels[:2]), (np.array([2]), labels[2:])], 3)
    assert found["examples"] == 3
    assert found["accuracy"] == pytest.approx(1 / 3)  # of two equal logits the lower index stands first
    assert found["top5_accuracy"] == 1.0
    assert found["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3)


def test_evaluation_refuses_a_count_that_is_off():
    batches = [(np.zeros((2, 1)), np.eye(3)[[0, 1]])]
    with pytest.raises(ValueError, match="every example once, got 2 of 3"):
        evaluate(lambda images: np.zeros((len(images), 3)), batches, 3)


def test_top5_looks_at_five():
    logits = np.arange(10.0)[None].repeat(2, 0)
    assert label_rank(logits, np.array([5, 4])).tolist() == [4, 5]


def test_logits_that_are_no_numbers_are_wrong():
    assert label_rank(np.full((1, 4), np.nan), np.array([0])).tolist() == [4]
    assert math.isnan(cross_entropy(np.full((1, 4), np.nan), np.array([0]))[0])
