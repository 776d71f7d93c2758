"""Losses: the main output and the auxiliary ones, label smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from support.training import compile_model, make_step
from train import models
from train.training import losses

pytestmark = pytest.mark.usefixtures("fresh_keras")


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_main_loss_plus_weighted_auxiliary_losses(name: str, heads: list[str], smoothing: float):
    model = compile_model(models.build(name, (32, 32, 1), 10, width=0.05), label_smoothing=smoothing)
    assert sorted(model.output) == sorted(["main", *heads])
    draw = np.random.default_rng(0)
    logits = {output: draw.normal(size=(16, 10)).astype("float32") for output in model.output}
    truth = draw.integers(10, size=16)
    labels = np.eye(10, dtype="float32")[truth]
    actual = model.compute_loss(y=dict.fromkeys(logits, tf.constant(labels)), y_pred=logits)

    def by_hand(output: str) -> float:
        soft = labels.astype("float64") * (1 - smoothing) + smoothing / 10
        x = logits[output].astype("float64")
        return float(-(soft * (x - np.log(np.exp(x).sum(1, keepdims=True)))).sum(1).mean())

    expected = by_hand("main") + 0.3 * sum(by_hand(head) for head in heads)
    assert float(actual) == pytest.approx(expected, rel=1e-6)
    assert abs(expected - by_hand("main")) > 0.5  # the auxiliary part is no rounding error


def test_loss_without_auxiliary_heads_is_the_main_loss():
    model = compile_model(models.build("vgg16_inception", (32, 32, 1), 10, width=0.05, aux_weight=0), aux_weight=0.0)
    assert list(model.output) == ["main"]
    step = make_step(model, examples=4)
    images = tf.zeros((4, 32, 32, 1), tf.uint8)
    step(images, tf.one_hot([0, 1, 2, 3], 10))
    assert sorted(step.metrics()) == ["accuracy", "loss", "total_loss"]


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
def test_auxiliary_losses_reach_their_heads_and_the_trunk(name: str, heads: list[str]):
    """With a weight of zero for the auxiliary losses, their heads get no gradient and the trunk a different one."""
    model = models.build(name, (32, 32, 1), 10, width=0.05)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1)).astype("float32")
    labels = dict.fromkeys(model.output, tf.one_hot([0, 1, 2, 3], 10))

    def gradients(aux_weight: float) -> dict[str, float]:
        compile_model(model, aux_weight=aux_weight)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=labels, y_pred=model(images, training=False))
        actual = tape.gradient(loss, [v.value for v in model.trainable_variables], unconnected_gradients="zero")
        return {v.path: float(tf.norm(g)) for v, g in zip(model.trainable_variables, actual, strict=True)}

    with_heads, without = gradients(0.3), gradients(0.0)
    kernels = [path for path in with_heads if path.startswith("aux") and path.endswith("kernel")]
    assert len(kernels) >= len(heads)
    assert all(with_heads[path] > 0 and without[path] == 0 for path in kernels)
    first = next(path for path in with_heads if path.endswith("kernel"))
    assert with_heads[first] > 0
    assert with_heads[first] != without[first]


def test_losses_require_a_main_output():
    with pytest.raises(ValueError, match="outputs must contain main, got aux"):
        losses.build_losses(["aux"], 0.3, 0.0)
