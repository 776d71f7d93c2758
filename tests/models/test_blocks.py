"""Blocks: kinds, widths and costs, normalisation, and the pooling of the auxiliary heads."""

import keras
import numpy as np
import pytest

from support.networks import layer_names, make_network
from train import models
from train.models import blocks, heads
from train.models.cost import total_cost
from train.models.weights import without_weights

NOTEBOOK_BLOCK = blocks.BranchWidths(256, 64, 96, 128, 16, 32)


# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inception_v1", "inception_v3"])
def test_notebook_block_has_the_published_parameters(kind):
    with without_weights():
        inputs = keras.Input((224, 224, 1))
        model = keras.Model(inputs, models.BLOCK_KINDS[kind](inputs, NOTEBOOK_BLOCK, "Block_1", 0.9))
    assert model.output.shape == (None, 224, 224, 256)
    assert model.get_layer("Block_1_Branch_1_conv").count_params() == 96
    assert model.get_layer("Block_1_Branch_1_bn").count_params() == 288
    assert model.get_layer("Block_1_Branch_2_conv").count_params() == 16


def test_proportional_widths_match_the_notebook():
    assert blocks.proportional_widths(256) == NOTEBOOK_BLOCK
    assert blocks.proportional_widths(512) == blocks.BranchWidths(512, 128, 192, 256, 32, 64)


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vgg16", keras.applications.vgg16),
        ("inception_v3", keras.applications.inception_v3),
        ("inception_resnet_v2", keras.applications.inception_resnet_v2),
    ],
)
def test_normalization_matches_keras_applications(name, theirs, pixels):
    images = pixels(name, 3)
    inputs = blocks.image_input(images.shape[1:])
    normalize = blocks.normalize_caffe if name == "vgg16" else blocks.normalize_symmetric
    ours = keras.Model(inputs, normalize(inputs))(images)
    np.testing.assert_allclose(ours, theirs.preprocess_input(images.astype("float32")), rtol=1e-6, atol=1e-5)


def test_normalization_of_one_channel_matches_a_grey_image():
    grey = np.full((1, 32, 32, 1), 200, np.uint8)
    inputs = blocks.image_input((32, 32, 1))
    ours = keras.Model(inputs, blocks.normalize_caffe(inputs))(grey)
    np.testing.assert_allclose(ours, 200 - (0.299 * 123.68 + 0.587 * 116.779 + 0.114 * 103.939), rtol=1e-5)


# --- block kinds -----------------------------------------------------------------------------------------------------


def stage_of(kind, channels=256, in_channels=128, size=16, widths=None):
    with without_weights():
        inputs = keras.Input((size, size, in_channels))
        outputs = models.BLOCK_KINDS[kind](inputs, widths or blocks.proportional_widths(channels), "Block_3_1", 0.9)
        return keras.Model(inputs, outputs)


@pytest.mark.parametrize("kind", models.BLOCK_KINDS)
def test_every_block_kind_fits_every_stage(kind):
    with without_weights():
        model = make_network("vgg16_inception", width=0.25, blocks=[kind] * 5)
        assert layer_names(model) == layer_names(make_network("vgg16_inception", width=0.25, blocks=[kind] * 5))
    assert model.output["main"].shape == (None, 5)
    stage_5 = model.get_layer("block5_pool").output.shape
    assert stage_5[1:3] == (1, 1)
    if not kind.startswith("single"):
        assert stage_5[3] == 128


@pytest.mark.parametrize("kind", ["single_1x1", "single_3x3", "single_5x5"])
@pytest.mark.parametrize(("channels", "in_channels"), [(256, 128), (512, 512), (512, 256)])
def test_single_kinds_cost_as_much_as_inception_v1(kind, channels, in_channels):
    ours, theirs = (total_cost(stage_of(k, channels, in_channels)).macs for k in (kind, "inception_v1"))
    assert ours == pytest.approx(theirs, rel=0.02)


# Multiply-accumulates for each position of the map, 128 to 256 channels: by hand.
MACS = {
    "conv": 9 * 128 * 256,
    "conv_bn": 9 * 128 * 256,
    "inception_naive": 128 * (64 + 32) + 9 * 128 * 128 + 25 * 128 * 32,
    "inception_v1": 128 * (64 + 96 + 16 + 32) + 9 * 96 * 128 + 25 * 16 * 32,
    "inception_two_3x3": 128 * (64 + 96 + 16 + 32) + 9 * 96 * 128 + 9 * 16 * 32 + 9 * 32 * 32,
    "inception_v3": 128 * (64 + 96 + 16 + 32) + 3 * (96 * 128 + 128 * 128) + 5 * (16 * 32 + 32 * 32),
    "inception_expanded": 128 * (64 + 96 + 16 + 32) + 3 * 96 * 128 + 5 * 16 * 32,
    "inception_3x3_reduce": 128 * (64 + 32) + 9 * 128 * (96 + 16) + 9 * 96 * 128 + 25 * 16 * 32,
}


@pytest.mark.parametrize("kind", MACS)
def test_multiply_accumulates_match_calculations_by_hand(kind):
    model = stage_of(kind)
    assert model.output.shape == (None, 16, 16, 256)
    assert total_cost(model).macs == 16 * 16 * MACS[kind]


def test_factorised_branches_have_these_layer_names():
    names = layer_names(stage_of("inception_v3"))
    for name in ("Block_3_1_Branch_0_conv", "Block_3_1_Branch_1_1_bn", "Block_3_1_Branch_2_2_conv"):
        assert name in names
    assert "Block_3_1_Branch_3_pool" in names and names[-1] == "Block_3_1_Concatenated"
    kernels = {name: stage_of("inception_v3").get_layer(name).kernel_size for name in names if name.endswith("_2_conv")}
    assert kernels["Block_3_1_Branch_1_2_conv"] == (3, 1) and kernels["Block_3_1_Branch_2_2_conv"] == (5, 1)


def test_last_branch_takes_the_remainder():
    widths = blocks.proportional_widths(256).scaled(0.3)  # 76.8: 77 = 19 + 38 + 10 + 10, where 9.6 would round to 10
    model = stage_of("inception_v1", widths=blocks.BranchWidths(78, *list(vars(widths).values())[1:]))
    assert model.get_layer("Block_3_1_Branch_3_conv").filters == 78 - 19 - 38 - 10
    assert model.output.shape[-1] == 78


def test_default_blocks_match_the_notebook():
    with without_weights():
        names = layer_names(make_network("vgg16_inception"))
    for name in [
        "block1_conv1_conv",
        "block1_conv1_bn",
        "block1_conv1_act",
        "Block_3_1_Branch_0_conv",
        "Block_3_3_Branch_1_1_bn",
        "block4_conv3_conv",
        "Block_5_2_Branch_2_2_conv",
        "block5_pool",
        "predictions",
        "aux_predictions",
    ]:
        assert name in names


# --- auxiliary heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "to", "window", "stride"),
    [(14, 4, 5, 3), (17, 5, 5, 3), (3, 5, 1, 1), (2, 4, 1, 1), (8, 5, 4, 1), (28, 4, 7, 7)],
)
def test_auxiliary_pooling_matches_the_paper_at_its_image_size(size, to, window, stride):
    model = keras.Model(inputs := keras.Input((size, size, 2)), heads.adaptive_average_pool(inputs, to, "pool"))
    pool = model.get_layer("pool")
    assert (pool.pool_size, pool.strides) == ((window, window), (stride, stride))
    assert model.output.shape == (None, min(size, to), min(size, to), 2)
    assert (min(size, to) - 1) * stride + window == size  # every position is seen
