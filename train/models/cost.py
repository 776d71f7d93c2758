"""The cost of a network: multiply-accumulates, parameters and activations, from shapes alone.

The model is not run and its weights need no values (`weights.without_weights()` builds large models quickly). All
figures are for one example and one forward pass. Only convolutions and dense layers have multiply-accumulates;
normalisation, activation functions and pooling have none: they are a few operations per value, and normalisation folds
into the convolution before it.
"""

import math
import re
from dataclasses import dataclass

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


# --- cost per block --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block of a network, or of all of it.

    `output_shape` is that of its last layer, without the batch. `parameters` include non-trainable ones.
    `activations` is the number of output values of its convolutions and dense layers, as in Radosavovic et al. 2020
    (Designing Network Design Spaces), section 3.1.
    """

    block: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activations: int


def block_costs(model: keras.Model) -> list[BlockCost]:
    """Returns a row for each block of a model made by `build` or `inference_model`, in topological order.

    A model made by `build` contains the auxiliary heads, whose rows come last; the inference model does not.

    Raises:
        ValueError: a layer with weights of a kind that `layer_macs` does not support.
    """
    rows: dict[str, BlockCost] = {}
    for layer, block in layer_blocks(model):
        so_far = rows.get(block, BlockCost(block, (), 0, 0, 0))
        macs = layer_macs(layer)
        shape = tuple(layer.output.shape[1:])
        rows[block] = BlockCost(
            block,
            shape,
            so_far.parameters + layer.count_params(),
            so_far.macs + macs,
            so_far.activations + (math.prod(shape) if macs else 0),
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
    """Returns the sum of `block_costs(model)`."""
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
            f"cannot count the multiply-accumulates of {layer.name}, a {type(layer).__name__}; layers with weights "
            "must be Conv2D, Dense or BatchNormalization"
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
    """Returns every layer with the name of its block, in topological order."""
    names = _block_names(model)
    return [(layer, names[layer.name]) for layer in own_layers(model)]


def _block_names(model: keras.Model) -> dict[str, str]:
    """Maps each layer's name to that of its block."""
    aux = {name for name in model.output if name != "main"} if isinstance(model.output, dict) else set()
    names = {}
    for block, members in multi_branch_blocks(model).items():
        names.update(dict.fromkeys((layer.name for layer in members), block))
    after_first_block = False
    for layer in own_layers(model):
        after_first_block = after_first_block or layer.name in names
        names.setdefault(layer.name, _block_name(layer.name, aux, "head" if after_first_block else "stem"))
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
    """Returns the layers of each multi-branch block by the block's name, in topological order.

    Blocks are identified in the graph, not by layer names: a block consists of the layers between one where several
    branches split and the one where they join again; nested blocks belong to the outermost. A block is named after its
    last concatenation.
    """
    graph = LayerGraph(model)
    blocks: dict[str, list[keras.Layer]] = {}
    assigned: set[str] = set()
    for join in reversed(graph.order):  # from the end, so that an outer block comes before those nested in it
        if len(graph.inputs[join.name]) < 2 or join.name in assigned:
            continue
        members = graph.between(graph.dominator[join.name], join.name)
        assigned |= {layer.name for layer in members}
        concatenations = [layer for layer in members if isinstance(layer, layers.Concatenate)]
        if concatenations:
            blocks[re.sub(r"_(Concatenated|mixed)$", "", concatenations[-1].name)] = members
    return dict(reversed(blocks.items()))
