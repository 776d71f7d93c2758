"""Optimizers: weight decay, clipping, accumulation and averaged weights, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from support.training import compile_model, constant_schedule, dense_model, make_batch, make_sgd, make_step, reset_keras
from train.training import optimizers, schedules

pytestmark = pytest.mark.usefixtures("fresh_keras")


def test_weight_decay_skips_biases_and_batch_normalization():
    model = compile_model(dense_model(), make_sgd(rate=0.5, weight_decay=0.1))
    before = {variable.path: variable.numpy() for variable in model.trainable_variables}
    model.optimizer.build(model.trainable_variables)
    model.optimizer.apply([tf.zeros_like(v.value) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        factor = 1 - 0.5 * 0.1 if variable.path.endswith("kernel") else 1.0
        np.testing.assert_allclose(variable.numpy(), before[variable.path] * factor, rtol=1e-6, err_msg=variable.path)


def test_gradients_are_clipped_to_a_global_norm():
    model = compile_model(dense_model(), make_sgd(rate=1.0, gradient_clip=0.01))
    before = [variable.numpy() for variable in model.trainable_variables]
    make_step(model)(*make_batch())
    moved = [v.numpy() - old for v, old in zip(model.trainable_variables, before, strict=True)]
    assert math.sqrt(sum(float((m**2).sum()) for m in moved)) == pytest.approx(0.01, rel=1e-4)


def test_accumulated_gradients_update_the_weights_once_by_their_mean():
    def run(accumulation: int, rounds: list[int]) -> np.ndarray:
        reset_keras()
        model = compile_model(dense_model(), make_sgd(gradient_accumulation=accumulation))
        model.get_layer("bn").trainable = False  # its batch statistics would differ between the two ways
        step, start = make_step(model), model.get_layer("dense").kernel.numpy()
        for seed in rounds:
            step(*make_batch(seed=seed))
        return model.get_layer("dense").kernel.numpy() - start

    assert not run(2, [1]).any()
    both, first, second = run(2, [1, 2]), run(1, [1]), run(1, [2])
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-7)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_ema_weights_are_swapped_in_and_back_exactly(policy: str):
    reset_keras(policy)
    model = compile_model(dense_model(), make_sgd(ema=0.5))
    step, kernel = make_step(model), model.get_layer("dense").kernel
    step(*make_batch())
    first = kernel.numpy()  # Keras starts the average here
    step(*make_batch(seed=1))
    after = kernel.numpy()
    with step.using_ema_weights():
        np.testing.assert_allclose(kernel.numpy(), (first + after) / 2, rtol=1e-6)
    assert kernel.numpy().tobytes() == after.tobytes()


def test_unknown_names_are_rejected_with_the_valid_ones():
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, exponential, step, got linear"):
        schedules.build_schedule("linear", stages=[(1, 1.0)], steps_per_epoch=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, rmsprop, got lion"):
        optimizers.build_optimizer(
            "lion", constant_schedule(1), weight_decay=0, gradient_clip=None, gradient_accumulation=1, ema=None
        )
