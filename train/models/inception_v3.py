"""Inception-v3."""

import keras

from train.models import heads
from train.models.blocks import image_input, normalize_symmetric
from train.models.keras_applications import clone_scaled
from train.models.weights import without_weights


def inception_v3(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: float,
    head: str,
    batch_norm_momentum: float,
    aux_weight: float,
) -> keras.Model:
    """Inception-v3 with an auxiliary classifier at `mixed7`.

    Source: Szegedy et al. 2015 (Rethinking the Inception Architecture for Computer Vision), table 1 and section 4;
    layers and names are those of keras.applications.

    Input: uint8 or float `[N, H, W, C]` in 0..255, H and W at least 75, C 1 or 3.
    Output: dict of float32 `[N, num_classes]` logits, `main` and (where `aux_weight` is not 0) `aux`.
    """
    with without_weights():
        template = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=input_shape)
    inputs = image_input(input_shape)
    layer_outputs = clone_scaled(template, normalize_symmetric(inputs), width, batch_norm_momentum)
    # The auxiliary head is built last, so that all other initial values are the same with and without it.
    outputs = {"main": heads.main_head(layer_outputs["mixed10"], head, num_classes, width)}  # from 8 x 8 x 2048
    if aux_weight:
        outputs["aux"] = heads.aux_inception_v3(layer_outputs["mixed7"], num_classes, width, batch_norm_momentum, "aux")
    return keras.Model(inputs, outputs, name="inception_v3")
