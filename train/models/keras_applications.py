"""Rebuilds networks of keras.applications with other widths, fixed names and another normalisation momentum."""

import re
from collections import defaultdict

import keras
from keras import layers

from train.models.blocks import Tensor, scale_channels


def clone_scaled(template: keras.Model, x: Tensor, width: float, momentum: float) -> dict[str, Tensor]:
    """Rebuilds `template` on the tensor `x` with scaled widths, fixed names and the given normalisation momentum.

    The template needs no weights (see `without_weights`). Returns the output of each new layer by its name.
    """
    names = canonical_names(template)
    filters = scaled_filters(template, width)
    tensors = {id(template.input): x}
    outputs = {}
    for layer in template.layers[1:]:  # in topological order; the first is the input
        config = layer.get_config() | {"name": names[layer.name]}
        if isinstance(layer, layers.Conv2D):
            config["filters"] = filters[layer.name]
        if isinstance(layer, layers.BatchNormalization):
            config["momentum"] = momentum
        arguments = keras.tree.map_structure(lambda tensor: tensors[id(tensor)], layer.input)
        tensors[id(layer.output)] = outputs[config["name"]] = type(layer).from_config(config)(arguments)
    return outputs


def canonical_names(template: keras.Model) -> dict[str, str]:
    """Maps layer names to those that a new process would have given.

    Keras numbers unnamed layers over the whole process (`conv2d_94` in the second network); here each kind of layer is
    numbered from the beginning of the network.
    """
    numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)
    names = {layer.name: layer.name for layer in template.layers}
    for layer in template.layers:
        match = re.fullmatch(rf"({_auto_name_stem(layer)})_?(\d*)", layer.name)
        if match:
            numbered[match[1]].append((int(match[2] or 0), layer.name))
    for stem, numbered_names in numbered.items():
        for position, (_, name) in enumerate(sorted(numbered_names)):
            names[name] = f"{stem}_{position}" if position else stem
    return names


def _auto_name_stem(layer: keras.Layer) -> str:
    """Returns the name that Keras numbers for this kind of layer: `BatchNormalization` gives `batch_normalization`."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__).lower()


def scaled_filters(template: keras.Model, width: float) -> dict[str, int]:
    """Returns the filters of each convolution of `template` at the given width, by layer name.

    Each number is rounded, with two exceptions: the last convolution before a concatenation gets what the others leave
    of the rounded total, and the last one of a residual branch the channels of the tensor that it is added to.
    """
    return _ChannelScaler(template, width).filters


class _ChannelScaler:
    """Propagates scaled channel numbers through an unscaled network."""

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

    def _set_filters(self, tensor: Tensor, filters: int) -> None:
        """Sets the width of the convolution whose normalised and activated output `tensor` is, if it is one."""
        chain = [tensor]
        while isinstance(producer := self.producers[id(chain[-1])], layers.BatchNormalization | layers.Activation):
            chain.append(producer.input)
        if isinstance(producer, layers.Conv2D):
            self.filters[producer.name] = filters
            self.channels.update({id(link): filters for link in chain})
