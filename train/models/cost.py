"""What a network costs: multiply-accumulates, parameters and activations, from shapes alone.

Nothing is run, and the model needs no values (build it within `weights.symbolic()` to count a large one at once).
All figures are for one example and one forward pass. Only convolutions and dense layers count as multiply-accumulates;
normalisation, activation functions and pooling count none: they are a few operations for each value, and the first
folds into the convolution before it.
"""

import math
import re
from dataclasses import dataclass, replace

import keras
from keras import layers

from train.models.graph import LayerGraph, own_layers

# --- arithmetic ------------------------------------------------------------------------------------------------------


def conv_macs(height: int, width: int, in_channels: int, filters: int, kernel: tuple[int, int]) -> int:
    """Returns the multiply-accumulates of a convolution whose output is `height` x `width` x `filters`."""
    return height * width * filters * in_channels * kernel[0] * kernel[1]


def conv_parameters(in_channels: int, filters: int, kernel: tuple[int, int], bias: bool = True) -> int:
    """Returns the weights of a convolution, with one bias for each filter unless `bias` is False."""
    return filters * (in_channels * kernel[0] * kernel[1] + bias)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCost:
    """One block of a network, or all of it.

    `output_shape` is that of its last layer, without the batch. `parameters` include those that are not trained.
    `activations` counts the values that its convolutions and dense layers put out, as in Radosavovic et al. 2020
    (Designing Network Design Spaces), section 3.1.
    """

    block: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activations: int


def block_costs(model: keras.Model) -> list[BlockCost]:
    """Returns a row for each block of a model made by `build` or `inference`, in the order of the data.

    For evaluation pass the inference model; the model itself contains the auxiliary heads, whose rows come last.

    Raises:
        ValueError: a layer with weights whose multiply-accumulates are not known here.
    """
    rows: dict[str, BlockCost] = {}
    for layer, block in layer_blocks(model):
        before = rows.get(block, BlockCost(block, (), 0, 0, 0))
        macs = layer_macs(layer)
        shape = tuple(layer.output.shape[1:])
        rows[block] = BlockCost(
            block,
            shape,
            before.parameters + layer.count_params(),
            before.macs + macs,
            before.activations + (math.prod(shape) if macs else 0),
        )
    return sorted(rows.values(), key=lambda row: row.block.startswith("aux"))


def sum_costs(rows: list[BlockCost]) -> BlockCost:
    """Returns the sum of the rows as a row called `total`; its output shape is that of the last main row."""
    main = [row for row in rows if not row.block.startswith("aux")]
    return BlockCost(
        "total",
        main[-1].output_shape,
        sum(row.parameters for row in rows),
        sum(row.macs for row in rows),
        sum(row.activations for row in rows),
    )


def total_cost(model: keras.Model) -> BlockCost:
    """Returns the sum of `cost(model)`."""
    return sum_costs(block_costs(model))


def layer_macs(layer: keras.Layer) -> int:
    """Returns the multiply-accumulates of one layer for one example.

    Raises:
        ValueError: a layer with weights that is neither a convolution, a dense layer nor batch normalisation.
    """
    if type(layer) is layers.Conv2D:
        height, width, filters = layer.output.shape[1:]
        return conv_macs(height, width, layer.input.shape[-1] // layer.groups, filters, layer.kernel_size)
    if type(layer) is layers.Dense:
        return math.prod(layer.output.shape[1:]) * layer.input.shape[-1]
    if layer.weights and not isinstance(layer, layers.BatchNormalization):
        raise ValueError(
            f"layer must be Conv2D, Dense or BatchNormalization, got {type(layer).__name__} {layer.name}; use these"
        )
    return 0


# --- grouping into blocks --------------------------------------------------------------------------------------------

# First match wins; the first group is the name of the block.
BLOCK_NAME_PATTERNS = (
    re.compile(r"([Bb]lock_?\d+_\d+)_.*"),  # Block_3_1_conv, block35_1_ac
    re.compile(r"(block\d+)_(?:conv\d+|pool).*"),  # block1_conv1_bn, block1_pool
    re.compile(r"(conv_7b).*"),
    re.compile(r"(pool[34])"),
)
HEAD_LAYER_NAMES = frozenset({"flatten", "fc1", "fc2", "avg_pool", "max_pool", "dropout", "predictions"})


def layer_blocks(model: keras.Model) -> list[tuple[keras.Layer, str]]:
    """Every layer and the name of its block, in the order of the data."""
    names = _block_names(model)
    return [(layer, names[layer.name]) for layer in own_layers(model)]


def _block_names(model: keras.Model) -> dict[str, str]:
    """Maps each layer's name to its block's."""
    aux = {name for name in model.output if name != "main"} if isinstance(model.output, dict) else set()
    names = {}
    for block, members in multi_branch_blocks(model).items():
        names.update(dict.fromkeys((layer.name for layer in members), block))
    inside = False
    for layer in own_layers(model):
        inside = inside or layer.name in names
        names.setdefault(layer.name, _block_name(layer.name, aux, "stem" if not inside else "head"))
    return names


def _block_name(name: str, aux: set[str], default: str) -> str:
    for head in aux:
        if name.startswith(f"{head}_"):
            return head
    if name in HEAD_LAYER_NAMES:
        return "head"
    matches = (pattern.fullmatch(name) for pattern in BLOCK_NAME_PATTERNS)
    return next((match[1] for match in matches if match), default)


def multi_branch_blocks(model: keras.Model) -> dict[str, list[keras.Layer]]:
    """Returns the layers of each multi-branch block by the block's name, in the order of the data.

    Found in the graph, whatever the layers are called: a block is what lies between the layer where several branches
    part and the one where they join again, blocks within blocks not counted apart. Its name is that of its last
    concatenation.
    """
    graph = LayerGraph(model)
    found: dict[str, list[keras.Layer]] = {}
    taken: set[str] = set()
    for join in reversed(graph.order):  # from the end, so that an outer block is met before those within it
        if len(graph.inputs[join.name]) < 2 or join.name in taken:
            continue
        members = graph.between(graph.dominator[join.name], join.name)
        taken |= {layer.name for layer in members}
        concatenations = [layer for layer in members if isinstance(layer, layers.Concatenate)]
        if concatenations:
            found[re.sub(r"_(Concatenated|mixed)$", "", concatenations[-1].name)] = members
    return dict(reversed(found.items()))


# --- alternatives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockAblation:
    """An Inception block as it is, and what it would cost without the ideas in it. Parameters include normalisation.

    Without reduction: each 1x1 convolution that only feeds larger ones is gone, they see its input. Without
    factorisation: 1xn and nx1, one after the other or side by side, are one nxn; two 3x3 in a row are one 5x5.
    Where a block does not have the idea, the figures are those of the block.
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
    """Returns an alternative for each multi-branch block of the model, in the order of the data."""
    graph = LayerGraph(model)
    return [
        _ablate_block(block, _convolutions(graph, members)) for block, members in multi_branch_blocks(model).items()
    ]


@dataclass(frozen=True)
class _Convolution:
    """A convolution with what normalises it, and its place between the others of its block."""

    name: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    in_channels: int
    filters: int
    output_positions: int  # of its output map
    extra_parameters_per_filter: int  # parameters for each filter besides the kernel: bias, normalisation
    source_layer: str  # the layer whose output it takes, normalisation and activation within the block left out
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
    """Takes out each 1x1 convolution that only feeds larger ones; these see its input instead."""
    by_name = {conv.name: conv for conv in convolutions}
    reductions = {conv.name for conv in convolutions if _is_reduction(conv, by_name)}
    return [
        _with_input_of(conv, by_name[conv.source_layer]) if conv.source_layer in reductions else conv
        for conv in convolutions
        if conv.name not in reductions
    ]


def without_factorisation(convolutions: Block) -> Block:
    """Puts one nxn for each 1xn beside or before its nx1 (or the other way round), one 5x5 for two 3x3 in a row."""
    return _merge_sequential(_merge_parallel(convolutions))


def _is_reduction(conv: _Convolution, by_name: dict[str, _Convolution]) -> bool:
    fed = [by_name.get(name) for name in conv.consumers]
    return conv.kernel == (1, 1) and bool(fed) and all(other and max(other.kernel) > 1 for other in fed)


def _with_input_of(conv: _Convolution, removed: _Convolution) -> _Convolution:
    """`conv` with the input of `removed`, which fed it."""
    return replace(conv, in_channels=removed.in_channels, source_layer=removed.source_layer)


def _merge_parallel(convolutions: Block) -> Block:
    """Merges 1xn and nx1 that take the same input and are concatenated with each other only."""
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
    """Merges pairs that follow each other, from the beginning of each branch; what was merged is left alone."""
    by_name = {conv.name: conv for conv in convolutions}
    gone: set[str] = set()
    for conv in convolutions:
        first = by_name.get(conv.source_layer)
        # The kernel of a merged pair pairs with nothing, so that three in a row are a pair and one.
        if first and first.consumers == (conv.name,) and (kernel := _merged_kernel(first, conv)):
            by_name[conv.name] = replace(_with_input_of(conv, first), kernel=kernel)
            gone.add(first.name)
    return [conv for conv in by_name.values() if conv.name not in gone]


def _merged_kernel(first: _Convolution, second: _Convolution) -> tuple[int, int] | None:
    """The kernel that sees what the two see in turn, if they are a factorisation of it."""
    if first.strides != (1, 1):
        return None
    if _are_transposed(first.kernel, second.kernel):
        return (max(first.kernel), max(first.kernel))
    return (5, 5) if first.kernel == second.kernel == (3, 3) else None


def _convolutions(graph: LayerGraph, members: list[keras.Layer]) -> Block:
    by_name = {layer.name: layer for layer in members}
    return [_convolution(graph, by_name, layer) for layer in members if isinstance(layer, layers.Conv2D)]


def _convolution(graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer) -> _Convolution:
    behind = _trailing_norm_and_activation(graph, members, layer)
    extras = layer.count_params() - math.prod(layer.kernel.shape) + sum(follower.count_params() for follower in behind)
    return _Convolution(
        name=layer.name,
        kernel=tuple(layer.kernel_size),
        strides=tuple(layer.strides),
        in_channels=layer.input.shape[-1],
        filters=layer.filters,
        output_positions=math.prod(layer.output.shape[1:3]),
        extra_parameters_per_filter=extras // layer.filters,
        source_layer=_source_layer(graph, members, layer),
        consumers=tuple(graph.consumers[(behind[-1] if behind else layer).name]),
    )


NORM_OR_ACTIVATION = (layers.BatchNormalization, layers.Activation)


def _trailing_norm_and_activation(
    graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer
) -> list[keras.Layer]:
    """The normalisation and activation that follow a convolution."""
    behind: list[keras.Layer] = []
    while len(following := graph.consumers[(behind[-1] if behind else layer).name]) == 1:
        follower = members.get(following[0])
        if not isinstance(follower, NORM_OR_ACTIVATION):
            break
        behind.append(follower)
    return behind


def _source_layer(graph: LayerGraph, members: dict[str, keras.Layer], layer: keras.Layer) -> str:
    """The layer whose output `layer` takes, normalisation and activation of the same block left out."""
    name = "".join(graph.inputs[layer.name])  # one, or none at the beginning of the network
    while isinstance(members.get(name), NORM_OR_ACTIVATION):
        name = "".join(graph.inputs[name])
    return name
