"""Faster TensorFlow kernels for batch normalisation and convolution gradients.

They replace the layers' `call` while a step is traced; names, weights and files stay Keras's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import keras
import tensorflow as tf

Gradients = Callable[[tf.Tensor], tuple[tf.Tensor, ...]]  # of the inputs of an operation, from that of its output


@contextmanager
def fused_kernels(model: keras.Model) -> Iterator[None]:
    """Traces a training step of `model` with these kernels inside the block. The batch size must be static.

    Results equal Keras's up to the rounding of float32, or of the policy's 16-bit type.
    """
    calls = [(layer, call) for layer in model._flatten_layers() if (call := faster_call(layer))]
    for layer, call in calls:
        layer.call = call
    try:
        yield
    finally:
        for layer, _ in calls:
            del layer.call


def faster_call(layer: keras.Layer) -> Callable[..., tf.Tensor] | None:
    """What replaces the layer's `call`, if anything."""
    if can_fuse_batchnorm(layer):
        return partial(fused_batchnorm, layer)
    if type(layer) is keras.layers.Conv2D and can_replace_conv(layer) and not tf.config.get_visible_devices("GPU"):
        return partial(conv_with_matmul_gradient, layer)
    return None


# --------------------------------------------------------------------------------------------- batch normalisation


def can_fuse_batchnorm(layer: keras.Layer) -> bool:
    """Whether the fused kernel computes what the layer does: channels last, statistics of this device only."""
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.synchronized:
        return False
    return layer.input.ndim == 4 and layer.axis in (-1, 3)


def fused_batchnorm(
    layer: keras.layers.BatchNormalization,
    inputs: tf.Tensor,
    training: bool | None = None,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Replaces the layer's `call` by TensorFlow's fused kernel: one pass where Keras's operations take several.

    inputs, outputs: [N, H, W, C], in the precision of the policy; sums are computed in float32.
    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    if not (training and layer.trainable) or mask is not None:
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels, examples = inputs.shape[-1], math.prod(inputs.shape[:-1])
    scale = layer.gamma.value if layer.gamma is not None else tf.ones(channels)
    offset = layer.beta.value if layer.beta is not None else tf.zeros(channels)
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=scale, offset=offset, mean=tf.zeros(0), variance=tf.zeros(0), epsilon=layer.epsilon
    )
    # The kernel returns the unbiased variance; Keras averages the biased variance of the batch.
    biased_variance = variance * ((examples - 1) / examples)
    for moving, current in ((layer.moving_mean, mean), (layer.moving_variance, biased_variance)):
        assert moving is not None  # the layer is built
        moving.assign(moving * layer.momentum + current * (1.0 - layer.momentum))
    return outputs


# ----------------------------------------------------------------------------------------------------- convolution

# On CPUs, oneDNN's kernel for the filter gradient spends most of its time on the filters themselves if there are few
# positions to sum over. The matrix product of all image patches with the output gradients is then up to ten times as
# fast: up to this many positions per filter, measured by scripts/benchmarks/kernels.py. In bfloat16 it was always
# faster for 1x1 kernels, whose patches are the images.
MAX_POSITIONS_PER_FILTER = {"bfloat16": 16, "float32": 2}


def is_matmul_faster(precision: str, kernel: tuple[int, int], positions: int, filters: int) -> bool:
    """Whether the filter gradient is faster as a matrix product. positions: output pixels of all images of a batch."""
    if (precision, kernel) == ("bfloat16", (1, 1)):
        return True
    return positions <= MAX_POSITIONS_PER_FILTER.get(precision, 0) * filters


def can_replace_conv(layer: keras.layers.Conv2D) -> bool:
    """Whether the convolution has stride 1, no dilation and no groups."""
    return (layer.strides, layer.dilation_rate, layer.groups) == ((1, 1), (1, 1), 1)


def conv_with_matmul_gradient(layer: keras.layers.Conv2D, inputs: tf.Tensor) -> tf.Tensor:
    """Replaces the layer's `call`, with `filter_gradient` where that is faster. inputs: [N, H, W, C]."""
    padding, positions = layer.padding.upper(), math.prod(layer.compute_output_shape(inputs.shape)[:-1])
    if not is_matmul_faster(inputs.dtype.name, layer.kernel_size, positions, layer.filters):
        return type(layer).call(layer, inputs)

    @tf.custom_gradient
    def convolution(images: tf.Tensor, filters: tf.Tensor, *bias: tf.Tensor) -> tuple[tf.Tensor, Gradients]:
        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            image_gradient = tf.nn.conv2d_transpose(upstream, filters, images.shape, 1, padding)
            # TensorFlow's own bias gradient accumulates 16-bit values in 16 bits, with errors of 10%.
            bias_gradient = [tf.reduce_sum(upstream, (0, 1, 2)) for _ in bias]
            return image_gradient, filter_gradient(images, upstream, filters.shape, padding), *bias_gradient

        outputs = tf.nn.conv2d(images, filters, 1, padding)
        return (tf.nn.bias_add(outputs, *bias) if bias else outputs), gradients

    weights = [layer.kernel, layer.bias] if layer.use_bias else [layer.kernel]
    return layer.activation(convolution(inputs, *map(tf.convert_to_tensor, weights)))


def filter_gradient(images: tf.Tensor, upstream: tf.Tensor, shape: Sequence[int], padding: str) -> tf.Tensor:
    """The gradient of a convolution's filters, as one matrix product.

    images: [N, H, W, C]; upstream: the gradient of the outputs, [N, h, w, filters]; shape: [height, width, C, filters].
    """
    (height, width, channels, filters), (_, rows, columns, _) = shape, upstream.shape
    if padding == "SAME":
        margins = [[(size - 1) // 2, size // 2] for size in (height, width)]
        images = tf.pad(images, [[0, 0], *margins, [0, 0]])
    shifted = [images[:, y : y + rows, x : x + columns] for y in range(height) for x in range(width)]
    patches = tf.reshape(tf.concat(shifted, -1), (-1, height * width * channels))
    product = tf.matmul(patches, tf.reshape(upstream, (-1, filters)), transpose_a=True)
    return tf.reshape(product, shape)
