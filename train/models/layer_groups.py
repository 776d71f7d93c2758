"""Layer groups: the parts of a network that fine-tuning freezes and unfreezes, from the image to the classifier."""

import re

import keras

from train.models.cost import layer_blocks

HEAD = "head"  # includes the auxiliary heads
# Names of blocks that form a group together: Block_3_1 and block3, block35_7, inception_4b.
GROUP_NAME_PATTERNS = (re.compile(r"[Bb]lock_?(?P<block>\d+)(_\d+)?"), re.compile(r"(?P<stage>inception_\d)[a-z]"))


def group_layers(model: keras.Model) -> dict[str, list[keras.Layer]]:
    """Groups the layers with weights of a model made by `build`, in topological order, the head last."""
    groups: dict[str, list[keras.Layer]] = {}
    heads: list[keras.Layer] = []
    for layer, block in layer_blocks(model):
        if layer.weights:
            name = _group_name(block)
            (heads if name == HEAD else groups.setdefault(name, [])).append(layer)
    return {**groups, HEAD: heads}


def _group_name(block: str) -> str:
    if block == HEAD or block.startswith("aux"):
        return HEAD
    for pattern in GROUP_NAME_PATTERNS:
        if match := pattern.fullmatch(block):
            parts = match.groupdict()
            return f"block{parts['block']}" if "block" in parts else parts["stage"]
    return block
