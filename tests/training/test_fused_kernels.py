"""Fused kernels of layers: the same numbers as Keras, in less time."""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from train import models
from train.training.step.fused_kernels import fused_kernels

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
    actual = {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    actual |= {v.path: v.numpy() for v in model.non_trainable_variables}
    return {name: np.asarray(tf.cast(value, tf.float32)) for name, value in (actual | {"outputs": outputs}).items()}


def ours(model: keras.Model) -> Any:
    return fused_kernels(model)


def plain(_: keras.Model) -> Any:
    return nullcontext()


def images(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}], ids=str)
def test_fused_batch_norm_matches_keras(options: dict, precision: str):
    actual, theirs = (trained(layer_of(**options), by, images()) for by in (ours, plain))
    assert actual.keys() == theirs.keys()
    rounding = 3e-5 if precision == "float32" else 0.03
    for name, value in theirs.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(actual[name], value, rtol=rounding, atol=rounding * size, err_msg=name)
    np.testing.assert_allclose(actual["bn/moving_variance"], theirs["bn/moving_variance"], rtol=1e-5)


def test_moving_variance_uses_the_batch_variance():
    """For two images of one position the kernel's own estimate is twice as large."""
    two = images((2, 1, 1, 8))
    model = layer_of()
    before = model.get_layer("bn").moving_variance.numpy()
    trained(model, ours, two)
    expected = before * 0.7 + two.var((0, 1, 2)) * 0.3
    np.testing.assert_allclose(model.get_layer("bn").moving_variance.numpy(), expected, rtol=1e-5)
    assert not np.allclose(expected, before * 0.7 + two.var((0, 1, 2), ddof=1) * 0.3, rtol=0.01)


def test_frozen_and_inference_layers_use_moving_statistics():
    model, x = layer_of(), images()
    expected = model(x, training=False).numpy()
    with ours(model):
        np.testing.assert_array_equal(model(x, training=False).numpy(), expected)
        model.get_layer("bn").trainable = False
        np.testing.assert_array_equal(model(x, training=True).numpy(), expected)


def test_layers_are_restored_after_the_context(tmp_path: Any):
    model = models.build("vgg16_inception", (32, 32, 1), 3, width=0.05)
    kernels = {"FusedBatchNormV3"}
    for by, actual in ((ours, kernels), (plain, set())):
        with by(model):
            graph = tf.function(lambda x: model(x, training=True), autograph=False).get_concrete_function(
                tf.TensorSpec((2, 32, 32, 1))
            )
        assert {op.type for op in graph.graph.get_operations()} & kernels == actual
    assert all("call" not in vars(layer) for layer in model.layers)
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")


def test_other_normalizations_are_not_replaced():
    inputs = keras.Input((4, 4, 3))
    kept = [keras.layers.BatchNormalization(axis=1), keras.layers.BatchNormalization(renorm=True)]
    x = inputs
    for layer in kept:
        x = layer(x)
    flat = keras.layers.BatchNormalization()
    outputs = flat(keras.layers.Flatten()(x))
    with ours(keras.Model(inputs, outputs)):
        assert all("call" not in vars(layer) for layer in [*kept, flat])


# ----------------------------------------------------------------------------------------------------- convolution


def convolution(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 7, 5))
    return keras.Model(inputs, keras.layers.Conv2D(name="conv", **options)(inputs))


def kinds_of(model: keras.Model, by: Any, batch: int) -> set[str]:
    """The operations that training is made of."""

    @tf.function(autograph=False)
    def run(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    with by(model):
        graph = run.get_concrete_function(tf.TensorSpec((batch, *model.input_shape[1:]))).graph
    return {op.type for op in graph.get_operations()}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (1, 4), "padding": "same", "activation": "relu"},
        {"kernel_size": (5, 2), "padding": "valid"},
        {"kernel_size": (6, 7), "padding": "valid", "use_bias": False},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_convolution_as_matrix_product_has_the_gradients_of_keras(options: dict, precision: str):
    images = np.random.default_rng(0).normal(0.0, 1.0, (3, 6, 7, 5)).astype(np.float32)
    model = convolution(filters=96, **options)
    assert "Conv2DBackpropFilter" in kinds_of(model, plain, 3)
    assert "Conv2DBackpropFilter" not in kinds_of(model, ours, 3)
    actual, theirs = (trained(model, by, images) for by in (ours, plain))
    assert actual.keys() == theirs.keys()
    rounding = 1e-5 if precision == "float32" else 0.01
    for name, value in theirs.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(actual[name], value, rtol=rounding, atol=rounding * size, err_msg=name)


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"filters": 96, "kernel_size": 3, "padding": "same"}, 5),  # 210 positions, and 192 are the most
        ({"filters": 96, "kernel_size": 3, "strides": 2}, 3),
        ({"filters": 96, "kernel_size": 3, "dilation_rate": 2}, 3),
        ({"filters": 95, "kernel_size": 3, "groups": 5}, 3),
    ],
    ids=str,
)
def test_other_convolutions_are_not_replaced(options: dict, batch: int):
    model = convolution(**options)
    with ours(model):
        outputs = model(np.zeros((batch, 6, 7, 5), np.float32))
    if options.get("groups", 1) == 1:
        assert "Conv2DBackpropFilter" in kinds_of(model, ours, batch)
    np.testing.assert_array_equal(outputs, model(np.zeros((batch, 6, 7, 5), np.float32)))
