"""Optimizers: weight decay, clipping, accumulation and averaged weights, computed by hand."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.training import compile_model, constant_schedule, dense_model, make_batch, make_sgd, make_step, reset_keras
from train.training import optimizers, schedules
from train.training.step.layerwise_lr import LayerRate
from train.training.step.staged_optimizer import StagedOptimizer

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


RULES = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adamw": {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-7},
    "rmsprop": {"rho": 0.8, "momentum": 0.9, "epsilon": 1.0},
}
KERAS = {"sgd": keras.optimizers.SGD, "adamw": keras.optimizers.AdamW, "rmsprop": keras.optimizers.RMSprop}


def make_weights() -> list[keras.Variable]:
    """A weight that decays and one that does not."""
    reset_keras()
    return [
        keras.Variable(np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3), name="kernel"),
        keras.Variable(np.linspace(1, 2, 3, dtype="float32"), name="gamma"),
    ]


def apply_steps(optimizer: keras.optimizers.Optimizer, weights: list[keras.Variable]) -> list[np.ndarray]:
    """Weights and the optimizer's variables after four steps."""
    optimizer.build(weights)
    draw = np.random.default_rng(0)
    for _ in range(4):
        optimizer.apply([tf.constant(draw.normal(size=weight.shape), tf.float32) for weight in weights], weights)
    return [variable.numpy() for variable in (*weights, *optimizer.variables)]


@pytest.mark.parametrize("accumulation", [None, 2])
@pytest.mark.parametrize("name", RULES)
def test_updates_are_those_of_keras_to_the_bit(name: str, accumulation: int | None):
    """With Keras's own update of a weight: its weight decay, clipping, averages and accumulation."""
    options = {"weight_decay": 0.1, "use_ema": True, "global_clipnorm": 1.0, **RULES[name], "name": name}
    options["gradient_accumulation_steps"] = accumulation
    reference = KERAS[name](0.1, **options)
    reference.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    expected = apply_steps(reference, make_weights())
    optimizer = optimizers.OPTIMIZERS[name](0.1, **options)
    actual = apply_steps(optimizer, make_weights())
    assert [v.path for v in optimizer.variables] == [v.path for v in reference.variables]
    for variable, value, wanted in zip(range(len(expected)), actual, expected, strict=True):
        assert value.tobytes() == wanted.tobytes(), variable


@pytest.mark.parametrize("name", RULES)
def test_only_the_variables_of_a_stage_are_known(name: str):
    weights = make_weights()
    options = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None}
    optimizer = optimizers.build_optimizer(name, constant_schedule(0.1), **options, **RULES[name])
    optimizer.build(weights)
    optimizer.begin_stage([(weights[1], LayerRate())])
    frozen = weights[0].numpy()
    optimizer.apply([tf.ones(3)], weights[1:])
    assert weights[0].numpy().tobytes() == frozen.tobytes()
    with pytest.raises(KeyError):
        optimizer.apply([tf.ones((2, 3))], weights[:1])


def test_the_optimizer_tracks_no_variable_of_the_model():
    """Keras adds every variable in an attribute to those of the optimizer, which checkpoints contain."""
    weights = make_weights()
    optimizer = make_sgd(momentum=0.9, ema=0.5)
    optimizer.build(weights)
    optimizer.begin_stage([(weight, LayerRate(0.5)) for weight in weights])
    with optimizer.reading([(weights[0], weights[0].value)]):
        paths = [variable.path for variable in optimizer.variables]
    assert paths == [
        "sgd/iteration",
        "sgd/kernel_average",
        "sgd/gamma_average",
        "sgd/kernel_momentum",
        "sgd/gamma_momentum",
    ]


def test_slots_and_steps_are_found_by_their_names():
    weights = make_weights()
    optimizer = make_sgd(momentum=0.9, ema=0.5, gradient_accumulation=2)
    apply_steps(optimizer, weights)
    assert isinstance(optimizer, StagedOptimizer)
    assert [optimizer.slot("average", weight).path for weight in weights] == ["sgd/kernel_average", "sgd/gamma_average"]
    assert optimizer.slot("momentum", weights[1].value) is optimizer.slot("momentum", weights[1])
    assert (int(optimizer.step_count), int(optimizer.iterations)) == (4, 2)


def test_unknown_names_are_rejected_with_the_valid_ones():
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, exponential, step, got linear"):
        schedules.build_schedule("linear", stages=[(1, 1.0)], steps_per_epoch=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, rmsprop, got lion"):
        optimizers.build_optimizer(
            "lion", constant_schedule(1), weight_decay=0, gradient_clip=None, gradient_accumulation=1, ema=None
        )
