"""VGG16, and the builder that it shares with its Inception variants."""

from collections.abc import Sequence

import keras
from keras import layers

from train.models import blocks, heads
from train.models.blocks import PLAIN_KINDS, BlockKind, BranchWidths, Tensor

# Simonyan & Zisserman 2014, table 1, configuration D: channels and number of convolutions of each stage.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    head: str,
    batch_norm_momentum: float,
    aux_weight: float,
) -> keras.Model:
    """VGG16 with an auxiliary classifier after its fourth stage.

    Source: Simonyan & Zisserman 2014 (Very Deep Convolutional Networks), table 1, configuration D; layer names as in
    keras.applications. The trunk has no batch normalisation; `batch_norm_momentum` is that of the auxiliary head.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 32, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux`.
    """
    inputs = blocks.image_input(input_shape)
    x = blocks.normalize_caffe(inputs)
    kinds = (("conv", glorot_conv_block),) * len(STAGES)
    outputs = build_stages(x, kinds, num_classes, width, head, batch_norm_momentum, aux_weight)
    return keras.Model(inputs, outputs, name="vgg16")


def glorot_conv_block(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Builds the kind `conv` for images of about -124..151, with the initial values of keras.applications.

    Glorot's smaller kernels scale such a signal down to about 1 over the thirteen layers; with He's the network
    diverges at a learning rate of 0.01.
    """
    del momentum  # no normalisation
    return blocks.conv_relu(x, widths.total, name, initializer="glorot_uniform")


def build_stages(
    x: Tensor,
    kinds: Sequence[tuple[str, BlockKind]],
    num_classes: int,
    width: float,
    head: str,
    momentum: float,
    aux_weight: float,
) -> dict[str, Tensor]:
    """Returns the logits of a VGG16 whose stages consist of the given block kinds, on normalised images."""
    stage_outputs: list[Tensor] = []
    for number, ((kind, block), (channels, repeats)) in enumerate(zip(kinds, STAGES, strict=True), start=1):
        prefix = f"block{number}_conv" if kind in PLAIN_KINDS else f"Block_{number}_"
        for position in range(1, repeats + 1):
            x = block(x, blocks.proportional_widths(channels).scaled(width), f"{prefix}{position}", momentum)
        x = layers.MaxPooling2D((2, 2), name=f"block{number}_pool")(x)
        stage_outputs.append(x)
    # The auxiliary head is built last, so that all other initial values are the same with and without it.
    outputs = {"main": heads.main_head(x, head, num_classes, width)}
    if aux_weight:
        stage_4 = stage_outputs[3]  # 14 x 14 x 512 at 224, as at GoogLeNet's first auxiliary head
        outputs["aux"] = heads.aux_inception_v3(stage_4, num_classes, width, momentum, "aux")
    return outputs
