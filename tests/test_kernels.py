"""train/step/faster.py: the same numbers as Keras's own batch normalisation, in fewer passes."""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from train import models
from train.step.kernels import faster

SHAPE = (5, 6, 7, 8)


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def precision(request: pytest.FixtureRequest):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def layer_of(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, None, SHAPE[-1]))
    layer = keras.layers.BatchNormalization(momentum=0.7, name="bn", **options)
    model = keras.Model(inputs, layer(inputs))
    for variable in model.variables:
        variable.assign(np.random.default_rng(len(variable.path)).uniform(0.5, 1.5, variable.shape))
    return model


def trained(model: keras.Model, by: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Everything a training step takes from a network: outputs, gradients, moving statistics."""
    x = tf.constant(images)

    @tf.function(autograph=False)
    def run() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = model(x, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 3)
        return outputs, tape.gradient(loss, [x, *(v.value for v in model.trainable_variables)])

    with by(model):
        outputs, gradients = run()
    names = ["images", *(v.path for v in model.trainable_variables)]
    found = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    found |= {v.path: v.numpy() for v in model.non_trainable_variables}
    return {name: np.asarray(tf.cast(value, tf.float32)) for name, value in (found | {"outputs": outputs}).items()}


def plain(_: keras.Model) -> Any:
    return nullcontext()


def images(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}], ids=str)
def test_one_kernel_gives_the_numbers_of_keras(options: dict, precision: str):
    ours, theirs = (trained(layer_of(**options), by, images()) for by in (faster, plain))
    assert ours.keys() == theirs.keys()
    rounding = 3e-5 if precision == "float32" else 0.03
    for name, value in theirs.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, rtol=rounding, atol=rounding * size, err_msg=name)
    np.testing.assert_allclose(ours["bn/moving_variance"], theirs["bn/moving_variance"], rtol=1e-5)


def test_the_variance_kept_is_that_of_the_batch():
    """Of two images of one position the kernel's own estimate is twice as large."""
    two = images((2, 1, 1, 8))
    model = layer_of()
    before = model.get_layer("bn").moving_variance.numpy()
    trained(model, faster, two)
    expected = before * 0.7 + two.var((0, 1, 2)) * 0.3
    np.testing.assert_allclose(model.get_layer("bn").moving_variance.numpy(), expected, rtol=1e-5)
    assert not np.allclose(expected, before * 0.7 + two.var((0, 1, 2), ddof=1) * 0.3, rtol=0.01)


def test_a_frozen_layer_and_one_that_is_asked_normalise_by_what_they_know():
    model, x = layer_of(), images()
    expected = model(x, training=False).numpy()
    with faster(model):
        np.testing.assert_array_equal(model(x, training=False).numpy(), expected)
        model.get_layer("bn").trainable = False
        np.testing.assert_array_equal(model(x, training=True).numpy(), expected)


def test_afterwards_the_layers_are_keras_s_own(tmp_path: Any):
    model = models.build("vgg16_inception", (32, 32, 1), 3, width=0.05)
    kernels = {"FusedBatchNormV3"}
    for by, found in ((faster, kernels), (plain, set())):
        with by(model):
            graph = tf.function(lambda x: model(x, training=True), autograph=False).get_concrete_function(
                tf.TensorSpec((2, 32, 32, 1))
            )
        assert {op.type for op in graph.graph.get_operations()} & kernels == found
    assert all("call" not in vars(layer) for layer in model.layers)
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")


def test_other_normalisations_are_left_alone():
    inputs = keras.Input((4, 4, 3))
    kept = [keras.layers.BatchNormalization(axis=1), keras.layers.BatchNormalization(renorm=True)]
    x = inputs
    for layer in kept:
        x = layer(x)
    flat = keras.layers.BatchNormalization()
    outputs = flat(keras.layers.Flatten()(x))
    with faster(keras.Model(inputs, outputs)):
        assert all("call" not in vars(layer) for layer in [*kept, flat])
