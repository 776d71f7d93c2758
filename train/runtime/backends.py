"""The backends: one module each for devices, threads and determinism, with the same functions in all.

`train.runtime.setup` calls them; the JAX step also takes its mesh from there.
"""

from __future__ import annotations

import importlib
from typing import Any

BACKENDS = ("tensorflow", "jax")


def get_backend(backend: str) -> Any:
    """Imports and returns the module of a backend. Raises: KeyError if the backend is unknown."""
    if backend not in BACKENDS:
        raise KeyError(backend)
    return importlib.import_module(f"train.runtime.{backend}")
