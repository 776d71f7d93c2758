"""Fixtures of several test modules."""

import pytest


@pytest.fixture
def fresh_keras():
    """float32 and the same seed, whatever other tests have set."""
    import keras  # not above: some modules of this folder need no TensorFlow

    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)
