"""GoogLeNet (Inception-v1)."""

import keras
from keras import layers

from train.models import heads
from train.models.blocks import (
    BLOCK_KINDS,
    BranchWidths,
    Tensor,
    conv_bn_relu,
    image_input,
    normalize_symmetric,
    scale_channels,
)

# Szegedy et al. 2014, table 1: output, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5; the pool projection gets the rest.
BLOCK_WIDTHS = {
    "3a": BranchWidths(256, 64, 96, 128, 16, 32),
    "3b": BranchWidths(480, 128, 128, 192, 32, 96),
    "4a": BranchWidths(512, 192, 96, 208, 16, 48),
    "4b": BranchWidths(512, 160, 112, 224, 24, 64),
    "4c": BranchWidths(512, 128, 128, 256, 24, 64),
    "4d": BranchWidths(528, 112, 144, 288, 32, 64),
    "4e": BranchWidths(832, 256, 160, 320, 32, 128),
    "5a": BranchWidths(832, 256, 160, 320, 32, 128),
    "5b": BranchWidths(1024, 384, 192, 384, 48, 128),
}
POOL_AFTER = {"3b": "pool3", "4e": "pool4"}
AUX_AFTER = {"4a": "aux_1", "4d": "aux_2"}


def inception_v1(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    head: str,
    batch_norm_momentum: float,
    aux_weight: float,
    batch_norm: bool,
) -> keras.Model:
    """GoogLeNet with its two auxiliary classifiers.

    Source: Szegedy et al. 2014 (Going Deeper with Convolutions), table 1 and section 5. `batch_norm=False` gives the
    published layers, with biases; `batch_norm=True` puts batch normalisation after each convolution, so that the
    network trains from scratch. The local response normalisation, which figure 3 shows and table 1 does not list, is
    omitted.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 32, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux_1`, `aux_2`.
    """
    momentum = batch_norm_momentum if batch_norm else None
    inputs = image_input(input_shape)
    x = stem(normalize_symmetric(inputs), width, momentum)
    aux_inputs = {}
    for block, widths in BLOCK_WIDTHS.items():
        x = BLOCK_KINDS["inception_v1"](x, widths.scaled(width), f"inception_{block}", momentum)
        if block in AUX_AFTER:
            aux_inputs[AUX_AFTER[block]] = x
        if block in POOL_AFTER:
            x = _pool(x, POOL_AFTER[block])
    # The auxiliary heads are built last, so that all other initial values are the same with and without them.
    outputs = {"main": heads.main_head(x, head, num_classes, width, dropout=0.4)}
    if aux_weight:
        for name, aux_input in aux_inputs.items():
            outputs[name] = heads.aux_inception_v1(aux_input, num_classes, width, momentum, name)
    return keras.Model(inputs, outputs, name="inception_v1")


def stem(x: Tensor, width: float, momentum: float | None) -> Tensor:
    """Builds the layers before the first Inception block: `[N, H, W, C]` to `[N, H / 8, W / 8, 192]`."""
    x = conv_bn_relu(x, scale_channels(64, width), (7, 7), "conv1", momentum, strides=2)  # 112 x 112 x 64
    x = _pool(x, "pool1")  # 56 x 56 x 64
    x = conv_bn_relu(x, scale_channels(64, width), (1, 1), "conv2_reduce", momentum)
    x = conv_bn_relu(x, scale_channels(192, width), (3, 3), "conv2", momentum)  # 56 x 56 x 192
    return _pool(x, "pool2")  # 28 x 28 x 192


def _pool(x: Tensor, name: str) -> Tensor:
    return layers.MaxPooling2D((3, 3), strides=2, padding="same", name=name)(x)
