"""JAX: XLA compiles everything; TensorFlow runs on the CPU beside it, for the input pipeline."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.config.schema import ConfigError, Distributed
from train.distributed import liveness, rendezvous

NAME = "JAX"
JIT = "on"  # JAX compiles everything
CACHE_BYTES = 2 * 2**30
HEARTBEAT_TIMEOUT_SECONDS = 30  # a process that is silent for longer counts as dead, and all end

_mesh: Mesh | None = None


def initialize(*, device: str, devices: str, group: Distributed) -> None:
    """Connects the processes of a run; call it before any query for devices. devices: per process, or all.

    Raises: ConfigError if some process does not connect, or their numbers of devices differ.
    """
    if devices.isdigit():
        jax.config.update("jax_num_cpu_devices", int(devices))  # one CPU can act as several devices
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if group.processes == 1:
        return
    liveness.watch(rendezvous.rendezvous(group))
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
        listing = ", ".join(f"{count} in process {index}" for index, count in sorted(counts.items()))
        raise ConfigError(
            f"the processes have different numbers of devices ({listing}); start all with the same device and devices"
        )
    # The first computation across processes has a time limit of half a minute, later ones of half an hour.
    multihost_utils.sync_global_devices("joined")


def gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:  # JAX has no GPU platform here
        return []


def compute_capability(gpu: jax.Device) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) if unknown."""
    major, _, minor = str(getattr(gpu, "compute_capability", "0.0")).partition(".")
    return int(major), int(minor or 0)


def describe(gpu: jax.Device) -> str:
    """The model name of a GPU."""
    return gpu.device_kind


def count_devices(device: str) -> int:
    """The number of devices of a kind in this process."""
    return len(jax.local_devices(backend=device))


def mesh() -> Mesh | None:
    """The mesh of all devices that share a batch, over all processes, with the axis `batch`; None for one device."""
    return _mesh


def set_up(*, device: str, devices: int, threads: int | None, gpu_memory: int | None, deterministic: bool) -> None:
    """Chooses the devices and the compilation cache."""
    del threads, gpu_memory, deterministic  # the environment holds them
    global _mesh  # one for a process, like JAX's own devices
    tf.config.set_visible_devices([], "GPU")
    all_devices = jax.devices(device)
    by_process = [
        [candidate for candidate in all_devices if candidate.process_index == process][:devices]
        for process in range(jax.process_count())
    ]
    chosen = np.array(by_process).reshape(-1)
    _mesh = Mesh(chosen, ("batch",)) if len(chosen) > 1 else None
    jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
    # Compilation takes longer than short runs do. Code compiled for one machine may not run on another.
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inception-laboratory/xla"
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / platform.node()))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def peak_memory_bytes() -> int | None:
    """Peak GPU memory in use since the process started; None without a GPU."""
    device = jax.config.jax_default_device
    stats = device.memory_stats() if device and device.platform == "gpu" else None
    return int(stats["peak_bytes_in_use"]) if stats else None


def reset_peak_memory() -> None:
    """Does nothing: JAX cannot reset it."""
