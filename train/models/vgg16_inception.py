"""VGG16 with batch normalisation, whose stages may consist of Inception blocks."""

from collections.abc import Sequence

import keras

from train.models.blocks import BLOCK_KINDS, image_input, normalize_symmetric
from train.models.vgg16 import build_stages


def vgg16_inception(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    head: str,
    batch_norm_momentum: float,
    aux_weight: float,
    blocks: Sequence[str],
) -> keras.Model:
    """VGG16 whose five stages each consist of one kind of block, with an auxiliary classifier after the fourth.

    Source: the VGG16-Inception notebook, whose stage 3 has `inception_v1` blocks and stage 5 `inception_v3` ones, the
    others `conv_bn`; the kinds and their papers are in `train.models.blocks`.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 32, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux`.
    """
    inputs = image_input(input_shape)
    x = normalize_symmetric(inputs)
    kinds = [(kind, BLOCK_KINDS[kind]) for kind in blocks]
    outputs = build_stages(x, kinds, num_classes, width, head, batch_norm_momentum, aux_weight)
    return keras.Model(inputs, outputs, name="vgg16_inception")
