"""Losses, gradients and weights that are not finite: which step is reported, and which are skipped."""

from __future__ import annotations

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.training import (
    CLASSES,
    compile_model,
    dense_model,
    make_batch,
    make_sgd,
    make_step,
    plain_step,
    reset_keras,
)
from train.training.step.base import MIN_LOSS_SCALE

pytestmark = pytest.mark.usefixtures("fresh_keras")


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_finite_steps_report_no_error(policy: str, what: str):
    step = plain_step(what, policy)
    for seed in range(5):
        step(*make_batch(seed=seed))
        assert step.non_finite() is None


@pytest.mark.parametrize(("what", "policy"), [("loss", "float32"), ("loss", "mixed_float16"), ("gradients", "float32")])
def test_first_non_finite_step_is_reported_even_when_read_later(what: str, policy: str):
    step = plain_step(what, policy)
    for number in range(1, 6):
        step(*make_batch(seed=number, flawed=number == 2))
        if number == 2:  # it is this one thing that is bad, and nothing else yet
            assert math.isfinite(step.metrics()["total_loss"]) == (what != "loss")
            bad = [v.path for v in step.model.trainable_variables if not np.isfinite(v.numpy()).all()]
            assert sorted(bad) == ([] if what == "loss" else ["bn/beta", "bn/gamma"])
            assert np.isfinite(step.model.get_layer("bn").moving_mean.numpy()).all()
    step.reset_metrics()  # a new epoch
    assert step.non_finite() == (what, 2)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_non_finite_batch_statistics_are_reported_before_validation(policy: str, name: str):
    """Training does not read the moving statistics, so loss and gradients stay finite."""
    step = plain_step(policy=policy)
    for number in range(1, 6):
        if number == 2:
            statistics = getattr(step.model.get_layer("bn"), name)
            statistics.assign([0.0, 0.0, math.nan, 0.0])
        step(*make_batch(seed=number))
    assert math.isfinite(step.metrics()["total_loss"])
    assert step.non_finite() == ("batch normalisation statistics", 2)


def test_earlier_of_two_non_finite_steps_is_reported():
    step = plain_step("loss")
    step(*make_batch())
    step.model.get_layer("bn").moving_mean.assign([math.inf] * 4)
    step(*make_batch())
    step(*make_batch(flawed=True))
    assert step.non_finite() == ("batch normalisation statistics", 2)


def test_restored_state_is_finite():
    step = plain_step("gradients")
    step(*make_batch())
    good = step.state()
    step(*make_batch(flawed=True))
    assert step.non_finite() == ("gradients", 2)
    step.load(good)
    step(*make_batch())
    assert step.non_finite() is None
    step(*make_batch(flawed=True))
    assert step.non_finite() == ("gradients", 3)


def test_overflow_under_loss_scaling_skips_the_step():
    step = plain_step("gradients", "mixed_float16")
    step(*make_batch())
    assert {"loss_scale": 32768.0, "skipped_steps": 0.0}.items() <= step.metrics().items()
    before = step.state()
    step(*make_batch(flawed=True))
    changed = {name for name, value in step.state().items() if value.tobytes() != before[name].tobytes()}
    trained = {name for name in before if re.search(r"/(dense|bn)/(kernel|bias|gamma|beta)$|_momentum$", name)}
    assert len(trained) == 8
    assert not trained & changed
    assert {"loss_scale": 16384.0, "skipped_steps": 1.0}.items() <= step.metrics().items()
    step(*make_batch(flawed=True))
    step(*make_batch())
    assert {"loss_scale": 8192.0, "skipped_steps": 2.0}.items() <= step.metrics().items()
    assert not trained & {n for n, v in step.state().items() if v.tobytes() == before[n].tobytes()}
    assert step.non_finite() is None


def test_loss_scale_below_its_minimum_is_reported():
    step = plain_step("gradients", "mixed_float16")
    step.model.optimizer.dynamic_scale.assign(2 * MIN_LOSS_SCALE)
    step(*make_batch(flawed=True))
    assert (step.metrics()["loss_scale"], step.non_finite()) == (1.0, None)
    step(*make_batch(flawed=True))
    assert (step.metrics()["loss_scale"], step.non_finite()) == (0.5, ("gradients (loss scale below 1)", 2))


def test_accumulated_steps_do_not_count_as_skipped():
    reset_keras("mixed_float16")
    step = make_step(compile_model(dense_model(), make_sgd(gradient_accumulation=2)))
    for seed in range(4):
        step(*make_batch(seed=seed))
    assert step.metrics()["skipped_steps"] == 0.0


class Huge(keras.layers.Layer):
    """The global norm of the gradients overflows, and clipping turns the weights into NaN."""

    def call(self, x):
        @tf.custom_gradient
        def pass_on(value):
            return tf.identity(value), lambda upstream: upstream * 1e21

        return pass_on(x)


def test_weights_that_overflow_in_an_update_are_reported_for_that_step():
    reset_keras()
    images = keras.Input((4,))
    x = keras.layers.Rescaling(1 / 64, offset=-2)(images)
    x = Huge()(keras.layers.BatchNormalization(name="bn")(x))
    model = keras.Model(images, {"main": keras.layers.Dense(CLASSES, name="dense")(x)})
    step = make_step(compile_model(model, make_sgd(gradient_clip=1.0)))
    step(*make_batch())
    assert math.isfinite(step.metrics()["total_loss"])
    assert step.non_finite() == ("weights", 1)
