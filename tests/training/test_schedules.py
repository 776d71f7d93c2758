"""Learning-rate schedules: the rates of every kind, stages, warm-up and the scale."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.training import compile_model, dense_model, make_batch, make_sgd, make_step, reset_keras
from train.training import schedules

pytestmark = pytest.mark.usefixtures("fresh_keras")


def rates(name: str, steps: list[int], warmup: float = 0.0, **options) -> list[float]:
    rate = schedules.build_schedule(name, stages=[(10, 0.8)], steps_per_epoch=10, warmup_epochs=warmup, **options)
    return [round(float(rate(step)), 6) for step in steps]


def test_schedules_match_calculations_by_hand():
    assert rates("constant", [0, 99]) == [0.8, 0.8]
    assert rates("constant", [0, 9, 19, 20, 99], warmup=2) == [0.04, 0.4, 0.8, 0.8, 0.8]
    assert rates("cosine", [0, 50, 100], final_fraction=0.1) == [0.8, 0.44, 0.08]
    assert rates("cosine", [0, 9, 10, 55, 100], warmup=1, final_fraction=0.0) == [0.08, 0.8, 0.8, 0.4, 0.0]
    assert rates("exponential", [0, 19, 20, 40], factor=0.5, every_epochs=2) == [0.8, 0.8, 0.4, 0.2]
    assert rates("step", [0, 50, 51, 76], factor=0.1, milestones=[0.5, 0.75]) == [0.8, 0.8, 0.08, 0.008]


def test_every_stage_has_its_own_schedule():
    rate = schedules.build_schedule(
        "cosine", stages=[(2, 0.8), (3, 0.2)], steps_per_epoch=10, warmup_epochs=0.5, final_fraction=0.0
    )
    actual = {step: round(float(rate(step)), 6) for step in (0, 4, 5, 19, 20, 24, 25, 49)}
    assert (actual[0], actual[4]) == (0.16, 0.8)
    assert actual[5] == 0.8
    assert actual[19] < 0.02
    assert (actual[20], actual[24], actual[25]) == (0.04, 0.2, 0.2)
    assert actual[49] < 0.01


def test_scale_multiplies_the_learning_rate_exactly():
    decay = keras.optimizers.schedules.CosineDecay(0.3, 90, alpha=0.1)
    rate = schedules.ScaledSchedule(schedules.PiecewiseSchedule([(100, schedules.with_warmup(decay, 10))]))
    for step in map(tf.constant, np.arange(100, dtype="float32")):
        bare = decay(tf.maximum(step - 10, 0.0)) * tf.minimum((step + 1) / 10, 1.0)
        rate.scale.assign(1.0)
        assert rate(step).numpy().tobytes() == bare.numpy().tobytes()
        rate.scale.assign(0.25)  # a power of two: not even the last bit is rounded
        assert rate(step).numpy() == 0.25 * bare.numpy()


def test_scale_of_one_does_not_change_training():
    def weights(rate: Callable) -> str:
        reset_keras()
        step = make_step(compile_model(dense_model(), make_sgd(rate, momentum=0.9)))
        for seed in range(4):
            step(*make_batch(seed=seed))
        return step.weights_sha256()

    decay = keras.optimizers.schedules.CosineDecay(0.3, 5)
    slowed = schedules.ScaledSchedule(decay)
    slowed.scale.assign(0.5)
    decay.factor = keras.Variable(1.0)  # the step wants one to write down; the schedule by itself does not read it
    assert weights(schedules.ScaledSchedule(decay)) == weights(decay) != weights(slowed)
