"""Grad-CAM: where in an image the evidence for a class lies.

Source: Selvaraju et al. 2017 (Grad-CAM: Visual Explanations from Deep Networks), equations 1 and 2.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from train.models.graph import Graph

LEAST_SIDE = 4  # a map of fewer positions tells no places


def last_map(model: keras.Model) -> keras.Layer:
    """The deepest layer that everything goes through with maps of at least 4 x 4; of smaller images the first one."""
    graph = Graph(model)
    by_name = {layer.name: layer for layer in graph.order}
    maps, name = [], graph.order[-1].name
    while name := graph.dominator[name]:
        if by_name[name].output.ndim == 4:
            maps.append(by_name[name])
    return next((layer for layer in maps if min(layer.output.shape[1:3]) >= LEAST_SIDE), maps[-1])


def grad_cam(model: keras.Model, images: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, str]:
    """Heat of each image's class, float32 [N, H, W] in 0..1 (all 0 where nothing speaks for it), and the layer's name.

    model: images [N, H, W, C] -> logits [N, classes]; classes: int [N].
    """
    layer = last_map(model)
    maps = keras.Model(model.inputs[0], layer.output)(images, training=False)
    above = keras.Model(layer.output, model.outputs[0])
    own = ops.one_hot(classes, model.output_shape[-1])
    slopes = ops.cast(
        SLOPES[keras.backend.backend()](lambda x: ops.sum(above(x, training=False) * own), maps), "float32"
    )
    weights = ops.mean(slopes, axis=(1, 2), keepdims=True)
    heat = ops.relu(ops.sum(weights * ops.cast(maps, "float32"), axis=-1, keepdims=True))
    heat = np.asarray(ops.image.resize(heat, images.shape[1:3]))[..., 0]
    most = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, most, out=np.zeros_like(heat), where=most > 0), layer.name


def _tensorflow_slopes(function: Any, x: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        found = function(x)
    return tape.gradient(found, x)


def _jax_slopes(function: Any, x: Any) -> Any:
    import jax

    return jax.grad(function)(x)


SLOPES = {"tensorflow": _tensorflow_slopes, "jax": _jax_slopes}  # of a number by a tensor


def first_filters(model: keras.Model) -> tuple[np.ndarray, str]:
    """The kernel of the first convolution, float32 [height, width, channels, filters], and its layer's name."""
    layer = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    return np.asarray(layer.kernel, np.float32), layer.name
