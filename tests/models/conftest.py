"""Fixtures of several test modules: networks and images."""

import keras
import numpy as np
import pytest

from support.networks import make_network, min_side


@pytest.fixture(scope="module")
def small():
    """Every network, narrow and at its smallest image size; built on first use."""
    built = {}

    def get(name):
        if name not in built:
            keras.utils.set_random_seed(1)
            built[name] = make_network(name)
        return built[name]

    return get


@pytest.fixture(scope="module")
def pixels():
    def get(name, channels=1, examples=2):
        shape = (examples, min_side(name), min_side(name), channels)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    return get
