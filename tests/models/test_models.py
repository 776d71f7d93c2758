"""The networks: published numbers, names, inputs and outputs, options, weights."""

import math
import pickle
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from train import models
from train.models import blocks, heads
from train.models import weights as weights_files
from train.models.cost import total_cost
from train.models.keras_applications import canonical_names
from train.models.weights import without_weights

NAMES = tuple(models.BUILDERS)
SLOW = pytest.mark.slow
# Inception-ResNet-v2 has 780 layers: what does not need it shows it in the longer suite only.
LIGHT = [pytest.param(name, marks=SLOW) if name == "inception_resnet_v2" else name for name in NAMES]
AUX = {name: ("aux_1", "aux_2") if name == "inception_v1" else ("aux",) for name in NAMES}
NARROW = 0.06
NOTEBOOK_BLOCK = blocks.BranchWidths(256, 64, 96, 128, 16, 32)


def side(name):
    return models.MIN_IMAGE_SIZE[name]


def make(name, channels=1, num_classes=5, weights=None, **options):
    model = models.build(name, (side(name), side(name), channels), num_classes, **{"width": NARROW} | options)
    if weights is not None:
        models.load_weights(model, weights)
    return model


def names_of(model):
    return [layer.name for layer in model.layers]


def trunk(model):
    return {layer.name: layer for layer in model.layers if not layer.name.startswith("aux")}


def count(variables):
    return sum(math.prod(variable.shape) for variable in variables)


@pytest.fixture(scope="module")
def small():
    """Each network, narrow, at its smallest size, with values; built when first asked for."""
    built = {}

    def get(name):
        if name not in built:
            keras.utils.set_random_seed(1)
            built[name] = make(name)
        return built[name]

    return get


@pytest.fixture(scope="module")
def pixels():
    def get(name, channels=1, examples=2):
        shape = (examples, side(name), side(name), channels)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    return get


# --- published numbers -----------------------------------------------------------------------------------------------

# name, input, options, layers without `normalize`, parameters, parameters that are not trained
PUBLISHED = [
    ("vgg16", (224, 224, 3), {"head": "fc"}, 23, 138_357_544, 0),
    ("vgg16_inception", (224, 224, 1), {"head": "fc"}, None, 132_084_920, 12_384),
    ("inception_v1", (224, 224, 3), {"batch_norm": False}, None, 6_998_552, 0),
    ("inception_v1", (224, 224, 3), {"batch_norm": False, "aux_weight": 0.3}, None, 13_378_280, 0),
    ("inception_v3", (299, 299, 3), {}, 313, 23_851_784, 34_432),
    ("inception_resnet_v2", (299, 299, 3), {}, 782, 55_873_736, 60_544),
]


def first_names(name):
    """The names that keras.applications gives in a fresh process."""
    keras.utils.clear_session()  # counting starts over, as in a fresh process
    application = {"inception_v3": "InceptionV3", "inception_resnet_v2": "InceptionResNetV2"}[name]
    with without_weights():
        return names_of(getattr(keras.applications, application)(weights=None))


@pytest.mark.parametrize(("name", "shape", "options", "layers", "parameters", "fixed"), PUBLISHED)
def test_published_numbers(name, shape, options, layers, parameters, fixed):
    with without_weights():
        model = models.build(name, shape, 1000, **{"aux_weight": 0} | options)
    assert model.count_params() == parameters
    assert count(model.non_trainable_weights) == fixed
    if layers:
        assert len(model.layers) - 1 == layers
    if name in (
        "inception_v3",
        "inception_resnet_v2",
    ):  # names and their order, those of a first build in a fresh process
        assert names_of(model)[2:] == first_names(name)[1:]


def test_notebook_network_without_its_classifier():
    with without_weights():
        model = models.build("vgg16_inception", (224, 224, 1), 1000, head="max", aux_weight=0)
    assert model.count_params() - model.get_layer("predictions").count_params() == 8_442_064


@pytest.mark.parametrize("kind", ["inception_v1", "inception_v3"])
def test_notebook_block(kind):
    with without_weights():
        inputs = keras.Input((224, 224, 1))
        model = keras.Model(inputs, models.BLOCK_KINDS[kind](inputs, NOTEBOOK_BLOCK, "Block_1", 0.9))
    assert model.output.shape == (None, 224, 224, 256)
    assert model.get_layer("Block_1_Branch_1_conv").count_params() == 96
    assert model.get_layer("Block_1_Branch_1_bn").count_params() == 288
    assert model.get_layer("Block_1_Branch_2_conv").count_params() == 16


def test_proportions_are_the_notebooks():
    assert blocks.proportional_widths(256) == NOTEBOOK_BLOCK
    assert blocks.proportional_widths(512) == blocks.BranchWidths(512, 128, 192, 256, 32, 64)


# --- every network ---------------------------------------------------------------------------------------------------


def test_tables_name_the_same_networks():
    assert NAMES == ("vgg16", "vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")
    assert tuple(models.MIN_IMAGE_SIZE) == tuple(models.NATIVE_SIZE) == NAMES
    assert list(models.MIN_IMAGE_SIZE.values()) == [32, 32, 32, 75, 75]
    assert list(models.NATIVE_SIZE.values()) == [224, 224, 224, 299, 299]
    assert all(builder.__name__ == name for name, builder in models.BUILDERS.items())


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs(name, small, pixels):
    model = small(name)
    assert model.name == name
    assert tuple(model.output) == ("main", *AUX[name])
    assert names_of(model)[1] == "normalize"
    assert len(set(names_of(model))) == len(model.layers)
    images = pixels(name)
    outputs = model(images)
    for key, logits in outputs.items():
        assert logits.shape == (2, 5) and logits.dtype == "float32" and np.isfinite(logits).all(), key
    for key, logits in model(images.astype("float32")).items():
        np.testing.assert_array_equal(logits, outputs[key])
    assert np.abs(outputs["main"][0] - outputs["main"][1]).max() > 0  # different images, different answers


@pytest.mark.parametrize("name", NAMES)
def test_fractions_of_pixel_values_count(name, small, pixels):
    images = pixels(name).astype("float32")
    assert np.abs(small(name)(images)["main"] - small(name)(np.minimum(images + 0.5, 255))["main"]).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_inference_model(name, small, pixels):
    model, network = small(name), models.inference_model(small(name))
    assert not [layer for layer in names_of(network) if layer.startswith("aux")]
    assert [id(weight) for weight in network.weights] == [
        id(weight) for layer in trunk(model).values() for weight in layer.weights
    ]
    np.testing.assert_array_equal(network(pixels(name)), model(pixels(name))["main"])


@pytest.mark.parametrize("name", LIGHT)
def test_second_build_and_no_auxiliary_head(name, small):
    with without_weights():
        again, without = make(name), make(name, aux_weight=0)
    assert sorted(names_of(again)) == sorted(names_of(small(name)))
    assert set(names_of(without)) == set(trunk(small(name)))
    assert tuple(without.output) == ("main",)
    for layer in without.layers:
        assert [w.shape for w in layer.weights] == [w.shape for w in trunk(small(name))[layer.name].weights]


@pytest.mark.parametrize("name", LIGHT)
def test_same_seed_gives_the_same_trunk_without_auxiliary_head(name, small):
    keras.utils.set_random_seed(1)
    for layer in make(name, aux_weight=0).layers:
        for one, other in zip(layer.get_weights(), trunk(small(name))[layer.name].get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_auxiliary_heads_teach_the_trunk(name, small, pixels):
    model, labels = small(name), np.array([0, 1, 2, 3])
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).kernel
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for key in AUX[name]:
        kernels = [layer.kernel for layer in model.layers if layer.name.startswith(key) and hasattr(layer, "kernel")]
        with tf.GradientTape(persistent=True) as tape:
            outputs = model(pixels(name, examples=4), training=True)
            auxiliary = 0.3 * cross_entropy(labels, outputs[key])
            loss = cross_entropy(labels, outputs["main"]) + auxiliary
        heads_gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
        assert len(kernels) == 3
        assert all(np.abs(gradient).max() > 0 for gradient in heads_gradients)
        assert np.abs(tape.gradient(auxiliary, first.value)).max() > 0


@pytest.mark.parametrize("name", LIGHT)
def test_scaled_widths(name):
    with without_weights():
        least, narrow, full = make(name, width=0.001), make(name, width=0.37), make(name, width=1.0)
    assert names_of(least) == names_of(narrow) == names_of(full)
    assert {tensor.shape for tensor in least.output.values()} == {(None, 5)}
    for layer, original in zip(narrow.layers, full.layers, strict=True):
        # Where the last branch only pools, nothing can take the remainder.
        pools = layer.name in ("mixed3", "mixed8", "mixed_6a", "mixed_7a")
        if isinstance(layer, keras.layers.Concatenate) and not pools:
            assert layer.output.shape[-1] == blocks.scale_channels(original.output.shape[-1], 0.37), layer.name


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("head", models.HEADS)
def test_heads(name, head):
    with without_weights():
        model = make(name, head=head, width=0.5)
    assert model.get_layer("predictions").output.shape == (None, 5)
    if head == "fc":
        assert [model.get_layer(layer).units for layer in ("fc1", "fc2")] == [2048, 2048]
    else:
        assert model.get_layer(f"{head}_pool").output.shape[1:] == model.get_layer("predictions").input.shape[1:]


@pytest.mark.parametrize("name", LIGHT)
def test_batch_norm_momentum(name):
    with without_weights():
        model = make(name, batch_norm_momentum=0.7)
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert layers and {layer.momentum for layer in layers} == {0.7}


@pytest.mark.parametrize("name", LIGHT)
def test_mixed_precision_keeps_ends_in_float32(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with without_weights():
            model = make(name)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {tensor.dtype for tensor in model.output.values()} == {"float32"}
    assert model.get_layer("normalize").output.dtype == "float32"
    assert next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).output.dtype == "bfloat16"


LOADING = """
import sys, keras, numpy as np
for name in sys.argv[1:]:
    network = keras.models.load_model(f"{name}.keras")
    np.save(f"{name} output.npy", network.predict(np.load(f"{name} pixels.npy"), verbose=0))
assert not [name for name in sys.modules if name.split(".")[0] == "train"]
"""


# Three channels: the input of vgg16 is then turned to blue, green, red, which takes more than one layer.
@pytest.mark.slow
def test_saved_networks_load_without_this_package(pixels, tmp_path):
    ours = {}
    for name in NAMES:
        network = models.inference_model(make(name, channels=3))
        network.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name} pixels.npy", images := pixels(name, 3))
        ours[name] = network.predict(images, verbose=0)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", LOADING, *NAMES], cwd=tmp_path, check=True, env=bare)
    for name, output in ours.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name} output.npy"), output, err_msg=name)


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vgg16", keras.applications.vgg16),
        ("inception_v3", keras.applications.inception_v3),
        ("inception_resnet_v2", keras.applications.inception_resnet_v2),
    ],
)
def test_normalize_is_the_familys(name, theirs, pixels):
    images = pixels(name, 3)
    inputs = blocks.image_input(images.shape[1:])
    normalize = blocks.normalize_caffe if name == "vgg16" else blocks.normalize_symmetric
    ours = keras.Model(inputs, normalize(inputs))(images)
    np.testing.assert_allclose(ours, theirs.preprocess_input(images.astype("float32")), rtol=1e-6, atol=1e-5)


def test_normalize_of_one_channel_matches_a_grey_picture():
    grey = np.full((1, 32, 32, 1), 200, np.uint8)
    inputs = blocks.image_input((32, 32, 1))
    ours = keras.Model(inputs, blocks.normalize_caffe(inputs))(grey)
    np.testing.assert_allclose(ours, 200 - (0.299 * 123.68 + 0.587 * 116.779 + 0.114 * 103.939), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_normalizes_as_its_weights_expect(name: str, small):
    """Golden numbers: a grey of 20."""
    image = np.full((1, side(name), side(name), 1), 20, "float32")
    wanted = -97.378639 if name == "vgg16" else -0.843137
    np.testing.assert_allclose(small(name).layers[1](image), np.full_like(image, wanted), atol=1e-5)


def test_vgg_normalizes_colours_as_its_weights_expect():
    """Golden numbers of red 10, green 20, blue 30; blue comes first."""
    with models.weights.without_weights():
        network = models.build("vgg16", (32, 32, 3), 10, width=0.05)
    images = np.broadcast_to(np.array([10, 20, 30], "float32"), (1, 32, 32, 3))
    np.testing.assert_allclose(network.layers[1](images)[0, 5, 7], [-73.939, -96.779, -113.68], atol=1e-5)


# --- block kinds -----------------------------------------------------------------------------------------------------


def stage_of(kind, channels=256, in_channels=128, size=16, widths=None):
    with without_weights():
        inputs = keras.Input((size, size, in_channels))
        outputs = models.BLOCK_KINDS[kind](inputs, widths or blocks.proportional_widths(channels), "Block_3_1", 0.9)
        return keras.Model(inputs, outputs)


@pytest.mark.parametrize("kind", models.BLOCK_KINDS)
def test_kind_in_each_stage(kind):
    with without_weights():
        model = make("vgg16_inception", width=0.25, blocks=[kind] * 5)
        assert names_of(model) == names_of(make("vgg16_inception", width=0.25, blocks=[kind] * 5))
    assert model.output["main"].shape == (None, 5)
    stage_5 = model.get_layer("block5_pool").output.shape
    assert stage_5[1:3] == (1, 1)
    if not kind.startswith("single"):
        assert stage_5[3] == 128


@pytest.mark.parametrize("kind", ["single_1x1", "single_3x3", "single_5x5"])
@pytest.mark.parametrize(("channels", "in_channels"), [(256, 128), (512, 512), (512, 256)])
def test_single_kinds_cost_what_inception_v1_costs(kind, channels, in_channels):
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
def test_multiply_accumulates_of_kinds(kind):
    model = stage_of(kind)
    assert model.output.shape == (None, 16, 16, 256)
    assert total_cost(model).macs == 16 * 16 * MACS[kind]


def test_names_of_factorised_branches():
    names = names_of(stage_of("inception_v3"))
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


def test_default_blocks_are_the_notebooks():
    with without_weights():
        names = names_of(make("vgg16_inception"))
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
def test_pooling_is_the_papers_at_the_papers_size(size, to, window, stride):
    model = keras.Model(inputs := keras.Input((size, size, 2)), heads.adaptive_average_pool(inputs, to, "pool"))
    pool = model.get_layer("pool")
    assert (pool.pool_size, pool.strides) == ((window, window), (stride, stride))
    assert model.output.shape == (None, min(size, to), min(size, to), 2)
    assert (min(size, to) - 1) * stride + window == size  # every position is seen


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    (
        ("resnet", (32, 32, 3), 10, {}),
        "model must be one of vgg16, vgg16_inception, inception_v1, inception_v3, inception_resnet_v2, got 'resnet'; "
        "use model=vgg16",
    ),
    (
        ("inception_v3", (32, 32, 3), 10, {}),
        "data.image_size must be at least 75 for inception_v3, got 32; use data.image_size=75",
    ),
    (
        ("vgg16", (32, 31, 3), 10, {}),
        "data.image_size must be at least 32 for vgg16, got 31; use data.image_size=32",
    ),
    (("vgg16", (32, 32, 2), 10, {}), "data.channels must be 1 or 3, got 2; use data.channels=3"),
    (("vgg16", (32, 32), 10, {}), "input_shape must be (height, width, channels), got (32, 32); use (32, 32, 3)"),
    (("vgg16", (32, 32, 3), 1, {}), "num_classes must be a whole number of at least 2, got 1; use 2 or more"),
    (
        ("vgg16", (32, 32, 3), 10, {"blocks": ["conv"] * 5}),
        "model.blocks must be an option of vgg16, got one that it does not have; "
        "use width, head, batch_norm_momentum, aux_weight",
    ),
    (
        ("inception_v3", (75, 75, 3), 10, {"batch_norm": False}),
        "model.batch_norm must be an option of inception_v3, got one that it does not have; "
        "use width, head, batch_norm_momentum, aux_weight",
    ),
    (
        ("vgg16", (32, 32, 3), 10, {"aux_weight": -0.1}),
        "model.aux_weight must be at least 0, got -0.1; use model.aux_weight=0 for no auxiliary head",
    ),
    (("vgg16", (32, 32, 3), 10, {"width": 0}), "model.width must be a number above 0, got 0; use model.width=1.0"),
    (
        ("vgg16", (32, 32, 3), 10, {"width": math.nan}),
        "model.width must be a number above 0, got nan; use model.width=1.0",
    ),
    (
        ("vgg16", (32, 32, 3), 10, {"head": "mean"}),
        "model.head must be one of fc, avg, max, got 'mean'; use model.head=fc",
    ),
    (
        ("vgg16", (32, 32, 3), 10, {"batch_norm_momentum": 1.0}),
        "model.batch_norm_momentum must be at least 0 and below 1, got 1.0; use model.batch_norm_momentum=0.9",
    ),
    (
        ("vgg16_inception", (32, 32, 3), 10, {"blocks": ["conv", "conv"]}),
        "model.blocks must be 5 kinds of block, got ['conv', 'conv']; use one of conv, conv_bn, inception_naive, "
        "inception_v1, inception_two_3x3, inception_v3, inception_expanded, inception_3x3_reduce, single_1x1, "
        "single_3x3, single_5x5 for each stage",
    ),
    (
        ("vgg16_inception", (32, 32, 3), 10, {"blocks": ["conv"] * 4 + ["dense"]}),
        "model.blocks must be made of conv, conv_bn, inception_naive, inception_v1, inception_two_3x3, inception_v3, "
        "inception_expanded, inception_3x3_reduce, single_1x1, single_3x3, single_5x5, got 'dense'; use one of these",
    ),
    (
        ("inception_v1", (32, 32, 3), 10, {"batch_norm": 1}),
        "model.batch_norm must be true or false, got 1; use model.batch_norm=true",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message):
    name, shape, num_classes, options = arguments
    with pytest.raises(ValueError) as raised:
        models.build(name, shape, num_classes, **options)
    assert str(raised.value) == message


def test_options_of():
    common = ("width", "head", "batch_norm_momentum", "aux_weight")
    assert models.option_names("vgg16") == common
    assert models.option_names("vgg16_inception") == (*common, "blocks")
    assert models.option_names("inception_v1") == (*common, "batch_norm")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "application"),
    [
        ("vgg16", "VGG16"),
        ("inception_v3", "InceptionV3"),
        pytest.param("inception_resnet_v2", "InceptionResNetV2", marks=SLOW),
    ],
)
def test_copied_weights_give_equal_outputs(name, application, pixels):
    theirs = getattr(keras.applications, application)(
        weights=None, include_top=False, pooling="avg", input_shape=(side(name), side(name), 3)
    )
    ours = models.inference_model(make(name, channels=3, width=1.0, aux_weight=0))
    names = canonical_names(theirs)
    for layer in theirs.layers:
        if layer.weights:
            ours.get_layer(names[layer.name]).set_weights(layer.get_weights())
    features = keras.Model(ours.input, ours.get_layer("avg_pool").output)
    preprocess = getattr(keras.applications, name).preprocess_input
    np.testing.assert_allclose(
        features(pixels(name, 3)), theirs(preprocess(pixels(name, 3).astype("float32"))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras", ".h5"])
def test_weights_of_each_format(suffix, small, tmp_path):
    source = models.inference_model(small("inception_v1"))
    path = tmp_path / f"stored{suffix}"
    (source.save_weights if suffix == ".weights.h5" else source.save)(path)
    target = make("inception_v1", num_classes=7)
    fresh = target.get_layer("predictions").get_weights()
    report = weights_files.load(target, path)
    assert report.newly_initialized == [
        *(name for name in names_of(target) if name == "predictions" or _is_weighted_aux(target, name))
    ]
    assert report.unused == []
    assert len(report.loaded) == len([layer for layer in source.layers if layer.weights]) - 1
    for name in report.loaded:
        for one, other in zip(target.get_layer(name).get_weights(), source.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(fresh[0], target.get_layer("predictions").get_weights()[0])


def _is_weighted_aux(model, name):
    return name.startswith("aux") and bool(model.get_layer(name).weights)


def test_whole_training_model_fits_itself(small, tmp_path):
    small("inception_v1").save_weights(tmp_path / "all.weights.h5")
    target = make("inception_v1", weights=tmp_path / "all.weights.h5")
    for one, other in zip(target.get_weights(), small("inception_v1").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_heads_that_only_the_file_has_are_reported(tmp_path):
    make("vgg16", head="fc", width=0.01).save_weights(tmp_path / "top.weights.h5")
    target = make("vgg16", width=0.01, aux_weight=0)
    report = weights_files.load(target, tmp_path / "top.weights.h5")
    assert report.newly_initialized == ["predictions"]  # 41 features instead of 5
    assert {"fc1", "fc2", "aux_predictions"} <= set(report.unused)
    said = report.summary()
    assert said.startswith("weights: 13 layers loaded, block1_conv1 to block5_conv3; new: predictions; of the file not")
    assert "fc1, fc2" in said


@pytest.mark.parametrize(
    ("name", "first"), [("vgg16", "block1_conv1"), pytest.param("inception_v3", "conv2d", marks=pytest.mark.slow)]
)
def test_weights_of_colour_images_see_a_grey_one_as_one_of_equal_colours(name, first, pixels, tmp_path):
    make(name, channels=3, aux_weight=0).save_weights(path := tmp_path / "colour.weights.h5")
    grey = make(name, channels=1, aux_weight=0)
    report = weights_files.load(grey, path)
    assert report.adapted == [first]
    assert f"{first} summed over its three colours" in report.summary()
    colour = make(name, channels=3, aux_weight=0, weights=path)
    kernel = colour.get_layer(first).get_weights()[0]
    np.testing.assert_allclose(grey.get_layer(first).get_weights()[0], kernel.sum(axis=2, keepdims=True))
    if name != "vgg16":  # which takes the mean colour of ImageNet off, that is not grey
        images = pixels(name, 1)
        np.testing.assert_allclose(
            grey(images)["main"], colour(np.repeat(images, 3, axis=-1))["main"], rtol=1e-4, atol=1e-5
        )


def write_old_format(path, layers):
    """A file as Keras 2 wrote it: `layers` are (name, values)."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name, _ in layers]
        for name, values in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{position}:0".encode() for position in range(len(values))]
            for position, value in enumerate(values):
                group[f"{name}/{position}:0"] = value


def test_counted_names_that_start_elsewhere_go_by_order(small, tmp_path):
    source = models.inference_model(small("inception_v3"))
    count_up = {"conv2d": 7, "batch_normalization": 7}

    def shifted(name):
        stem, _, number = name.rpartition("_") if name[-1].isdigit() and name != "conv2d" else (name, "", "0")
        return f"{stem}_{int(number) + count_up[stem]}" if stem in count_up else name

    kept = [layer for layer in source.layers if layer.name != "predictions"]  # a file without top
    write_old_format(tmp_path / "old.h5", [(shifted(layer.name), layer.get_weights()) for layer in kept])
    with h5py.File(tmp_path / "old.h5") as file:
        assert "conv2d_7" in file and "conv2d" not in file
    target = make("inception_v3", aux_weight=0)
    assert weights_files.load(target, tmp_path / "old.h5").newly_initialized == ["predictions"]
    for layer in kept:
        for one, other in zip(layer.get_weights(), target.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_published_vgg16_file_loads(pixels, tmp_path):
    theirs = keras.applications.VGG16(weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    write_old_format(tmp_path / "notop.h5", [(layer.name, layer.get_weights()) for layer in theirs.layers])
    ours = make("vgg16", channels=3, width=1.0, aux_weight=0, weights=str(tmp_path / "notop.h5"))
    features = keras.Model(ours.input, ours.get_layer("avg_pool").output)
    images = pixels("vgg16", 3)
    expected = theirs(keras.applications.vgg16.preprocess_input(images.astype("float32")))
    np.testing.assert_allclose(features(images), expected, rtol=1e-4, atol=1e-5)


def test_public_weights_say_what_to_do_where_there_is_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path))  # nothing was fetched
    with pytest.raises(
        ValueError, match=r"model.weights=imagenet must be fetched, got URL fetch failure .*vgg16"
    ) as said:
        weights_files.imagenet_weights("vgg16")
    assert "use model.weights=PATH" in str(said.value)
    with pytest.raises(ValueError, match=r"must go with vgg16, inception_v3, inception_resnet_v2, got inception_v1"):
        weights_files.imagenet_weights("inception_v1")


def test_public_weights_fill_the_trunk(monkeypatch):
    theirs = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    monkeypatch.setattr(keras.applications, "VGG16", lambda **_: theirs)  # what would be fetched
    ours = make("vgg16", channels=3, width=1.0, aux_weight=0)
    report = models.load_weights(ours, "imagenet")
    assert report.summary() == "weights: 13 layers loaded, block1_conv1 to block5_conv3; new: predictions"
    for layer in theirs.layers:
        for one, other in zip(
            layer.get_weights(), ours.get_layer(layer.name).get_weights() if layer.weights else (), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def failure(**arguments):
    with pytest.raises(ValueError) as raised:
        make("vgg16", **{"aux_weight": 0} | arguments)
    return str(raised.value)


def test_weights_that_do_not_fit(tmp_path):
    make("vgg16", aux_weight=0).save_weights(path := tmp_path / "grey.weights.h5")
    assert failure(weights=path, channels=3) == (
        f"model.weights must fit the model, got {path} with 1 differences: block1_conv1: [(3, 3, 1, 4), (4,)] in the "
        "file, model has [(3, 3, 3, 4), (4,)]; use a file of the same architecture, width and number of channels"
    )
    make("vgg16", channels=3, aux_weight=0).save_weights(path := tmp_path / "colour.weights.h5")
    message = failure(weights=path, width=0.1, channels=3)
    assert "with 13 differences: block1_conv1: [(3, 3, 3, 4), (4,)] in the file" in message
    make("vgg16_inception", channels=3, aux_weight=0).save_weights(path := tmp_path / "other.weights.h5")
    message = failure(weights=path, channels=3)
    assert "_bn: not in the model; ...; use a file of the same architecture" in message


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    make("vgg16", aux_weight=0).save_weights(path := tmp_path / "grey.weights.h5")
    model = make("vgg16", channels=3, aux_weight=0)
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(ValueError, match="must fit the model"):
        weights_files.load(model, path)
    assert all((one == other.numpy()).all() for one, other in zip(before, model.weights, strict=True))


def test_files_that_only_look_like_weights(tmp_path):
    """A pickle, a file that was cut off, and arrays that lie elsewhere or would fill the memory."""
    make("vgg16", aux_weight=0).save_weights(whole := tmp_path / "whole.weights.h5")
    (tmp_path / "pickle.h5").write_bytes(pickle.dumps({"kernel": [1, 2]}))
    (tmp_path / "pickle.keras").write_bytes(pickle.dumps({"kernel": [1, 2]}))
    (tmp_path / "short.weights.h5").write_bytes(whole.read_bytes()[:-5000])
    for name, link in (("elsewhere.h5", h5py.ExternalLink(whole, "/layers")), ("bomb.h5", None)):
        with h5py.File(tmp_path / name, "w") as file:
            group = file.create_group("layers/block1_conv1/vars")
            group.attrs["name"] = "block1_conv1"
            if link is not None:
                group["0"] = h5py.ExternalLink(str(whole), "/layers/conv2d/vars/0")
            else:
                group.create_dataset("0", shape=(1 << 20, 1 << 20), dtype="float32")
    for name in ("pickle.h5", "pickle.keras", "short.weights.h5", "elsewhere.h5", "bomb.h5"):
        assert f"model.weights must be a file that Keras wrote, got {tmp_path / name}" in failure(
            weights=tmp_path / name
        )


def test_files_that_are_no_weights(tmp_path):
    absent, text, other = tmp_path / "absent.h5", tmp_path / "text.h5", tmp_path / "weights.pt"
    text.write_text("no weights")
    (tmp_path / "text.keras").write_text("no weights")
    assert failure(weights=absent) == (
        f"model.weights must be a file, got {absent}; use the path of a file on this machine"
    )
    assert failure(weights=other) == (
        f"model.weights must end in .weights.h5, .h5, .keras, got {other}; use a file that Keras wrote"
    )
    assert failure(weights=text).startswith(f"model.weights must be a file that Keras wrote, got {text} (")
    assert failure(weights=tmp_path / "text.keras").startswith("model.weights must be a file that Keras wrote")
