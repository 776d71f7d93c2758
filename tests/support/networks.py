"""Narrow networks for tests."""

import pytest

from train import models

NAMES = tuple(models.BUILDERS)
SLOW = pytest.mark.slow
# Inception-ResNet-v2 has 780 layers: what does not need it shows it in the longer suite only.
LIGHT_NAMES = [pytest.param(name, marks=SLOW) if name == "inception_resnet_v2" else name for name in NAMES]


NARROW = 0.06


def min_side(name):
    return models.MIN_IMAGE_SIZE[name]


def make_network(name, channels=1, num_classes=5, weights=None, **options):
    model = models.build(name, (min_side(name), min_side(name), channels), num_classes, **{"width": NARROW} | options)
    if weights is not None:
        models.load_weights(model, weights)
    return model


def layer_names(model):
    return [layer.name for layer in model.layers]
