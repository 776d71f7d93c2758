"""The type of a tensor, on either backend."""

from typing import Any

Tensor = (
    Any  # TensorFlow's tensors and variables and JAX's arrays have no type in common, and Keras names none for them
)
