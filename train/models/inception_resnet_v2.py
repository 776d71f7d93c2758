"""Inception-ResNet-v2."""

import keras

from train.models import heads
from train.models.blocks import image_input, normalize_symmetric
from train.models.keras_applications import clone_scaled
from train.models.weights import without_weights


def inception_resnet_v2(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    head: str,
    batch_norm_momentum: float,
    aux_weight: float,
) -> keras.Model:
    """Inception-ResNet-v2 with an auxiliary classifier after its last 17 x 17 block.

    Source: Szegedy et al. 2016 (Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning),
    figure 15; layers and names are those of keras.applications.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 75, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux`.
    """
    with without_weights():
        template = keras.applications.InceptionResNetV2(include_top=False, weights=None, input_shape=input_shape)
    inputs = image_input(input_shape)
    layer_outputs = clone_scaled(template, normalize_symmetric(inputs), width, batch_norm_momentum)
    # The auxiliary head is built last, so that all other initial values are the same with and without it.
    outputs = {"main": heads.main_head(layer_outputs["conv_7b_ac"], head, num_classes, width)}  # from 8 x 8 x 1536
    if aux_weight:
        outputs["aux"] = heads.aux_inception_v3(
            layer_outputs["block17_20_ac"], num_classes, width, batch_norm_momentum, "aux"
        )
    return keras.Model(inputs, outputs, name="inception_resnet_v2")
