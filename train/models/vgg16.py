"""VGG16, and the builder it shares with its Inception variants."""

import keras
from keras import layers

from train.models import blocks, heads
from train.models.blocks import BLOCK_KINDS, PLAIN_KINDS, Tensor

# Simonyan & Zisserman 2014, table 1, configuration D: channels and number of convolutions of each stage.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float = 1.0,
    head: str = "avg",
    batch_norm_momentum: float = 0.9,
    aux_weight: float = 0.3,
) -> keras.Model:
    """VGG16 with an auxiliary classifier after its fourth stage.

    Source: Simonyan & Zisserman 2014 (Very Deep Convolutional Networks), table 1, configuration D; layer names as in
    keras.applications. The trunk has no batch normalisation; `batch_norm_momentum` is that of the auxiliary head.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 32, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux`.
    """
    inputs = blocks.images(input_shape)
    x = blocks.normalize_caffe(inputs)
    outputs = staged(x, ("conv",) * 5, num_classes, width, head, batch_norm_momentum, aux_weight)
    return keras.Model(inputs, outputs, name="vgg16")


def staged(
    x: Tensor,
    kinds: tuple[str, ...],
    num_classes: int,
    width: float,
    head: str,
    momentum: float,
    aux_weight: float,
) -> dict[str, Tensor]:
    """Returns the logits of a VGG16 whose five stages are made of the given block kinds, on normalised images."""
    fourth = None
    for number, (kind, (channels, repeats)) in enumerate(zip(kinds, STAGES, strict=True), start=1):
        x = stage(x, number, kind, channels, repeats, width, momentum)
        fourth = x if number == 4 else fourth  # 14 x 14 x 512 at 224, as GoogLeNet's first end point
    # The auxiliary head comes last: the initial values of everything else are then the same with and without it.
    outputs = {"main": heads.main(x, head, num_classes, width)}
    if aux_weight:
        outputs["aux"] = heads.aux_inception_v3(fourth, num_classes, width, momentum, "aux")
    return outputs


def stage(x: Tensor, number: int, kind: str, channels: int, repeats: int, width: float, momentum: float) -> Tensor:
    """`repeats` blocks of one kind, then 2x2 max pooling: `[N, H, W, C]` to `[N, H // 2, W // 2, channels]`."""
    widths = blocks.proportional(channels).scaled(width)
    prefix = f"block{number}_conv" if kind in PLAIN_KINDS else f"Block_{number}_"
    for position in range(1, repeats + 1):
        x = BLOCK_KINDS[kind](x, widths, f"{prefix}{position}", momentum)
    return layers.MaxPooling2D((2, 2), name=f"block{number}_pool")(x)
