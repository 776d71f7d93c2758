"""A network as a graph of layers, whatever they are called."""

import keras
from keras import layers


def own_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers that belong to the network: not the input, not the normalisation of the images."""
    return [layer for layer in model.layers if not isinstance(layer, layers.InputLayer) and layer.name != "normalize"]


class LayerGraph:
    """Which layer feeds which, and the layer that every path to a layer goes through."""

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
        """The last layer that all paths to all `sources` share; empty at the beginning of the network."""
        common = sources[0] if sources else ""
        for other in sources[1:]:
            while common != other:
                # The later one of the two cannot be shared, as the order is that of the data.
                if self.position.get(common, -1) > self.position.get(other, -1):
                    common = self.dominator[common]
                else:
                    other = self.dominator[other]
        return common

    def between(self, start: str, end: str) -> list[keras.Layer]:
        """The layers on the paths from `start`, not included, to `end`, included."""
        members, waiting = {end}, [end]
        while waiting:
            for source in self.inputs[waiting.pop()]:
                if source != start and source not in members:
                    members.add(source)
                    waiting.append(source)
        return [layer for layer in self.order if layer.name in members]
