"""What a backend has to be told of devices, threads and determinism, one module for each: the same names in all.

Only `train.runtime.setup` asks them, before anything is computed.
"""

from __future__ import annotations

import importlib
from typing import Any

BACKENDS = ("tensorflow", "jax")


def get_backend(backend: str) -> Any:
    """The module of a backend, which is imported with it. Raises: KeyError for an unknown one."""
    if backend not in BACKENDS:
        raise KeyError(backend)
    return importlib.import_module(f"train.runtime.{backend}")
