"""A network as a graph of layers, independent of their names."""

import keras
from keras import layers


def own_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns the layers of the network proper, without the input and the normalisation of the images."""
    return [layer for layer in model.layers if not isinstance(layer, layers.InputLayer) and layer.name != "normalize"]


class LayerGraph:
    """The inputs and consumers of each layer, and its dominator: the last layer that every path to it goes through."""

    def __init__(self, model: keras.Model) -> None:
        self.order = own_layers(model)
        by_tensor = {id(layer.output): layer.name for layer in self.order}
        self.inputs = {
            layer.name: [by_tensor[id(t)] for t in keras.tree.flatten(layer.input) if id(t) in by_tensor]
            for layer in self.order
        }
        self.consumers: dict[str, list[str]] = {layer.name: [] for layer in self.order}
        for name, sources in self.inputs.items():
            for source in sources:
                self.consumers[source].append(name)
        self.position = {layer.name: position for position, layer in enumerate(self.order)}
        self.dominator: dict[str, str] = {}
        for layer in self.order:
            self.dominator[layer.name] = self._common_dominator(self.inputs[layer.name])

    def _common_dominator(self, sources: list[str]) -> str:
        """Finds the last layer that all paths to all `sources` share; empty at the beginning of the network."""
        common = sources[0] if sources else ""
        for other in sources[1:]:
            while common != other:
                # `order` is topological, so the later of the two cannot dominate the other.
                if self.position.get(common, -1) > self.position.get(other, -1):
                    common = self.dominator[common]
                else:
                    other = self.dominator[other]
        return common

    def between(self, start: str, end: str) -> list[keras.Layer]:
        """Returns the layers on the paths from `start`, excluded, to `end`, included."""
        members = {end}
        waiting = [end]
        while waiting:
            for source in self.inputs[waiting.pop()]:
                if source != start and source not in members:
                    members.add(source)
                    waiting.append(source)
        return [layer for layer in self.order if layer.name in members]
