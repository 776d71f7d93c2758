"""Faster TensorFlow kernels for batch normalisation, convolution gradients and optimizer updates.

They replace methods of Keras's layers and optimizers while a step is traced; names, weights and files stay Keras's.
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
def fused_kernels(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Traces a training step of `model` with these kernels inside the block. The batch size must be static.

    Results equal Keras's up to the rounding of float32, or of the policy's 16-bit type.
    """
    replacements: list[tuple[Any, str, Any]] = []
    if update := FUSED_UPDATES.get(type(optimizer)):
        replacements.append((optimizer, "update_step", partial(update, optimizer)))
    for layer in model._flatten_layers():
        if can_fuse_batchnorm(layer):
            replacements.append((layer, "call", partial(fused_batchnorm, layer)))
        elif (
            type(layer) is keras.layers.Conv2D and can_replace_conv(layer) and not tf.config.get_visible_devices("GPU")
        ):
            replacements.append((layer, "call", partial(conv_with_matmul_gradient, layer)))
    for owner, name, function in replacements:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in replacements:
            delattr(owner, name)


# --------------------------------------------------------------------------------------------- batch normalisation


def can_fuse_batchnorm(layer: keras.Layer) -> bool:
    """Whether the fused kernel computes what the layer does: channels last, statistics of this device only."""
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.synchronized:
        return False
    return layer.input.ndim == 4 and layer.axis in (-1, 3)


def fused_batchnorm(
    layer: keras.layers.BatchNormalization, inputs: tf.Tensor, training: Any = None, mask: Any = None
) -> Any:
    """Replaces the layer's `call` by TensorFlow's fused kernel: one pass where Keras's operations take several.

    inputs, outputs: [N, H, W, C], in the precision of the policy; sums are computed in float32.
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
    # The kernel returns the unbiased variance; Keras averages the biased variance of the batch.
    biased_variance = variance * ((examples - 1) / examples)
    for moving, current in ((layer.moving_mean, mean), (layer.moving_variance, biased_variance)):
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
    def convolution(images: tf.Tensor, filters: tf.Tensor, *bias: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            image_gradient = tf.nn.conv2d_transpose(upstream, filters, images.shape, 1, padding)
            # TensorFlow's own bias gradient accumulates 16-bit values in 16 bits, with errors of 10%.
            bias_gradient = [tf.reduce_sum(upstream, (0, 1, 2)) for _ in bias]
            return image_gradient, filter_gradient(images, upstream, filters.shape, padding), *bias_gradient

        outputs = tf.nn.conv2d(images, filters, 1, padding)
        return (tf.nn.bias_add(outputs, *bias) if bias else outputs), gradients

    weights = [layer.kernel, layer.bias] if layer.use_bias else [layer.kernel]
    return layer.activation(convolution(inputs, *map(tf.convert_to_tensor, weights)))


def filter_gradient(images: tf.Tensor, upstream: tf.Tensor, shape: Any, padding: str) -> tf.Tensor:
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


# --------------------------------------------------------------------------------------------------------- updates
#
# The update of a weight in one kernel, which reads and writes everything once; Keras's operations do so several times.


def momentum_step(optimizer: keras.optimizers.SGD, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
    """Replaces SGD's `update_step` with momentum. Source: Sutskever et al. 2013, section 2."""
    if not optimizer.momentum:
        return type(optimizer).update_step(optimizer, gradient, variable, learning_rate)
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=resource_handle(variable),
        accum=resource_handle(optimizer.momentums[optimizer._get_variable_index(variable)]),
        lr=tf.cast(learning_rate, variable.dtype),
        grad=gradient,
        momentum=tf.cast(optimizer.momentum, variable.dtype),
        use_nesterov=optimizer.nesterov,
    )
    return None


def adam_step(optimizer: keras.optimizers.AdamW, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
    """Replaces AdamW's `update_step`. Source: Kingma & Ba 2015, algorithm 1."""
    if optimizer.amsgrad:
        return type(optimizer).update_step(optimizer, gradient, variable, learning_rate)
    index = optimizer._get_variable_index(variable)
    step = tf.cast(optimizer.iterations + 1, variable.dtype)
    beta_1, beta_2 = (tf.cast(beta, variable.dtype) for beta in (optimizer.beta_1, optimizer.beta_2))
    tf.raw_ops.ResourceApplyAdam(
        var=resource_handle(variable),
        m=resource_handle(optimizer._momentums[index]),
        v=resource_handle(optimizer._velocities[index]),
        beta1_power=beta_1**step,
        beta2_power=beta_2**step,
        lr=tf.cast(learning_rate, variable.dtype),
        beta1=beta_1,
        beta2=beta_2,
        epsilon=tf.cast(optimizer.epsilon, variable.dtype),
        grad=gradient,
    )
    return None


def rmsprop_step(optimizer: keras.optimizers.RMSprop, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
    """Replaces RMSprop's `update_step` with momentum. Source: Szegedy et al. 2016, section 8."""
    if optimizer.centered or not optimizer.momentum:
        return type(optimizer).update_step(optimizer, gradient, variable, learning_rate)
    index = optimizer._get_variable_index(variable)
    tf.raw_ops.ResourceApplyRMSProp(
        var=resource_handle(variable),
        ms=resource_handle(optimizer._velocities[index]),
        mom=resource_handle(optimizer._momentums[index]),
        lr=tf.cast(learning_rate, variable.dtype),
        rho=tf.cast(optimizer.rho, variable.dtype),
        momentum=tf.cast(optimizer.momentum, variable.dtype),
        epsilon=tf.cast(optimizer.epsilon, variable.dtype),
        grad=gradient,
    )
    return None


FUSED_UPDATES: dict[type, Any] = {
    keras.optimizers.SGD: momentum_step,
    keras.optimizers.AdamW: adam_step,
    keras.optimizers.RMSprop: rmsprop_step,
}


def resource_handle(variable: Any) -> tf.Tensor:
    """The resource handle of a Keras or TensorFlow variable."""
    return (variable.value if isinstance(variable, keras.Variable) else variable).handle
