"""The type of a tensor, on either backend."""

from typing import Any

Tensor = Any  # TensorFlow and JAX have no type of tensors in common, and Keras publishes none for the two
