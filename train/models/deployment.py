"""The network as it is given away: from pixels of any size to probabilities, all of it Keras's own operations.

What is measured is resized by Pillow, outside the network (train/data/decode.py). Here the same is said once more as a
graph, which every format and backend can carry.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

Tensor = Any

PREPROCESSING = "preprocessing"  # the part of the graph that must never be computed in few bits
IMAGES, PROBABILITIES = "images", "probabilities"


def deployment_model(network: keras.Model, crop_fraction: float = 1.0) -> keras.Model:
    """Returns a float32 model from uint8 `[N, H, W, C]` of any size in 0..255 to probabilities `[N, classes]`.

    network: images -> logits, as `inference` makes it; its weights are copied. crop_fraction: see `preprocessing`.
    """
    side, _, channels = network.input_shape[1:]
    images = keras.Input((None, None, channels), dtype="uint8", name=IMAGES)
    logits = to_float32(network)(preprocessing_model(side, channels, crop_fraction)(images))
    model = keras.Model(images, keras.layers.Softmax(name=PROBABILITIES, dtype="float32")(logits), name=network.name)
    model(np.zeros((1, side, side, channels), np.uint8))  # Keras exports what has been called
    return model


def to_float32(network: keras.Model) -> keras.Model:
    """Returns a copy that computes in float32, whatever the original was trained in."""
    copy = keras.saving.deserialize_keras_object(_with_float32_policy(keras.saving.serialize_keras_object(network)))
    copy.set_weights(network.get_weights())
    return copy


def _with_float32_policy(config: Any) -> Any:
    """A serialized model, every layer of which has Keras's policy float32."""
    if isinstance(config, list | tuple):
        return type(config)(map(_with_float32_policy, config))
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {**config["config"], "name": "float32"}}
    return {name: _with_float32_policy(value) for name, value in config.items()}


def preprocessing_model(image_size: int, channels: int, crop_fraction: float = 1.0) -> keras.Model:
    """Returns uint8 `[N, H, W, C]` in 0..255 to float32 `[N, side, side, C]`, whole numbers in 0..255.

    The centred square of `crop_fraction` of the short side, bilinear, antialiased when it shrinks: what
    `train.data.decode.resize` does. Resizing along one side is a product with a matrix of weights, whose size comes
    from the image itself.
    """
    images = keras.Input((None, None, channels), dtype="uint8", name=IMAGES)
    pixels = ops.cast(images, "float32")
    down, across = pixels[:, :, 0, 0], pixels[:, 0, :, 0]
    short = ops.minimum(_line_length(down), _line_length(across))
    planes = ops.transpose(pixels, (0, 3, 1, 2))
    rows, columns = (_resize_matrix(line, short * crop_fraction, image_size) for line in (down, across))
    resized = ops.matmul(ops.matmul(rows, planes), ops.transpose(columns, (0, 1, 3, 2)))
    whole = ops.clip(ops.round(ops.transpose(resized, (0, 2, 3, 1))), 0, 255)
    return keras.Model(images, whole, name=PREPROCESSING)


def _line_length(line: Tensor) -> Tensor:
    """How many there are in each row of `[N, length]`, as `[N, 1]`."""
    return ops.sum(ops.ones_like(line), axis=1, keepdims=True)


def _resize_matrix(line: Tensor, crop_length: Tensor, output_size: int) -> Tensor:
    """What each pixel of a line contributes to each of `side` new ones, `[N, 1, side, length]`.

    line: `[N, length]`. extent: `[N, 1]`, how much of it is looked at, in its middle. A triangle around the centre of
    the new pixel, as wide as two of them, or two of the old ones where those are larger.
    """
    scale = crop_length / output_size
    centres = scale * (np.arange(output_size, dtype=np.float32)[None] + 0.5) + (_line_length(line) - crop_length) / 2
    places = ops.cumsum(ops.ones_like(line), axis=1) - 0.5
    distance = ops.abs(ops.expand_dims(places, 1) - ops.expand_dims(centres, 2))
    triangle = ops.relu(1 - distance / ops.expand_dims(ops.maximum(scale, 1.0), 2))
    return ops.expand_dims(triangle / ops.sum(triangle, axis=2, keepdims=True), 1)
