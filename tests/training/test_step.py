"""The training step: metrics, gradient norms, example weights, and its learning rate."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.training import EXAMPLES, compile_model, dense_model, make_batch, make_sgd, make_step, reset_keras
from train.training.step.tensorflow import Step

pytestmark = pytest.mark.usefixtures("fresh_keras")


def test_step_metrics_match_keras():
    step = make_step(compile_model(dense_model(aux=True)))
    images, labels = make_batch()
    step(images, labels)
    first = step.metrics()
    assert sorted(first) == ["accuracy", "aux_accuracy", "aux_loss", "loss", "total_loss"]
    assert first["total_loss"] == pytest.approx(first["loss"] + 0.3 * first["aux_loss"], rel=1e-6)
    step.reset_metrics()
    assert step.metrics()["total_loss"] == 0.0


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_gradient_norms_are_those_of_the_last_step_and_do_not_change_training(policy: str):
    images, labels = make_batch()

    def trained(*, gradients: bool) -> Step:
        reset_keras(policy)
        step = make_step(compile_model(dense_model(aux=True), make_sgd(momentum=0.9)), measure_gradients=gradients)
        step(images, labels)
        return step

    reset_keras(policy)
    model = compile_model(dense_model(aux=True))
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


def test_example_weight_scales_the_loss_and_not_the_accuracy():
    weights = np.linspace(0, 2, EXAMPLES, dtype="float32")
    images, labels = make_batch()
    model = compile_model(dense_model(aux=True), make_sgd(0.0))
    step = make_step(model, example_weights=True)
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
    """A step of mixed images takes float32 in 0..255; equal numbers as uint8 give the same loss."""
    images, labels = make_batch()
    floats = tf.cast(images, tf.float32)
    between = floats + tf.one_hot([0], 4) * tf.one_hot([0], EXAMPLES, on_value=0.4, axis=0)
    found = []
    for mixed, given in ((False, images), (True, floats), (True, between)):
        reset_keras()
        step = make_step(compile_model(dense_model(), make_sgd(0.0)), float_images=mixed)
        step(given, labels)
        found.append(step.metrics()["total_loss"])
    assert found[0] == found[1] != found[2]


def test_weights_digest_changes_with_one_bit():
    model = compile_model(dense_model())
    step = make_step(model)
    digest = step.weights_sha256()
    assert digest == step.weights_sha256()
    bias = model.get_layer("dense").bias
    bias.assign(np.nextafter(bias.numpy(), np.float32(2)))
    assert step.weights_sha256() != digest


def test_lr_scale_applies_to_a_traced_step():
    step = make_step(compile_model(dense_model(), make_sgd(0.5)))
    kernel, start = step.model.get_layer("dense").kernel, step.state()

    def moved() -> np.ndarray:
        step.load(start | {"learning_rate_factor": np.float32(step.lr_scale())})
        before = kernel.numpy()
        step(*make_batch())
        return kernel.numpy() - before

    whole = moved()
    step.set_lr_scale(0.125)
    step.set_lr_scale(0.5)  # in place of what was given before, not on top of it
    assert (step.lr_scale(), step.learning_rate()) == (0.5, 0.25)
    np.testing.assert_allclose(moved(), whole / 2, atol=1e-7)
    assert np.abs(whole).max() > 1e-2
    step.load(start)
    assert (step.lr_scale(), step.learning_rate()) == (1.0, 0.5)
