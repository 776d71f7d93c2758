"""Block ablations: what an Inception block would cost without its 1x1 reductions or its factorisation.

As in `train.models.cost`, all figures come from shapes alone, for one example and one forward pass.
"""

import math
from dataclasses import dataclass, replace

import keras
from keras import layers

from train.models.cost import conv_macs, conv_parameters, multi_branch_blocks
from train.models.graph import LayerGraph


@dataclass(frozen=True)
class BlockAblation:
    """The cost of an Inception block as built, and without its ideas. Parameters include normalisation.

    Without reduction, each 1x1 convolution that feeds only larger ones is removed, and they take its input. Without
    factorisation, one nxn replaces 1xn and nx1, in sequence or in parallel, and one 5x5 replaces two 3x3 in sequence.
    Where a block does not use an idea, its figures without it are those of the block.
    """

    block: str
    macs: int
    parameters: int
    macs_without_reduction: int
    parameters_without_reduction: int
    macs_without_factorisation: int
    parameters_without_factorisation: int
    macs_without_both: int
    parameters_without_both: int


def block_ablations(model: keras.Model) -> list[BlockAblation]:
    """Returns the ablation of each multi-branch block of the model, in topological order."""
    graph = LayerGraph(model)
    return [
        _ablate_block(block, _convolutions(graph, members)) for block, members in multi_branch_blocks(model).items()
    ]


@dataclass(frozen=True)
class _Convolution:
    """A convolution with its normalisation, and its connections within the block."""

    name: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    in_channels: int
    filters: int
    output_positions: int  # height times width of its output
    extra_parameters_per_filter: int  # besides the kernel: bias, normalisation
    source_layer: str  # the layer whose output it takes, skipping the block's normalisation and activation
    consumers: tuple[str, ...]  # the layers that take its normalised and activated output

    @property
    def macs(self) -> int:
        return conv_macs(self.output_positions, 1, self.in_channels, self.filters, self.kernel)

    @property
    def parameters(self) -> int:
        return (
            conv_parameters(self.in_channels, self.filters, self.kernel, bias=False)
            + self.extra_parameters_per_filter * self.filters
        )


Block = list[_Convolution]


def _ablate_block(block: str, convolutions: Block) -> BlockAblation:
    variants = (
        convolutions,
        without_reduction(convolutions),
        without_factorisation(convolutions),
        without_factorisation(without_reduction(convolutions)),
    )
    figures = [
        figure
        for variant in variants
        for figure in (sum(conv.macs for conv in variant), sum(conv.parameters for conv in variant))
    ]
    return BlockAblation(block, *figures)


def without_reduction(convolutions: Block) -> Block:
    """Removes each 1x1 convolution that feeds only larger ones, which then take its input."""
    by_name = {conv.name: conv for conv in convolutions}
    reductions = {conv.name for conv in convolutions if _is_reduction(conv, by_name)}
    return [
        _with_input_of(conv, by_name[conv.source_layer]) if conv.source_layer in reductions else conv
        for conv in convolutions
        if conv.name not in reductions
    ]


def without_factorisation(convolutions: Block) -> Block:
    """Replaces 1xn and nx1, parallel or in sequence, by one nxn, and two 3x3 in sequence by one 5x5."""
    return _merge_sequential(_merge_parallel(convolutions))


def _is_reduction(conv: _Convolution, by_name: dict[str, _Convolution]) -> bool:
    consumers = [by_name.get(name) for name in conv.consumers]
    return conv.kernel == (1, 1) and bool(consumers) and all(other and max(other.kernel) > 1 for other in consumers)


def _with_input_of(conv: _Convolution, removed: _Convolution) -> _Convolution:
    """Connects `conv` to the input of `removed`, which fed it."""
    return replace(conv, in_channels=removed.in_channels, source_layer=removed.source_layer)


def _merge_parallel(convolutions: Block) -> Block:
    """Merges 1xn and nx1 that have the same input and the same consumers."""
    merged: Block = []
    for conv in convolutions:
        twin = next((other for other in merged if _are_parallel_factors(other, conv)), None)
        if twin is None:
            merged.append(conv)
            continue
        size = max(conv.kernel)
        merged[merged.index(twin)] = replace(twin, kernel=(size, size), filters=twin.filters + conv.filters)
    return merged


def _are_parallel_factors(first: _Convolution, second: _Convolution) -> bool:
    return (
        _are_transposed(first.kernel, second.kernel)
        and first.source_layer == second.source_layer
        and first.consumers == second.consumers
    )


def _are_transposed(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first == second[::-1] and min(first) == 1 < max(first)


def _merge_sequential(convolutions: Block) -> Block:
    """Merges pairs in sequence, from the beginning of each branch; a merged pair is not merged again."""
    by_name = {conv.name: conv for conv in convolutions}
    merged: set[str] = set()
    for conv in convolutions:
        first = by_name.get(conv.source_layer)
        # A merged kernel matches no other, so that three in sequence become a pair and one.
        if first and first.consumers == (conv.name,) and (kernel := _merged_kernel(first, conv)):
            by_name[conv.name] = replace(_with_input_of(conv, first), kernel=kernel)
            merged.add(first.name)
    return [conv for conv in by_name.values() if conv.name not in merged]


def _merged_kernel(first: _Convolution, second: _Convolution) -> tuple[int, int] | None:
    """Returns the kernel that the two factorise, if any: the one with their joint receptive field."""
    if first.strides != (1, 1):
        return None
    if _are_transposed(first.kernel, second.kernel):
        return (max(first.kernel), max(first.kernel))
    return (5, 5) if first.kernel == second.kernel == (3, 3) else None


def _convolutions(graph: LayerGraph, members: list[keras.Layer]) -> Block:
    by_name = {layer.name: layer for layer in members}
    return [_convolution(graph, by_name, layer) for layer in members if isinstance(layer, layers.Conv2D)]


def _convolution(graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer) -> _Convolution:
    trailing = _trailing_norm_and_activation(graph, members, layer)
    bias = layer.count_params() - math.prod(layer.kernel.shape)
    extras = bias + sum(follower.count_params() for follower in trailing)
    return _Convolution(
        name=layer.name,
        kernel=tuple(layer.kernel_size),
        strides=tuple(layer.strides),
        in_channels=layer.input.shape[-1],
        filters=layer.filters,
        output_positions=math.prod(layer.output.shape[1:3]),
        extra_parameters_per_filter=extras // layer.filters,
        source_layer=_source_layer(graph, members, layer),
        consumers=tuple(graph.consumers[(trailing[-1] if trailing else layer).name]),
    )


NORM_OR_ACTIVATION = (layers.BatchNormalization, layers.Activation)


def _trailing_norm_and_activation(
    graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer
) -> list[keras.Layer]:
    """Returns the normalisation and activation that directly follow a convolution."""
    trailing: list[keras.Layer] = []
    while len(consumers := graph.consumers[(trailing[-1] if trailing else layer).name]) == 1:
        follower = members.get(consumers[0])
        if not isinstance(follower, NORM_OR_ACTIVATION):
            break
        trailing.append(follower)
    return trailing


def _source_layer(graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer) -> str:
    """Returns the layer whose output `layer` takes, skipping normalisation and activation of the same block."""
    name = "".join(graph.inputs[layer.name])  # one input, or none at the beginning of the network
    while isinstance(members.get(name), NORM_OR_ACTIVATION):
        name = "".join(graph.inputs[name])
    return name
