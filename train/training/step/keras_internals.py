"""All that the project uses of Keras beside its public interface, each with the reason why it has to.

A test fails with the name of a member that the installed Keras has moved or renamed, and with the name of one that is
used, or replaced on an object, and not listed here.
"""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """A member of `owner`, a public name or a module. parameters: of a method or function; None for an attribute."""

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    reason: str


REPLACED = (
    Member(
        "keras.layers.BatchNormalization", "call", ("self", "inputs", "training", "mask"),
        "TensorFlow's fused kernel takes one pass over the images, Keras's operations take several (fused_kernels.py). "
        "A subclass would be named in best/model.keras, which plain Keras has to load.",
    ),
    Member(
        "keras.layers.Conv2D", "call", ("self", "inputs"),
        "On CPUs a matrix product computes the gradient of small convolutions up to ten times as fast "
        "(fused_kernels.py). A subclass would be named in best/model.keras, which plain Keras has to load.",
    ),
)  # fmt: skip

PRIVATE = (
    Member(
        "keras.Layer", "_flatten_layers", ("self", "include_self", "recursive"),
        "Keras lists the layers of a model, but not the layers inside a layer (fused_kernels.py).",
    ),
    Member(
        "keras.Variable", "_value", None,
        "`assign` converts and checks each value, for all variables in every step, which takes as long as a small step "
        "(jax.py).",
    ),
    Member(
        "keras.src.backend.common.global_state", "set_global_attribute", ("name", "value"),
        "Keras would initialise the variables of models that were built without weights together with the next model, "
        "and has no public way to forget them (train/models/weights.py).",
    ),
)  # fmt: skip
