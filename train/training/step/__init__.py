"""One training step on the device, and the state that it changes; a module for each backend."""

from __future__ import annotations

import importlib
from typing import Any


def get_step_class(backend: str) -> Any:
    """The class of a backend's step (`train.training.step.base.Step`)."""
    return importlib.import_module(f"train.training.step.{backend}").Step
