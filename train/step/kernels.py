"""The same mathematics in kernels that take less time, for a step that is traced.

The layers stay Keras's, with their names, weights and files; only how a step computes them meanwhile is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf


@contextmanager
def faster(model: keras.Model) -> Iterator[None]:
    """While it lasts, a training step of `model` is traced with these kernels. Batches have to have a known size.

    Results are those of Keras's layers within rounding: of float32, or of the 16 bits that a policy computes in.
    """
    ours: list[tuple[keras.Layer, str, Any]] = []
    for layer in model._flatten_layers():
        if normalises_channels(layer):
            ours.append((layer, "call", partial(normalise, layer)))
        elif type(layer) is keras.layers.Conv2D and is_plain(layer) and not tf.config.get_visible_devices("GPU"):
            ours.append((layer, "convolution_op", partial(convolve, layer)))
    for layer, name, function in ours:
        setattr(layer, name, function)
    try:
        yield
    finally:
        for layer, name, _ in ours:
            delattr(layer, name)


# --------------------------------------------------------------------------------------------- batch normalisation


def normalises_channels(layer: keras.Layer) -> bool:
    """Whether the fused kernel can do what the layer does: normalise channels that come last, over this device."""
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.synchronized:
        return False
    return layer.input.ndim == 4 and layer.axis in (-1, 3)


def normalise(layer: keras.layers.BatchNormalization, inputs: tf.Tensor, training: Any = None, mask: Any = None) -> Any:
    """What the layer's own `call` does, by TensorFlow's fused kernel: one pass where Keras's operations take several.

    inputs: [N, H, W, C], in the precision of the policy, as is what comes out; sums are made in float32.
    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    if not (training and layer.trainable) or mask is not None:
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels, examples = inputs.shape[-1], math.prod(inputs.shape[:-1])
    scale = layer.gamma.value if layer.scale else tf.ones(channels)
    offset = layer.beta.value if layer.center else tf.zeros(channels)
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=scale, offset=offset, mean=tf.zeros(0), variance=tf.zeros(0), epsilon=layer.epsilon
    )
    # The kernel estimates the variance of the population that the batch was drawn from; Keras keeps the batch's own.
    for moving, now in ((layer.moving_mean, mean), (layer.moving_variance, variance * ((examples - 1) / examples))):
        moving.assign(moving * layer.momentum + now * (1.0 - layer.momentum))
    return outputs


# ----------------------------------------------------------------------------------------------------- convolution

# On processors oneDNN's kernel for the gradient of the filters spends most of its time on the filters themselves where
# there are few positions to sum over. There a matrix product is faster, by up to seven times: of all patches of the
# images with the gradients of the outputs. Up to so many positions for each filter it was, by scripts/bench_kernels.py.
POSITIONS_PER_FILTER = {"bfloat16": 16, "float32": 2}


def is_plain(layer: keras.layers.Conv2D) -> bool:
    """A convolution that steps by one position, without gaps and groups."""
    return (layer.strides, layer.dilation_rate, layer.groups) == ((1, 1), (1, 1), 1)


def convolve(layer: keras.layers.Conv2D, inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
    """What the layer's own `convolution_op` does. inputs: [N, H, W, C]; kernel: [height, width, C, filters]."""
    padding = layer.padding.upper()
    outputs = layer.compute_output_shape(inputs.shape)
    if math.prod(outputs[:-1]) > POSITIONS_PER_FILTER.get(inputs.dtype.name, 0) * layer.filters:
        return type(layer).convolution_op(layer, inputs, kernel)

    @tf.custom_gradient
    def convolution(images: tf.Tensor, filters: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            towards = tf.nn.conv2d_transpose(upstream, filters, images.shape, 1, padding)
            return towards, filter_gradient(images, upstream, filters.shape, padding)

        return tf.nn.conv2d(images, filters, 1, padding), gradients

    return convolution(inputs, tf.convert_to_tensor(kernel))


def filter_gradient(images: tf.Tensor, upstream: tf.Tensor, shape: Any, padding: str) -> tf.Tensor:
    """The gradient of a convolution's filters as one matrix product.

    images: [N, H, W, C]; upstream: the gradient of the outputs, [N, h, w, filters]; shape: [height, width, C, filters].
    """
    (height, width, channels, filters), (_, rows, columns, _) = shape, upstream.shape
    if padding == "SAME":
        around = [[(size - 1) // 2, size // 2] for size in (height, width)]
        images = tf.pad(images, [[0, 0], *around, [0, 0]])
    shifted = [images[:, y : y + rows, x : x + columns] for y in range(height) for x in range(width)]
    patches = tf.reshape(tf.concat(shifted, -1), (-1, height * width * channels))
    product = tf.matmul(patches, tf.reshape(upstream, (-1, filters)), transpose_a=True)
    return tf.reshape(product, shape)
