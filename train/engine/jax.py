"""JAX: XLA compiles everything; TensorFlow stays beside it, on the processor, for the data."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import jax
import tensorflow as tf

from train.config import Config

NAME = "JAX"
JIT = "on"  # there is no other way
CACHE_BYTES = 2 * 2**30


def gpus() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:  # no such kind of device
        return []


def capability(gpu: Any) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) where it is not known."""
    major, _, minor = str(getattr(gpu, "compute_capability", "0.0")).partition(".")
    return int(major), int(minor or 0)


def describe(gpu: Any) -> str:
    """The model of a GPU."""
    return gpu.device_kind


def set_up(config: Config) -> None:
    """The device; what else there is to say is in the environment."""
    tf.config.set_visible_devices([], "GPU")
    device = gpus()[0] if config.device == "gpu" else jax.devices("cpu")[0]
    jax.config.update("jax_default_device", device)
    # Compiling takes longer than short runs do. What is compiled for one machine may not run on another.
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inception-laboratory/xla"
    jax.config.update("jax_compilation_cache_dir", str(place / platform.node()))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def peak_memory_bytes() -> int | None:
    """Largest memory of the GPU in use, since the process began; None without one."""
    device = jax.config.jax_default_device
    found = device.memory_stats() if device and device.platform == "gpu" else None
    return int(found["peak_bytes_in_use"]) if found else None


def forget_peak_memory() -> None:
    """JAX has no way to."""
