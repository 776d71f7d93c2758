"""Fused updates of weights: the same numbers as Keras, in one kernel."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from train.training import optimizers
from train.training.step.fused_updates import FUSED_OPTIMIZERS
from train.training.step.staged_optimizer import StagedOptimizer

pytestmark = pytest.mark.usefixtures("fresh_keras")

KERNELS = {
    "sgd": "ResourceApplyKerasMomentum", "adamw": "ResourceApplyAdam", "rmsprop": "ResourceApplyRMSProp",
}  # fmt: skip
KERAS = {"sgd": keras.optimizers.SGD, "adamw": keras.optimizers.AdamW, "rmsprop": keras.optimizers.RMSprop}
RATES = {"sgd": 0.1, "adamw": 0.01, "rmsprop": 0.01}
OPTIMIZERS = {
    "momentum": ("sgd", {"momentum": 0.9}, True),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, True),
    "no momentum": ("sgd", {}, False),
    "adamw": ("adamw", {"weight_decay": 0.1, "beta_1": 0.8}, True),
    "amsgrad": ("adamw", {"weight_decay": 0.0, "amsgrad": True}, False),
    "rmsprop": ("rmsprop", {"momentum": 0.9, "epsilon": 1.0}, True),
    "no momentum, rmsprop": ("rmsprop", {}, False),
    "centered, rmsprop": ("rmsprop", {"momentum": 0.9, "centered": True}, False),
}  # name and options, and whether there is a kernel for them


def make_weights() -> list[keras.Variable]:
    return [
        keras.Variable(np.linspace(-1, 1, 6).reshape(2, 3).astype(np.float32), name="kernel"),
        keras.Variable(np.ones(4, np.float32), name="kernel"),
    ]


def update(optimizer: keras.optimizers.Optimizer) -> tuple[dict[str, np.ndarray], set[str]]:
    """Weights and slots after five steps, and the kinds of operations."""
    weights = make_weights()
    optimizer.build(weights)

    @tf.function(autograph=False)
    def step(gradients: list[tf.Tensor]) -> None:
        optimizer.apply(gradients, weights)

    draw = np.random.default_rng(0)
    gradients = [[tf.constant(draw.normal(size=w.shape), tf.float32) for w in weights] for _ in range(5)]
    graph = step.get_concrete_function(gradients[0]).graph
    for one in gradients:
        step(one)
    values = {f"{number}": v.numpy() for number, v in enumerate([*weights, *optimizer.variables])}
    return values, {op.type for op in graph.get_operations()}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_fused_update_matches_keras(case: str):
    name, options, has_kernel = OPTIMIZERS[case]
    expected, _ = update(KERAS[name](RATES[name], **options))
    actual, kinds = update(FUSED_OPTIMIZERS[name](RATES[name], **options))
    assert kinds & set(KERNELS.values()) == ({KERNELS[name]} if has_kernel else set())
    assert actual.keys() == expected.keys()
    for number, value in expected.items():
        np.testing.assert_allclose(actual[number], value, rtol=1e-5, atol=1e-6, err_msg=number)


def test_every_optimizer_has_a_fused_update():
    assert FUSED_OPTIMIZERS.keys() == optimizers.OPTIMIZERS.keys()
    for name, fused in FUSED_OPTIMIZERS.items():
        assert optimizers.optimizer_class(name) is fused
        assert issubclass(fused, optimizers.OPTIMIZERS[name])
        assert fused.update_variable is not StagedOptimizer.update_variable
