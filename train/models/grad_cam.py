"""Grad-CAM: the regions of an image that support a class.

Source: Selvaraju et al. 2017 (Grad-CAM: Visual Explanations from Deep Networks), equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import ops

from train.models.graph import LayerGraph

if TYPE_CHECKING:
    import jax
    import tensorflow as tf

MIN_MAP_SIZE = 4  # smaller maps do not localise


def grad_cam_layer(model: keras.Model) -> keras.Layer:
    """Finds the deepest layer that all paths share with maps of at least 4 x 4; without one, the shallowest."""
    graph = LayerGraph(model)
    by_name = {layer.name: layer for layer in graph.order}
    maps = []
    name = graph.order[-1].name
    while name := graph.dominator[name]:
        if by_name[name].output.ndim == 4:
            maps.append(by_name[name])
    return next((layer for layer in maps if min(layer.output.shape[1:3]) >= MIN_MAP_SIZE), maps[-1])


def grad_cam(model: keras.Model, images: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns a heat map per image, float32 [N, H, W] in 0..1 (all 0 without support), and the layer's name.

    model: images [N, H, W, C] -> logits [N, classes]; classes: int [N].
    """
    layer = grad_cam_layer(model)
    maps = keras.Model(model.inputs[0], layer.output)(images, training=False)
    classifier = keras.Model(layer.output, model.outputs[0])
    selected = ops.one_hot(classes, model.output_shape[-1])
    gradients = ops.cast(
        GRADIENTS[keras.backend.backend()](lambda x: ops.sum(classifier(x, training=False) * selected), maps), "float32"
    )
    weights = ops.mean(gradients, axis=(1, 2), keepdims=True)
    heat = ops.relu(ops.sum(weights * ops.cast(maps, "float32"), axis=-1, keepdims=True))
    heat = np.asarray(ops.image.resize(heat, images.shape[1:3]))[..., 0]
    maximum = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, maximum, out=np.zeros_like(heat), where=maximum > 0), layer.name


def _tensorflow_gradient(function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


def _jax_gradient(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    import jax

    return jax.grad(function)(x)


GRADIENTS = {"tensorflow": _tensorflow_gradient, "jax": _jax_gradient}  # of a scalar with respect to a tensor


def first_conv_kernel(model: keras.Model) -> tuple[np.ndarray, str]:
    """Returns the first convolution's kernel, float32 [height, width, channels, filters], and its layer's name."""
    layer = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    return np.asarray(layer.kernel, np.float32), layer.name
