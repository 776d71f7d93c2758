"""The training step on the device, and its state; one module for each backend."""

from __future__ import annotations

import importlib
from typing import Any


def get_step_class(backend: str) -> Any:
    """The backend's subclass of `train.training.step.base.Step`."""
    return importlib.import_module(f"train.training.step.{backend}").Step
