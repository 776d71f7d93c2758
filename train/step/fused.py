"""Batch normalisation by TensorFlow's fused kernel: one pass over the images where Keras's own operations take several.

The layers stay Keras's, with their names, weights and files; only a step that is traced meanwhile computes otherwise.
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
def fused(model: keras.Model) -> Iterator[None]:
    """While it lasts, batch normalisation in `model` is traced as one kernel when it trains.

    Source: Ioffe & Szegedy 2015, algorithm 1. Mean and variance are those of Keras's layer within float32 rounding,
    under a 16-bit policy too, where images come and go in 16 bits and are summed up in 32.
    """
    layers = [layer for layer in model._flatten_layers() if is_plain(layer)]
    for layer in layers:
        layer.call = partial(normalise, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call


def is_plain(layer: keras.Layer) -> bool:
    """Whether the kernel can do what the layer does: normalise the channels, which come last, over this device."""
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.synchronized:
        return False
    return layer.input.ndim == 4 and layer.axis in (-1, 3)


def normalise(layer: keras.layers.BatchNormalization, inputs: tf.Tensor, training: Any = None, mask: Any = None) -> Any:
    """What the layer's own `call` does. inputs: [N, H, W, C], in the precision of the policy, as is what comes out."""
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
