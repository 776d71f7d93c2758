"""Multiply-accumulates, parameters and activations, and block ablations."""

import keras
import pytest
from keras import layers

from train import models
from train.models import blocks
from train.models.ablations import BlockAblation, block_ablations
from train.models.cost import (
    BlockCost,
    block_costs,
    conv_macs,
    conv_parameters,
    layer_macs,
    sum_costs,
    total_cost,
)
from train.models.weights import without_weights

SLOW = pytest.mark.slow
NOTEBOOK_BLOCK = blocks.BranchWidths(256, 64, 96, 128, 16, 32)


@pytest.fixture(scope="module")
def published():
    """The networks at the size and width of the papers, built without weights."""
    built = {}

    def get(name, **options):
        if name not in built:
            with without_weights():
                side = models.NATIVE_SIZE[name]
                built[name] = models.build(name, (side, side, 3), 1000, **options)
        return built[name]

    return get


def block(kind, widths=NOTEBOOK_BLOCK, size=28, in_channels=192):
    with without_weights():
        inputs = keras.Input((size, size, in_channels))
        return keras.Model(inputs, models.BLOCK_KINDS[kind](inputs, widths, "Block_1", 0.9))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_5x5_with_and_without_bottleneck():
    assert conv_macs(28, 28, 192, 32, (5, 5)) == 120_422_400
    assert conv_macs(28, 28, 192, 16, (1, 1)) == 2_408_448
    assert conv_macs(28, 28, 16, 32, (5, 5)) == 10_035_200


@pytest.mark.parametrize("n", [1, 16, 64])
def test_parameters_of_a_reduction(n):
    assert conv_parameters(192, n, (1, 1)) == 192 * n + n
    assert conv_parameters(192, n, (3, 3)) == 9 * 192 * n + n
    assert conv_parameters(192, n, (3, 3), bias=False) == 9 * 192 * n


def test_costs_of_single_layers():
    with without_weights():
        x = inputs = keras.Input((28, 28, 192))
        convolution = layers.Conv2D(32, 5, padding="same")
        strided = layers.Conv2D(8, (1, 3), strides=2, groups=4)
        dense = layers.Dense(10)
        for layer in (convolution, layers.BatchNormalization(), strided, layers.Flatten(), dense):
            x = layer(x)
        model = keras.Model(inputs, x)
    assert layer_macs(convolution) == 120_422_400
    assert layer_macs(strided) == 14 * 13 * 8 * 3 * (32 // 4)
    assert layer_macs(dense) == 14 * 13 * 8 * 10
    assert convolution.count_params() == conv_parameters(192, 32, (5, 5))
    assert total_cost(model).macs == sum(map(layer_macs, (convolution, strided, dense)))


def test_unknown_layer_is_rejected():
    with without_weights():
        inputs = keras.Input((8, 8, 3))
        model = keras.Model(inputs, layers.Conv2DTranspose(3, 3, name="wider")(inputs))
    with pytest.raises(ValueError) as raised:
        block_costs(model)
    assert str(raised.value) == (
        "cannot count the multiply-accumulates of wider, a Conv2DTranspose; layers with weights must "
        "be Conv2D, Dense or BatchNormalization"
    )


def test_building_without_weights_leaves_no_state():
    with without_weights():
        dense = layers.Dense(3)
        dense(keras.Input((2,)))
    after = layers.Dense(3)
    after(keras.Input((2,)))
    assert after.kernel.numpy().shape == (2, 3)
    assert dense.kernel._value is None


# --- whole networks --------------------------------------------------------------------------------------------------

# Multiply-accumulates of the main output and of all, first and last blocks, number of blocks with branches
NETWORKS = [
    ("vgg16", 15_347_142_656, 15_352_006_656, ["block1", "block2", "block3", "block4", "block5", "head", "aux"], 0),
    ("vgg16_inception", 11_259_604_992, 11_264_468_992, ["block1", "block2", "Block_3_1", "Block_3_2"], 6),
    ("inception_v1", 1_582_671_872, 1_591_044_096, ["stem", "inception_3a", "inception_3b", "pool3"], 9),
    ("inception_v3", 5_713_216_096, 5_718_899_296, ["stem", "mixed0", "mixed1", "mixed2", "mixed3"], 11),
    pytest.param(
        "inception_resnet_v2", 13_155_794_016, 13_162_501_216, ["stem", "mixed_5b", "block35_1"], 43, marks=SLOW
    ),
]


@pytest.mark.parametrize(("name", "main", "everything", "first", "branching"), NETWORKS)
def test_costs_of_the_networks(name, main, everything, first, branching, published):
    model = published(name)
    network = models.inference_model(model)
    rows, all_rows = block_costs(network), block_costs(model)
    assert total_cost(network).macs == main
    assert total_cost(model).macs == everything
    assert total_cost(network).parameters == network.count_params()
    assert total_cost(model).parameters == model.count_params()
    assert [row.block for row in all_rows][: len(first)] == first
    assert rows == [row for row in all_rows if not row.block.startswith("aux")]
    assert {row.block for row in all_rows} - {row.block for row in rows} == set(model.output) - {"main"}
    assert rows[-1].block == "head" and rows[-1].output_shape == (1000,)
    assert all(row.macs > 0 for row in rows if row.parameters)
    assert len(block_ablations(network)) == branching
    assert block_ablations(model) == block_ablations(network)


def test_vgg16_with_its_top():
    """15.3 billion for the convolutions and 0.124 billion for the dense layers: the published network."""
    with without_weights():
        model = models.build("vgg16", (224, 224, 3), 1000, head="fc", aux_weight=0)
    rows = {row.block: row for row in block_costs(model)}
    assert rows["block1"] == BlockCost("block1", (112, 112, 64), 38_720, 1_936_392_192, 2 * 224 * 224 * 64)
    assert rows["head"] == BlockCost("head", (1000,), 123_642_856, 123_633_664, 4096 + 4096 + 1000)
    assert sum_costs(list(rows.values())) == BlockCost(
        "total", (1000,), 138_357_544, 15_470_264_320, 13_547_520 + 9_192
    )


def test_block_costs_match_between_rows_and_ablations(published):
    for name in ("vgg16_inception", "inception_v1", "inception_v3"):
        rows = {row.block: row for row in block_costs(published(name))}
        for item in block_ablations(published(name)):
            assert (item.macs, item.parameters) == (rows[item.block].macs, rows[item.block].parameters), item.block


# --- ablations -------------------------------------------------------------------------------------------------------

# Per position of the feature map, by hand: 192 channels; 64, 96-128, 16-32, 32; batch norm has three per filter.
ENDS = 192 * (64 + 32)
REDUCTIONS = 192 * (96 + 16)
NORMS = 3 * (64 + 128 + 32 + 32)
V1 = ENDS + REDUCTIONS + 9 * 96 * 128 + 25 * 16 * 32
V1_WIDE = ENDS + 9 * 192 * 128 + 25 * 192 * 32
TWO = ENDS + REDUCTIONS + 9 * 96 * 128 + 9 * 16 * 32 + 9 * 32 * 32
TWO_WIDE = ENDS + 9 * 192 * 128 + 9 * 192 * 32 + 9 * 32 * 32
ROWS = ENDS + REDUCTIONS + 3 * (96 * 128 + 128 * 128) + 5 * (16 * 32 + 32 * 32)
ROWS_WIDE = ENDS + 3 * (192 * 128 + 128 * 128) + 5 * (192 * 32 + 32 * 32)
SIDES = ENDS + REDUCTIONS + 3 * 96 * 128 + 5 * 16 * 32
SIDES_WIDE = ENDS + 3 * 192 * 128 + 5 * 192 * 32

# kind: unchanged, without reduction, without factorisation, without both; filters with batch norm of each
BY_HAND = {
    "inception_naive": ((V1_WIDE,) * 4, (256,) * 4),
    "inception_v1": ((V1, V1_WIDE, V1, V1_WIDE), (368, 256, 368, 256)),
    "inception_two_3x3": ((TWO, TWO_WIDE, V1, V1_WIDE), (400, 288, 368, 256)),
    "inception_v3": ((ROWS, ROWS_WIDE, V1, V1_WIDE), (528, 416, 368, 256)),
    "inception_expanded": ((SIDES, SIDES_WIDE, V1, V1_WIDE), (368, 256, 368, 256)),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_ablations_match_calculations_by_hand(kind):
    macs, filters = BY_HAND[kind]
    parameters = [weights + 3 * normalised for weights, normalised in zip(macs, filters, strict=True)]
    figures = [figure for pair in zip((28 * 28 * m for m in macs), parameters, strict=True) for figure in pair]
    assert block_ablations(block(kind)) == [BlockAblation("Block_1", *figures)]


def test_bottleneck_of_the_notes_is_found():
    """The 5x5 branch is the example of the notes: 12 million through 16 maps instead of 120 million."""
    (item,) = block_ablations(block("inception_v1"))
    five = conv_macs(28, 28, 192, 32, (5, 5)) - (2_408_448 + 10_035_200)
    three = (
        conv_macs(28, 28, 192, 128, (3, 3)) - conv_macs(28, 28, 192, 96, (1, 1)) - conv_macs(28, 28, 96, 128, (3, 3))
    )
    assert item.macs_without_reduction - item.macs == five + three


def test_3x3_reductions_are_not_bottlenecks():
    (item,) = block_ablations(block("inception_3x3_reduce"))
    assert item.macs == item.macs_without_reduction


def test_models_without_branches_have_no_ablations():
    for kind in ("conv", "conv_bn", "single_3x3"):
        assert block_ablations(block(kind)) == []


def test_ablations_of_inception_v3(published):
    """mixed4: 7x7 in two factors and in four; mixed9: sides; the first block: two 3x3 for a 5x5."""
    items = {item.block: item for item in block_ablations(published("inception_v3"))}
    sides = 17 * 17
    ends = 768 * (192 + 192)
    assert items["mixed4"].macs_without_factorisation == sides * (
        ends + 2 * 768 * 128 + 49 * 128 * 192 + 49 * 128 * 128 + 49 * 128 * 192
    )
    assert items["mixed0"].macs_without_factorisation == 35 * 35 * (
        192 * (64 + 48 + 64 + 32) + 25 * 48 * 64 + 25 * 64 * 96
    )
    assert items["mixed9"].macs_without_factorisation == 8 * 8 * (
        1280 * (320 + 384 + 448 + 192) + 9 * 384 * 768 + 9 * 448 * 384 + 9 * 384 * 768
    )
    assert items["mixed9"].macs_without_reduction == 8 * 8 * (
        1280 * (320 + 192) + 2 * 3 * 1280 * 384 + 9 * 1280 * 384 + 2 * 3 * 384 * 384
    )


@SLOW
def test_ablations_of_inception_resnet_v2(published):
    items = {item.block: item for item in block_ablations(published("inception_resnet_v2"))}
    kept = 1088 * 192 + 384 * 1088
    assert items["block17_7"].macs == 17 * 17 * (kept + 1088 * 128 + 7 * 128 * 160 + 7 * 160 * 192)
    assert items["block17_7"].macs_without_reduction == 17 * 17 * (kept + 7 * 1088 * 160 + 7 * 160 * 192)
    assert items["block17_7"].macs_without_factorisation == 17 * 17 * (kept + 1088 * 128 + 49 * 128 * 192)
    assert items["block17_7"].macs_without_both == 17 * 17 * (kept + 49 * 1088 * 192)
