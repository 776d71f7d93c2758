"""Weights: files of every format, pretrained networks, and files that do not fit."""

import pickle

import h5py
import keras
import numpy as np
import pytest

from support.networks import SLOW, layer_names, make_network, min_side
from train import models
from train.models import weights as weights_files
from train.models.keras_applications import canonical_names


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
        weights=None, include_top=False, pooling="avg", input_shape=(min_side(name), min_side(name), 3)
    )
    ours = models.inference_model(make_network(name, channels=3, width=1.0, aux_weight=0))
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
def test_weights_load_from_every_format(suffix, small, tmp_path):
    source = models.inference_model(small("inception_v1"))
    path = tmp_path / f"stored{suffix}"
    (source.save_weights if suffix == ".weights.h5" else source.save)(path)
    target = make_network("inception_v1", num_classes=7)
    fresh = target.get_layer("predictions").get_weights()
    report = weights_files.load(target, path)
    assert report.newly_initialized == [
        *(name for name in layer_names(target) if name == "predictions" or _is_weighted_aux(target, name))
    ]
    assert report.unused == []
    assert len(report.loaded) == len([layer for layer in source.layers if layer.weights]) - 1
    for name in report.loaded:
        for one, other in zip(target.get_layer(name).get_weights(), source.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(fresh[0], target.get_layer("predictions").get_weights()[0])


def _is_weighted_aux(model, name):
    return name.startswith("aux") and bool(model.get_layer(name).weights)


def test_weights_of_a_training_model_load_completely(small, tmp_path):
    small("inception_v1").save_weights(tmp_path / "all.weights.h5")
    target = make_network("inception_v1", weights=tmp_path / "all.weights.h5")
    for one, other in zip(target.get_weights(), small("inception_v1").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unused_heads_of_the_file_are_reported(tmp_path):
    make_network("vgg16", head="fc", width=0.01).save_weights(tmp_path / "top.weights.h5")
    target = make_network("vgg16", width=0.01, aux_weight=0)
    report = weights_files.load(target, tmp_path / "top.weights.h5")
    assert report.newly_initialized == ["predictions"]  # 41 features instead of 5
    assert {"fc1", "fc2", "aux_predictions"} <= set(report.unused)
    summary = report.summary()
    assert summary.startswith(
        "weights: 13 layers loaded, block1_conv1 to block5_conv3; newly initialised: predictions; unused in file:"
    )
    assert "fc1, fc2" in summary


@pytest.mark.parametrize(
    ("name", "first"), [("vgg16", "block1_conv1"), pytest.param("inception_v3", "conv2d", marks=pytest.mark.slow)]
)
def test_weights_for_color_images_are_adapted_to_grey_images(name, first, pixels, tmp_path):
    make_network(name, channels=3, aux_weight=0).save_weights(path := tmp_path / "colour.weights.h5")
    grey = make_network(name, channels=1, aux_weight=0)
    report = weights_files.load(grey, path)
    assert report.adapted == [first]
    assert f"{first} summed over the three colour channels" in report.summary()
    colour = make_network(name, channels=3, aux_weight=0, weights=path)
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


def test_layer_names_with_other_counters_are_matched_by_order(small, tmp_path):
    source = models.inference_model(small("inception_v3"))
    count_up = {"conv2d": 7, "batch_normalization": 7}

    def shifted(name):
        stem, _, number = name.rpartition("_") if name[-1].isdigit() and name != "conv2d" else (name, "", "0")
        return f"{stem}_{int(number) + count_up[stem]}" if stem in count_up else name

    kept = [layer for layer in source.layers if layer.name != "predictions"]  # a file without top
    write_old_format(tmp_path / "old.h5", [(shifted(layer.name), layer.get_weights()) for layer in kept])
    with h5py.File(tmp_path / "old.h5") as file:
        assert "conv2d_7" in file and "conv2d" not in file
    target = make_network("inception_v3", aux_weight=0)
    assert weights_files.load(target, tmp_path / "old.h5").newly_initialized == ["predictions"]
    for layer in kept:
        for one, other in zip(layer.get_weights(), target.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_published_vgg16_file_loads(pixels, tmp_path):
    theirs = keras.applications.VGG16(weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    write_old_format(tmp_path / "notop.h5", [(layer.name, layer.get_weights()) for layer in theirs.layers])
    ours = make_network("vgg16", channels=3, width=1.0, aux_weight=0, weights=str(tmp_path / "notop.h5"))
    features = keras.Model(ours.input, ours.get_layer("avg_pool").output)
    images = pixels("vgg16", 3)
    expected = theirs(keras.applications.vgg16.preprocess_input(images.astype("float32")))
    np.testing.assert_allclose(features(images), expected, rtol=1e-4, atol=1e-5)


def test_imagenet_weights_without_network_access_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path))  # nothing was fetched
    with pytest.raises(
        ValueError, match=r"cannot download the weights for model.weights=imagenet: URL fetch failure .*vgg16"
    ) as raised:
        weights_files.imagenet_weights("vgg16")
    assert "use model.weights=PATH" in str(raised.value)
    with pytest.raises(ValueError, match=r"exists for vgg16, inception_v3, inception_resnet_v2, not for inception_v1"):
        weights_files.imagenet_weights("inception_v1")


def test_imagenet_weights_fill_the_trunk(monkeypatch):
    theirs = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    monkeypatch.setattr(keras.applications, "VGG16", lambda **_: theirs)  # what would be fetched
    ours = make_network("vgg16", channels=3, width=1.0, aux_weight=0)
    report = models.load_weights(ours, "imagenet")
    assert report.summary() == "weights: 13 layers loaded, block1_conv1 to block5_conv3; newly initialised: predictions"
    for layer in theirs.layers:
        for one, other in zip(
            layer.get_weights(), ours.get_layer(layer.name).get_weights() if layer.weights else (), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def failure(**arguments):
    with pytest.raises(ValueError) as raised:
        make_network("vgg16", **{"aux_weight": 0} | arguments)
    return str(raised.value)


def test_weights_of_another_architecture_are_rejected(tmp_path):
    make_network("vgg16", aux_weight=0).save_weights(path := tmp_path / "grey.weights.h5")
    assert failure(weights=path, channels=3) == (
        f"model.weights={path} does not fit the model; mismatched layers (1): block1_conv1: [(3, 3, 1, 4), (4,)] in "
        "the file, [(3, 3, 3, 4), (4,)] in the model; use a file of the same architecture, width and number of channels"
    )
    make_network("vgg16", channels=3, aux_weight=0).save_weights(path := tmp_path / "colour.weights.h5")
    message = failure(weights=path, width=0.1, channels=3)
    assert "does not fit the model; mismatched layers (13): block1_conv1: [(3, 3, 3, 4), (4,)] in the file" in message
    make_network("vgg16_inception", channels=3, aux_weight=0).save_weights(path := tmp_path / "other.weights.h5")
    message = failure(weights=path, channels=3)
    assert "_bn: not in the model; ...; use a file of the same architecture" in message


def test_rejected_weights_change_nothing(tmp_path):
    make_network("vgg16", aux_weight=0).save_weights(path := tmp_path / "grey.weights.h5")
    model = make_network("vgg16", channels=3, aux_weight=0)
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(ValueError, match="does not fit the model"):
        weights_files.load(model, path)
    assert all((one == other.numpy()).all() for one, other in zip(before, model.weights, strict=True))


def test_malformed_weight_files_are_rejected(tmp_path):
    """A pickle, a truncated file, arrays in another file, and arrays that would fill the memory."""
    make_network("vgg16", aux_weight=0).save_weights(whole := tmp_path / "whole.weights.h5")
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
        assert f"cannot read model.weights={tmp_path / name} (" in failure(weights=tmp_path / name)


def test_files_without_weights_are_rejected(tmp_path):
    absent, text, other = tmp_path / "absent.h5", tmp_path / "text.h5", tmp_path / "weights.pt"
    text.write_text("no weights")
    (tmp_path / "text.keras").write_text("no weights")
    assert failure(weights=absent) == (f"model.weights={absent} does not exist; use the path of a file on this machine")
    assert failure(weights=other) == (
        f"model.weights must end in .weights.h5, .h5, .keras, got {other}; use a file that Keras wrote"
    )
    assert failure(weights=text).startswith(f"cannot read model.weights={text} (")
    assert failure(weights=tmp_path / "text.keras").startswith(f"cannot read model.weights={tmp_path / 'text.keras'} (")
