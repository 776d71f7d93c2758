"""The training step on the device, and its state; one module for each backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.training.step.base import Step


def get_step_class(backend: str) -> type[Step]:
    """The backend's subclass of `train.training.step.base.Step`."""
    step_class: type[Step] = importlib.import_module(f"train.training.step.{backend}").Step
    return step_class
