"""The networks: published numbers, names, inputs and outputs, options."""

import inspect
import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.networks import LIGHT_NAMES, NAMES, layer_names, make_network, min_side
from train import models
from train.config import schema
from train.models import blocks
from train.models.weights import without_weights

AUX_OUTPUTS = {name: ("aux_1", "aux_2") if name == "inception_v1" else ("aux",) for name in NAMES}


def trunk(model):
    return {layer.name: layer for layer in model.layers if not layer.name.startswith("aux")}


def count_values(variables):
    return sum(math.prod(variable.shape) for variable in variables)


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
        return layer_names(getattr(keras.applications, application)(weights=None))


@pytest.mark.parametrize(("name", "shape", "options", "layers", "parameters", "fixed"), PUBLISHED)
def test_parameters_match_published_numbers(name, shape, options, layers, parameters, fixed):
    with without_weights():
        model = models.build(name, shape, 1000, **{"aux_weight": 0} | options)
    assert model.count_params() == parameters
    assert count_values(model.non_trainable_weights) == fixed
    if layers:
        assert len(model.layers) - 1 == layers
    if name in (
        "inception_v3",
        "inception_resnet_v2",
    ):  # names and their order, those of a first build in a fresh process
        assert layer_names(model)[2:] == first_names(name)[1:]


def test_notebook_network_has_the_published_parameters():
    with without_weights():
        model = models.build("vgg16_inception", (224, 224, 1), 1000, head="max", aux_weight=0)
    assert model.count_params() - model.get_layer("predictions").count_params() == 8_442_064


# --- every network ---------------------------------------------------------------------------------------------------


def test_tables_list_the_same_networks():
    assert NAMES == ("vgg16", "vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")
    assert tuple(models.MIN_IMAGE_SIZE) == tuple(models.NATIVE_SIZE) == NAMES
    assert list(models.MIN_IMAGE_SIZE.values()) == [32, 32, 32, 75, 75]
    assert list(models.NATIVE_SIZE.values()) == [224, 224, 224, 299, 299]
    assert all(builder.__name__ == name for name, builder in models.BUILDERS.items())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_finite_float32_logits(name, small, pixels):
    model = small(name)
    assert model.name == name
    assert tuple(model.output) == ("main", *AUX_OUTPUTS[name])
    assert layer_names(model)[1] == "normalize"
    assert len(set(layer_names(model))) == len(model.layers)
    images = pixels(name)
    outputs = model(images)
    for key, logits in outputs.items():
        assert logits.shape == (2, 5) and logits.dtype == "float32" and np.isfinite(logits).all(), key
    for key, logits in model(images.astype("float32")).items():
        np.testing.assert_array_equal(logits, outputs[key])
    assert np.abs(outputs["main"][0] - outputs["main"][1]).max() > 0  # different images, different answers


@pytest.mark.parametrize("name", NAMES)
def test_fractional_pixel_values_are_not_rounded(name, small, pixels):
    images = pixels(name).astype("float32")
    assert np.abs(small(name)(images)["main"] - small(name)(np.minimum(images + 0.5, 255))["main"]).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_inference_model_shares_weights_and_has_no_auxiliary_head(name, small, pixels):
    model, network = small(name), models.inference_model(small(name))
    assert not [layer for layer in layer_names(network) if layer.startswith("aux")]
    assert [id(weight) for weight in network.weights] == [
        id(weight) for layer in trunk(model).values() for weight in layer.weights
    ]
    np.testing.assert_array_equal(network(pixels(name)), model(pixels(name))["main"])


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_second_build_and_build_without_auxiliary_head_have_the_same_layers(name, small):
    with without_weights():
        again, without = make_network(name), make_network(name, aux_weight=0)
    assert sorted(layer_names(again)) == sorted(layer_names(small(name)))
    assert set(layer_names(without)) == set(trunk(small(name)))
    assert tuple(without.output) == ("main",)
    for layer in without.layers:
        assert [w.shape for w in layer.weights] == [w.shape for w in trunk(small(name))[layer.name].weights]


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_same_seed_gives_the_same_trunk_without_auxiliary_head(name, small):
    keras.utils.set_random_seed(1)
    for layer in make_network(name, aux_weight=0).layers:
        for one, other in zip(layer.get_weights(), trunk(small(name))[layer.name].get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_auxiliary_heads_send_gradients_to_the_trunk(name, small, pixels):
    model, labels = small(name), np.array([0, 1, 2, 3])
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).kernel
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for key in AUX_OUTPUTS[name]:
        kernels = [layer.kernel for layer in model.layers if layer.name.startswith(key) and hasattr(layer, "kernel")]
        with tf.GradientTape(persistent=True) as tape:
            outputs = model(pixels(name, examples=4), training=True)
            auxiliary = 0.3 * cross_entropy(labels, outputs[key])
            loss = cross_entropy(labels, outputs["main"]) + auxiliary
        heads_gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
        assert len(kernels) == 3
        assert all(np.abs(gradient).max() > 0 for gradient in heads_gradients)
        assert np.abs(tape.gradient(auxiliary, first.value)).max() > 0


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_width_scales_channels(name):
    with without_weights():
        least, narrow, full = (
            make_network(name, width=0.001),
            make_network(name, width=0.37),
            make_network(name, width=1.0),
        )
    assert layer_names(least) == layer_names(narrow) == layer_names(full)
    assert {tensor.shape for tensor in least.output.values()} == {(None, 5)}
    for layer, original in zip(narrow.layers, full.layers, strict=True):
        # Where the last branch only pools, nothing can take the remainder.
        pools = layer.name in ("mixed3", "mixed8", "mixed_6a", "mixed_7a")
        if isinstance(layer, keras.layers.Concatenate) and not pools:
            assert layer.output.shape[-1] == blocks.scale_channels(original.output.shape[-1], 0.37), layer.name


@pytest.mark.parametrize("name", LIGHT_NAMES)
@pytest.mark.parametrize("head", models.HEADS)
def test_each_head_can_be_built(name, head):
    with without_weights():
        model = make_network(name, head=head, width=0.5)
    assert model.get_layer("predictions").output.shape == (None, 5)
    if head == "fc":
        assert [model.get_layer(layer).units for layer in ("fc1", "fc2")] == [2048, 2048]
    else:
        assert model.get_layer(f"{head}_pool").output.shape[1:] == model.get_layer("predictions").input.shape[1:]


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_batch_norm_momentum_reaches_every_layer(name):
    with without_weights():
        model = make_network(name, batch_norm_momentum=0.7)
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert layers and {layer.momentum for layer in layers} == {0.7}


@pytest.mark.parametrize("name", LIGHT_NAMES)
def test_mixed_precision_keeps_input_and_output_in_float32(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with without_weights():
            model = make_network(name)
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
        network = models.inference_model(make_network(name, channels=3))
        network.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name} pixels.npy", images := pixels(name, 3))
        ours[name] = network.predict(images, verbose=0)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", LOADING, *NAMES], cwd=tmp_path, check=True, env=bare)
    for name, output in ours.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name} output.npy"), output, err_msg=name)


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_normalization_of_every_network_matches_golden_values(name: str, small):
    """Golden numbers for a grey image of 20."""
    image = np.full((1, min_side(name), min_side(name), 1), 20, "float32")
    wanted = -97.378639 if name == "vgg16" else -0.843137
    np.testing.assert_allclose(small(name).layers[1](image), np.full_like(image, wanted), atol=1e-5)


def test_vgg16_normalization_of_colors_matches_golden_values():
    """Golden numbers of red 10, green 20, blue 30; blue comes first."""
    with models.weights.without_weights():
        network = models.build("vgg16", (32, 32, 3), 10, width=0.05)
    images = np.broadcast_to(np.array([10, 20, 30], "float32"), (1, 32, 32, 3))
    np.testing.assert_allclose(network.layers[1](images)[0, 5, 7], [-73.939, -96.779, -113.68], atol=1e-5)


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
        "model.blocks is not an option of vgg16; its options are width, head, batch_norm_momentum, aux_weight",
    ),
    (
        ("inception_v3", (75, 75, 3), 10, {"batch_norm": False}),
        "model.batch_norm is not an option of inception_v3; "
        "its options are width, head, batch_norm_momentum, aux_weight",
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
        "model.blocks must be a list of 5 block kinds, one for each stage, got ['conv', 'conv']; the kinds are conv, "
        "conv_bn, inception_naive, inception_v1, inception_two_3x3, inception_v3, inception_expanded, "
        "inception_3x3_reduce, single_1x1, single_3x3, single_5x5",
    ),
    (
        ("vgg16_inception", (32, 32, 3), 10, {"blocks": ["conv"] * 4 + ["dense"]}),
        "model.blocks must contain only conv, conv_bn, inception_naive, inception_v1, inception_two_3x3, inception_v3, "
        "inception_expanded, inception_3x3_reduce, single_1x1, single_3x3, single_5x5, got 'dense'; use one of these",
    ),
    (
        ("inception_v1", (32, 32, 3), 10, {"batch_norm": 1}),
        "model.batch_norm must be true or false, got 1; use model.batch_norm=true",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_invalid_arguments_are_rejected(arguments, message):
    name, shape, num_classes, options = arguments
    with pytest.raises(ValueError) as raised:
        models.build(name, shape, num_classes, **options)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", NAMES)
def test_builders_have_no_defaults_and_build_takes_those_of_the_schema(name):
    options = inspect.signature(models.BUILDERS[name]).parameters
    assert {option: parameter.default for option, parameter in options.items()} == dict.fromkeys(
        options, inspect.Parameter.empty
    )
    configured = schema.options(schema.GROUPS["model"][name]())
    del configured["weights"]
    assert models.default_options(name) == configured


def test_option_names_of_each_network():
    common = ("width", "head", "batch_norm_momentum", "aux_weight")
    assert models.option_names("vgg16") == common
    assert models.option_names("vgg16_inception") == (*common, "blocks")
    assert models.option_names("inception_v1") == (*common, "batch_norm")
