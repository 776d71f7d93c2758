"""JAX: XLA compiles everything; TensorFlow stays beside it, on the processor, for the data."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.config.schema import Config, ConfigError
from train.distributed import rendezvous

NAME = "JAX"
JIT = "on"  # there is no other way
CACHE_BYTES = 2 * 2**30
HEARTBEAT_TIMEOUT_SECONDS = 30  # without a sign of life: then a process counts as dead, and all end

_mesh: Mesh | None = None


def initialize(config: Config) -> None:
    """Connects the processes of a run; before anything asks for devices.

    Raises: ConfigError if they don't all come.
    """
    if config.devices.isdigit():
        jax.config.update("jax_num_cpu_devices", int(config.devices))  # a processor can pass for several
    if config.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    group = config.distributed
    if group.processes == 1:
        return
    rendezvous.rendezvous(group)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loop
    jax.distributed.initialize(
        group.coordinator,
        group.processes,
        group.index,
        initialization_timeout=HEARTBEAT_TIMEOUT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        coordinator_bind_address=rendezvous.bind_address(str(group.coordinator)),
        cluster_detection_method="deactivate",
    )
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of index {index}" for index, count in sorted(counts.items()))
        raise ConfigError(f"all processes must have as many devices, got {found}; use the same device and devices")
    # Processes that compute together for the first time wait half a minute for each other, later half an hour.
    multihost_utils.sync_global_devices("joined")


def gpus() -> list[Any]:
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:  # no such kind of device
        return []


def compute_capability(gpu: Any) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) where it is not known."""
    major, _, minor = str(getattr(gpu, "compute_capability", "0.0")).partition(".")
    return int(major), int(minor or 0)


def describe(gpu: Any) -> str:
    """The model of a GPU."""
    return gpu.device_kind


def count_devices(device: str) -> int:
    """Devices of a kind that this process has."""
    return len(jax.local_devices(backend=device))


def mesh() -> Mesh | None:
    """All devices that share a batch, of all processes, by `batch`; None where there is one."""
    return _mesh


def set_up(config: Config) -> None:
    """The devices; what else there is to say is in the environment."""
    global _mesh  # as JAX's own devices, once for a process
    tf.config.set_visible_devices([], "GPU")
    everywhere = jax.devices(config.device)
    chosen = [
        [device for device in everywhere if device.process_index == process][: int(config.devices)]
        for process in range(jax.process_count())
    ]
    spread = np.array(chosen).reshape(-1)
    _mesh = Mesh(spread, ("batch",)) if len(spread) > 1 else None
    jax.config.update("jax_default_device", jax.local_devices(backend=config.device)[0])
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


def reset_peak_memory() -> None:
    """JAX has no way to."""
