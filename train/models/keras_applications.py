"""Networks of keras.applications rebuilt with other widths, fixed names and another normalisation momentum."""

import re
from collections import defaultdict
from typing import Any

import keras
from keras import layers

from train.models.blocks import Tensor, scale_channels


def clone_scaled(template: keras.Model, x: Tensor, width: float, momentum: float) -> dict[str, Tensor]:
    """Rebuilds `pattern` on the tensor `x` with scaled widths, fixed names and the given normalisation momentum.

    The pattern needs no values (see `symbolic`). Returns the output of each new layer by its name.
    """
    names = canonical_names(template)
    filters = scaled_filters(template, width)
    tensors = {id(template.input): x}
    ends = {}
    for layer in template.layers[1:]:  # in the order of the data; the first is the input
        config = layer.get_config() | {"name": names[layer.name]}
        if isinstance(layer, layers.Conv2D):
            config["filters"] = filters[layer.name]
        if isinstance(layer, layers.BatchNormalization):
            config["momentum"] = momentum
        arguments = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], layer.input)
        tensors[id(layer.output)] = ends[config["name"]] = type(layer).from_config(config)(arguments)
    return ends


def canonical_names(template: keras.Model) -> dict[str, str]:
    """Maps layer names to those that a fresh process would have given.

    Keras counts unnamed layers up over the whole process (`conv2d_94` in the second network); here each kind of
    layer counts from the beginning of the network.
    """
    counted: dict[str, list[tuple[int, str]]] = defaultdict(list)
    names = {layer.name: layer.name for layer in template.layers}
    for layer in template.layers:
        match = re.fullmatch(rf"({_auto_name_stem(layer)})_?(\d*)", layer.name)
        if match:
            counted[match[1]].append((int(match[2] or 0), layer.name))
    for stem, found in counted.items():
        for position, (_, name) in enumerate(sorted(found)):
            names[name] = f"{stem}_{position}" if position else stem
    return names


def _auto_name_stem(layer: keras.Layer) -> str:
    """The name that Keras counts up for this kind of layer: `BatchNormalization` gives `batch_normalization`."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__).lower()


def scaled_filters(template: keras.Model, width: float) -> dict[str, int]:
    """Returns the filters of each convolution of `pattern` at the given width, by layer name.

    Each is rounded, with two exceptions: the last convolution before a concatenation takes what the others leave of
    the rounded total, and the one that ends a residual branch has the channels of the tensor that it is added to.
    """
    return _ChannelScaler(template, width).filters


class _ChannelScaler:
    """Follows the scaled channel numbers through a network that still has its own."""

    def __init__(self, template: keras.Model, width: float) -> None:
        self.width = width
        self.filters: dict[str, int] = {}
        self.channels = {id(template.input): template.input.shape[-1]}
        self.producers: dict[int, keras.Layer] = {}
        for layer in template.layers[1:]:
            self.channels[id(layer.output)] = self._visit(layer)
            self.producers[id(layer.output)] = layer

    def _visit(self, layer: keras.Layer) -> int:
        """Returns the channels of the layer's output."""
        inputs = keras.tree.flatten(layer.input)
        if isinstance(layer, layers.Conv2D):
            self.filters[layer.name] = scale_channels(layer.filters, self.width)
            return self.filters[layer.name]
        if isinstance(layer, layers.Concatenate):
            total = scale_channels(layer.output.shape[-1], self.width)
            self._set_filters(inputs[-1], max(1, total - sum(self.channels[id(tensor)] for tensor in inputs[:-1])))
            return sum(self.channels[id(tensor)] for tensor in inputs)
        if len(inputs) == 2:  # shortcut, residual branch
            self._set_filters(inputs[1], self.channels[id(inputs[0])])
        return self.channels[id(inputs[0])]

    def _set_filters(self, tensor: Any, filters: int) -> None:
        """Sets the width of the convolution whose normalised and activated output `tensor` is, if it is one."""
        chain = [tensor]
        while isinstance(producer := self.producers[id(chain[-1])], layers.BatchNormalization | layers.Activation):
            chain.append(producer.input)
        if isinstance(producer, layers.Conv2D):
            self.filters[producer.name] = filters
            self.channels.update({id(link): filters for link in chain})
