"""The deployment model: from pixels of any size to probabilities, in Keras's own operations only.

In training and evaluation Pillow resizes the images, outside the network (train/data/decode.py). Here the same resizing
is part of the graph, so that every export format and backend supports it.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from train.models.blocks import Tensor

PREPROCESSING = "preprocessing"  # the part of the graph that must never be quantized
IMAGES = "images"
PROBABILITIES = "probabilities"


def deployment_model(network: keras.Model, crop_fraction: float) -> keras.Model:
    """Returns a float32 model from uint8 `[N, H, W, C]` of any size in 0..255 to probabilities `[N, classes]`.

    network: images -> logits, from `inference_model`; its weights are copied. crop_fraction: see `preprocessing_model`.
    """
    side, _, channels = network.input_shape[1:]
    images = keras.Input((None, None, channels), dtype="uint8", name=IMAGES)
    logits = to_float32(network)(preprocessing_model(side, channels, crop_fraction)(images))
    model = keras.Model(images, keras.layers.Softmax(name=PROBABILITIES, dtype="float32")(logits), name=network.name)
    model(np.zeros((1, side, side, channels), np.uint8))  # Keras exports only models that have been called
    return model


def to_float32(network: keras.Model) -> keras.Model:
    """Returns a copy that computes in float32, whatever the original's precision policy."""
    copy = keras.saving.deserialize_keras_object(_with_float32_policy(keras.saving.serialize_keras_object(network)))
    copy.set_weights(network.get_weights())
    return copy


def _with_float32_policy(config: object) -> object:
    """Returns a serialized model with the policy float32 in every layer."""
    if isinstance(config, list | tuple):
        return type(config)(map(_with_float32_policy, config))
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {**config["config"], "name": "float32"}}
    return {name: _with_float32_policy(value) for name, value in config.items()}


def preprocessing_model(image_size: int, channels: int, crop_fraction: float) -> keras.Model:
    """Returns a model from uint8 `[N, H, W, C]` to float32 `[N, image_size, image_size, C]`, integers in 0..255.

    It resizes the centred square of `crop_fraction` of the short side, bilinearly, with antialiasing when it shrinks,
    as `train.data.decode.resize` does. Resizing one axis is a product with a weight matrix, whose size depends on the
    image.
    """
    images = keras.Input((None, None, channels), dtype="uint8", name=IMAGES)
    pixels = ops.cast(images, "float32")
    column = pixels[:, :, 0, 0]
    row = pixels[:, 0, :, 0]
    short_side = ops.minimum(_line_length(column), _line_length(row))
    planes = ops.transpose(pixels, (0, 3, 1, 2))
    vertical, horizontal = (_resize_matrix(line, short_side * crop_fraction, image_size) for line in (column, row))
    resized = ops.matmul(ops.matmul(vertical, planes), ops.transpose(horizontal, (0, 1, 3, 2)))
    rounded = ops.clip(ops.round(ops.transpose(resized, (0, 2, 3, 1))), 0, 255)
    return keras.Model(images, rounded, name=PREPROCESSING)


def _line_length(line: Tensor) -> Tensor:
    """Returns the length of lines `[N, length]` as a tensor `[N, 1]`."""
    return ops.sum(ops.ones_like(line), axis=1, keepdims=True)


def _resize_matrix(line: Tensor, crop_length: Tensor, output_size: int) -> Tensor:
    """Returns the weight of each pixel of a line in each of the new ones, `[N, 1, output_size, length]`.

    line: `[N, length]`. crop_length: `[N, 1]`, the length of the centred part that is resized. The weights form a
    triangle around the centre of the new pixel, two new pixels wide, or two old ones where those are larger.
    """
    scale = crop_length / output_size
    centres = scale * (np.arange(output_size, dtype=np.float32)[None] + 0.5) + (_line_length(line) - crop_length) / 2
    positions = ops.cumsum(ops.ones_like(line), axis=1) - 0.5
    distance = ops.abs(ops.expand_dims(positions, 1) - ops.expand_dims(centres, 2))
    triangle = ops.relu(1 - distance / ops.expand_dims(ops.maximum(scale, 1.0), 2))
    return ops.expand_dims(triangle / ops.sum(triangle, axis=2, keepdims=True), 1)
