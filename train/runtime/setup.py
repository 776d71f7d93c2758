"""Sets up the process for a run: resolves `auto`, then device, threads, session, precision, determinism and seed.

`auto` is looked up in tables by kind of device, never timed: a run is a function of config, data and code.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from train.config.schema import ConfigError, Distributed
from train.runtime import backends
from train.runtime.backends import Backend

# What `auto` means by kind of device and model, and why; written by `scripts/benchmarks/training.py --settings`.
AUTO_SETTINGS = Path(__file__).with_name("auto_settings.json")

# What it means without a measurement: CPUs with bfloat16 instructions and GPUs from compute capability 8.0 have units
# for mixed_bfloat16, GPUs from 7.0 for mixed_float16, which is very slow on CPUs.
DEFAULT_PRECISION = {
    "cpu": "float32",
    "cpu_bfloat16": "mixed_bfloat16",
    "gpu": "float32",
    "gpu_float16": "mixed_float16",
    "gpu_bfloat16": "mixed_bfloat16",
}

XLA_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Each process tunes alone: one that finds its step in the cache would leave the others waiting for its share of it.
XLA_NO_SHARDED_AUTOTUNING = "--xla_gpu_shard_autotuning=false"


@dataclass(frozen=True)
class RuntimeSettings:
    """How a process computes: the config's keys of the same names, whose `auto` and defaults `prepare` resolves."""

    backend: str
    device: str
    devices: str
    threads: int | None
    precision: str
    jit: str
    deterministic: bool
    gpu_memory: int | None


def prepare(
    settings: RuntimeSettings, *, model_name: str, group: Distributed, library_log: Path
) -> tuple[RuntimeSettings, list[str]]:
    """Imports and sets up the backend; returns the settings with every `auto` resolved, and messages for the user.

    library_log: the file that receives what the libraries print while they are loaded.

    Raises: ConfigError if a requested GPU is missing, or an earlier run of this process had other settings.
    """
    _check_process_settings(settings, "backend")
    os.environ.update(backend_environment(settings.backend, settings.threads, settings.deterministic, group.processes))
    import_backend(settings.backend, library_log)
    import keras

    backend = backends.get_backend(settings.backend)
    with redirect_fds(library_log, 1, 2):
        backend.initialize(device=settings.device, devices=settings.devices, group=group)
    device, messages = _choose_device(backend, settings.device)
    devices = _count_devices(backend, settings.devices, device)
    settings, reason = resolve_auto(replace(settings, device=device, devices=devices), model_name)
    _check_process_settings(settings, "device", "devices", "threads", "deterministic")
    backend.set_up(
        device=device,
        devices=int(devices),
        threads=settings.threads,
        gpu_memory=settings.gpu_memory,
        deterministic=settings.deterministic,
    )
    if device == "gpu":
        messages += tf32_note(device_capability(settings.backend, device), settings.precision)
    elif settings.gpu_memory is not None:
        messages.append("warning: gpu_memory has no effect on the CPU")
    keras.utils.clear_session()  # first, since it also resets the precision policy
    keras.config.set_dtype_policy(settings.precision)
    _reset_peak_memory(backend)
    return settings, [*messages, _device_message(settings, backend.NAME, group.processes) + reason]


def _device_message(settings: RuntimeSettings, backend_name: str, processes: int) -> str:
    device = settings.device.upper()
    if settings.devices != "1":
        device = f"{settings.devices} x {device}"
    if processes > 1:
        device += f" in {processes} processes"
    threads = f"{settings.threads} thread{'' if settings.threads == 1 else 's'}"
    return f"device: {device}, {backend_name}, {threads}, {settings.precision}, XLA {settings.jit}"


def backend_environment(backend: str, threads: int | None, deterministic: bool, processes: int) -> dict[str, str]:
    """The environment variables that a backend's libraries read when they are loaded. threads: None for all cores."""
    if backend != "jax":
        return {}
    flags = os.environ.get("XLA_FLAGS", "").split()
    if deterministic and XLA_DETERMINISTIC not in flags:
        flags.append(XLA_DETERMINISTIC)
    if processes > 1:
        flags.append(XLA_NO_SHARDED_AUTOTUNING)
    return {
        "NPROC": str(threads or cores()),
        "PJRT_NPROC": str(threads or cores()),
        "XLA_FLAGS": " ".join(flags),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # otherwise it takes three quarters of a GPU's memory
    }


def tf32_note(capability: str, precision: str) -> list[str]:
    """The note for a float32 run on a GPU with TF32 units: TensorFlow multiplies in fewer bits there."""
    if (capability, precision) != ("gpu_bfloat16", "float32"):
        return []
    return ["note: on this GPU float32 matrix products use TF32 (10-bit mantissa), TensorFlow's default"]


def resolve_auto(settings: RuntimeSettings, model_name: str) -> tuple[RuntimeSettings, str]:
    """The settings with every `auto` resolved for their device, and the reason in brackets; "" if none was `auto`."""
    capability = device_capability(settings.backend, settings.device)
    # The measurements were made with TensorFlow.
    table = json.loads(AUTO_SETTINGS.read_text()) if settings.backend == "tensorflow" else {}
    best = table.get(capability, {}).get(model_name) or {
        "precision": DEFAULT_PRECISION[capability], "jit": backends.get_backend(settings.backend).JIT, "cores": 1.0,
        "why": f"default for {capability}, not measured",
    }  # fmt: skip
    best["threads"] = max(1, round(best["cores"] * cores()))
    auto_values = {"precision": "auto", "jit": "auto", "threads": None}
    resolved = {name: best[name] for name, value in auto_values.items() if getattr(settings, name) == value}
    return replace(settings, **resolved), f" (auto: {best['why']})" if resolved else ""


# Keras and TensorFlow import these if installed, for wrappers, plots and data frames that are not used here. Together
# they take a third of the import time.
UNUSED_PACKAGES = ("sklearn", "matplotlib", "pandas")
UNUSED_BY_BACKEND = {"tensorflow": ("scipy",), "jax": ()}


def import_backend(backend: str, library_log: Path) -> None:
    """Imports Keras and TensorFlow, quietly, and without packages that are not needed."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with redirect_fds(library_log, 2), hide_modules(*UNUSED_PACKAGES, *UNUSED_BY_BACKEND[backend]):
        import keras  # noqa: F401
        import tensorflow as tf

        tf.config.list_physical_devices()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


@contextmanager
def hide_modules(*packages: str) -> Iterator[None]:
    """Makes packages that are not imported yet impossible to import for a while."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None blocks the import, as importlib documents
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def redirect_fds(path: Path, *descriptors: int) -> Iterator[None]:
    """Appends standard output (1) or error (2), including that of C++ libraries, to a file for a while."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flush()
    saved = {number: os.dup(number) for number in descriptors}
    with path.open("ab") as file:
        for number in descriptors:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        flush()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_device(backend: Backend, device: str) -> tuple[str, list[str]]:
    """`cpu` or `gpu`, and a warning if the choice may be unexpected."""
    has_gpu = bool(backend.gpus())
    if device == "gpu" and not has_gpu:
        raise ConfigError(
            f"device=gpu is not available: {backend.NAME} finds no GPU; "
            "use device=cpu, or install the NVIDIA driver and run make setup"
        )
    if device == "auto" and not has_gpu and Path("/proc/driver/nvidia/version").exists():
        return "cpu", [f"warning: an NVIDIA driver is installed but {backend.NAME} finds no GPU; running on the CPU"]
    return ("gpu" if has_gpu and device != "cpu" else "cpu"), []


def _count_devices(backend: Backend, requested: str, device: str) -> str:
    available = backend.count_devices(device)
    if requested != "all" and int(requested) > available:
        raise ConfigError(
            f"devices must be at most the number in this process ({available}), got {requested}; use devices=all"
        )
    return str(available) if requested == "all" else requested


def set_seed(number: int) -> None:
    """Seeds all randomness; call it just before the network is built.

    Earlier work may draw random numbers, too: preparing a data set does, but only the first time.
    """
    import keras

    keras.utils.set_random_seed(number)


_process_settings: dict[str, object] = {}


def _check_process_settings(settings: RuntimeSettings, *names: str) -> None:
    """Rejects settings that the libraries cannot change within a process and that an earlier run set differently."""
    for name in names:
        value = getattr(settings, name)
        if _process_settings.setdefault(name, value) != value:
            raise ConfigError(
                f"{name} cannot change within a process, from {_process_settings[name]} to {value}; start a new process"
            )


def device_capability(backend: str, device: str) -> str:
    """The key of the tables above: `cpu`, `cpu_bfloat16`, `gpu`, `gpu_float16` or `gpu_bfloat16`."""
    if device == "cpu":
        return "cpu_bfloat16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "cpu"
    module = backends.get_backend(backend)
    capability = module.compute_capability(module.gpus()[0])
    return "gpu_bfloat16" if capability >= (8, 0) else "gpu_float16" if capability >= (7, 0) else "gpu"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def processor_name(backend: str, device: str) -> str:
    """The model name of the CPU or GPU that computes: another model may give other bits."""
    if device == "gpu":
        module = backends.get_backend(backend)
        return module.describe(module.gpus()[0])
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory_bytes(backend: str) -> int:
    """Peak resident memory of this process since `prepare`; on a GPU, the peak device memory in use."""
    if (device_peak := backends.get_backend(backend).peak_memory_bytes()) is not None:
        return device_peak
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_memory(backend: Backend) -> None:
    """Resets the peak, so that each run in a process is measured by itself."""
    backend.reset_peak_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
