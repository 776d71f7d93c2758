"""The parts of a network that are frozen and set free one after the other, from the image to the classifier."""

import re

import keras

from train.models.cost import layer_blocks

HEAD = "head"  # with the auxiliary ones
# What several blocks are parts of: Block_3_1 and block3, block35_7, inception_4b.
GROUP_NAME_PATTERNS = (re.compile(r"[Bb]lock_?(?P<block>\d+)(_\d+)?"), re.compile(r"(?P<stage>inception_\d)[a-z]"))


def group_layers(model: keras.Model) -> dict[str, list[keras.Layer]]:
    """The layers with weights of each part of a model made by `build`, in the order of the data, the head last."""
    found: dict[str, list[keras.Layer]] = {}
    heads: list[keras.Layer] = []
    for layer, block in layer_blocks(model):
        if layer.weights:
            name = _group_name(block)
            (heads if name == HEAD else found.setdefault(name, [])).append(layer)
    return {**found, HEAD: heads}


def _group_name(block: str) -> str:
    if block == HEAD or block.startswith("aux"):
        return HEAD
    for pattern in GROUP_NAME_PATTERNS:
        if match := pattern.fullmatch(block):
            named = match.groupdict()
            return f"block{named['block']}" if "block" in named else named["stage"]
    return block
