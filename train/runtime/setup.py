"""The ground a run stands on: what `auto` means here, then device, threads, session, precision, determinism, seed.

`auto` is looked up in tables by kind of device, never found by a timing: a run is a function of config, data and code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.config.schema import Config, ConfigError
from train.config.validation import check_batch
from train.runtime import backends

# What `auto` means, by kind of device and model, and why: written by `scripts/benchmarks/training.py --settings`.
AUTO_SETTINGS = Path(__file__).with_name("auto_settings.json")

# What it means where nothing has been measured: processors with bfloat16 instructions and GPUs of compute capability
# 8.0 have units for mixed_bfloat16, GPUs from 7.0 on for mixed_float16, which processors compute very slowly.
DEFAULT_PRECISION = {
    "cpu": "float32",
    "cpu_bfloat16": "mixed_bfloat16",
    "gpu": "float32",
    "gpu_float16": "mixed_float16",
    "gpu_bfloat16": "mixed_bfloat16",
}

XLA_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Each process tunes for itself: one that finds its step compiled already would leave the others waiting for its share.
XLA_NO_SHARDED_AUTOTUNING = "--xla_gpu_shard_autotuning=false"


def prepare(config: Config, library_log: Path) -> tuple[Config, list[str]]:
    """Imports the backend, sets it up as the config says; the config with every `auto` filled in, and what to tell.

    What its libraries write while they are loaded goes to the file `chatter`.

    Raises: ConfigError if a GPU was asked for and none is there, or an earlier run of the process was on other ground.
    """
    _check_process_settings(config, "backend")
    os.environ.update(backend_environment(config))
    import_backend(config.backend, library_log)
    import keras

    machine = backends.get_backend(config.backend)
    with redirect_fds(library_log, 1, 2):
        machine.initialize(config)
    device, notes = _choose_device(machine, config.device)
    devices = _count_devices(machine, config.devices, device)
    config, why = resolve_auto(dataclasses.replace(config, device=device, devices=devices))
    check_batch(config)
    _check_process_settings(config, "device", "devices", "threads", "deterministic")
    machine.set_up(config)
    if device == "gpu":
        notes += tf32_note(device_capability(config.backend, device), config.precision)
    elif config.gpu_memory is not None:
        notes.append("warning: gpu_memory has no effect, since this computes on the CPU")
    keras.utils.clear_session()  # also resets the precision policy, so it stands before it
    keras.config.set_dtype_policy(config.precision)
    _reset_peak_memory(machine)
    where = device if devices == "1" else f"{devices} x {device}"
    where += f" in {config.distributed.processes} processes" if config.distributed.processes > 1 else ""
    ground = f"on: {machine.NAME}, {where}, {config.threads} threads, {config.precision}, jit {config.jit}{why}"
    return config, [*notes, ground]


def backend_environment(config: Config) -> dict[str, str]:
    """What a backend's libraries read there when they are loaded."""
    if config.backend != "jax":
        return {}
    threads, flags = str(config.threads or cores()), os.environ.get("XLA_FLAGS", "").split()
    if config.deterministic and XLA_DETERMINISTIC not in flags:
        flags.append(XLA_DETERMINISTIC)
    if config.distributed.processes > 1:
        flags.append(XLA_NO_SHARDED_AUTOTUNING)
    own = {"NPROC": threads, "PJRT_NPROC": threads, "XLA_FLAGS": " ".join(flags)}
    return own | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # three quarters of a GPU's memory, otherwise


def tf32_note(kind: str, precision: str) -> list[str]:
    """What somebody should hear who asked for float32: TensorFlow multiplies in fewer bits where there are units."""
    if (kind, precision) != ("gpu_bfloat16", "float32"):
        return []
    return ["float32: this GPU multiplies in TF32, with 10 bits after the leading one, as is TensorFlow's usual way"]


def resolve_auto(config: Config) -> tuple[Config, str]:
    """The config with every `auto` filled in for its device, and in brackets why; nothing where nothing was open."""
    kind = device_capability(config.backend, config.device)
    # What has been measured, was with TensorFlow.
    table = json.loads(AUTO_SETTINGS.read_text()) if config.backend == "tensorflow" else {}
    found = table.get(kind, {}).get(config.model.name) or {
        "precision": DEFAULT_PRECISION[kind], "jit": backends.get_backend(config.backend).JIT, "cores": 1.0,
        "why": f"usual for {kind}, not measured",
    }  # fmt: skip
    found["threads"] = max(1, round(found["cores"] * cores()))
    open_ = {"precision": "auto", "jit": "auto", "threads": None}
    chosen = {name: found[name] for name, value in open_.items() if getattr(config, name) == value}
    return dataclasses.replace(config, **chosen), f" (auto: {found['why']})" if chosen else ""


# Keras and TensorFlow import these where they are installed, for wrappers, pictures and data frames that nothing here
# uses. Together they are a third of the time that it takes.
UNUSED_PACKAGES = ("sklearn", "matplotlib", "pandas")
UNUSED_BY_BACKEND = {"tensorflow": ("scipy",), "jax": ()}


def import_backend(backend: str, library_log: Path) -> None:
    """Imports Keras and TensorFlow, quietly, and without what is not needed."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with redirect_fds(library_log, 2), hide_modules(*UNUSED_PACKAGES, *UNUSED_BY_BACKEND[backend]):
        import keras  # noqa: F401
        import tensorflow as tf

        tf.config.list_physical_devices()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


@contextmanager
def hide_modules(*packages: str) -> Iterator[None]:
    """For a while these can't be imported, except where they have been before."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # as importlib's documentation says
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def redirect_fds(path: Path, *descriptors: int) -> Iterator[None]:
    """Sends standard output (1) or error (2), those of C++ libraries too, to the end of a file for a while."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flush()
    terminals = {number: os.dup(number) for number in descriptors}
    with path.open("ab") as file:
        for number in descriptors:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        flush()
        for number, terminal in terminals.items():
            os.dup2(terminal, number)
            os.close(terminal)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_device(backend: Any, device: str) -> tuple[str, list[str]]:
    """`cpu` or `gpu`, and what somebody should hear who expected the other one."""
    there = bool(backend.gpus())
    if device == "gpu" and not there:
        raise ConfigError(
            f"device must be one that is there, got gpu but {backend.NAME} finds no GPU; "
            "use device=cpu, or install the NVIDIA driver and type: make setup"
        )
    if device == "auto" and not there and Path("/proc/driver/nvidia/version").exists():
        told = f"warning: there is an NVIDIA driver but {backend.NAME} finds no GPU, so this computes on the CPU"
        return "cpu", [told]
    return ("gpu" if there and device != "cpu" else "cpu"), []


def _count_devices(backend: Any, requested: str, device: str) -> str:
    there = backend.count_devices(device)
    if requested != "all" and int(requested) > there:
        raise ConfigError(
            f"devices must be at most those that this process has, {there}, got {requested}; use devices=all"
        )
    return str(there) if requested == "all" else requested


def set_seed(number: int) -> None:
    """Starts all randomness anew, just before the network is built.

    What comes earlier may draw, too: preparing a data set does, and only the first time.
    """
    import keras

    keras.utils.set_random_seed(number)


_process_settings: dict[str, object] = {}


def _check_process_settings(config: Config, *names: str) -> None:
    """What the libraries can't take back in a process must be the same for all its runs."""
    for name in names:
        value = getattr(config, name)
        if _process_settings.setdefault(name, value) != value:
            raise ConfigError(
                f"{name} must be the same for all runs of a process, got {value} after "
                f"{_process_settings[name]}; use another one"
            )


def device_capability(backend: str, device: str) -> str:
    """`cpu`, `cpu_bfloat16`, `gpu`, `gpu_float16` or `gpu_bfloat16`: what the tables above are keyed by."""
    if device == "cpu":
        return "cpu_bfloat16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "cpu"
    machine = backends.get_backend(backend)
    capability = machine.compute_capability(machine.gpus()[0])
    return "gpu_bfloat16" if capability >= (8, 0) else "gpu_float16" if capability >= (7, 0) else "gpu"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def processor_name(backend: str, device: str) -> str:
    """The model of what computes: another one may give other bits."""
    if device == "gpu":
        machine = backends.get_backend(backend)
        return machine.describe(machine.gpus()[0])
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory_bytes(backend: str) -> int:
    """Largest resident memory of this process since `prepare`; on a GPU, the largest device memory in use."""
    if (found := backends.get_backend(backend).peak_memory_bytes()) is not None:
        return found
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_memory(backend: Any) -> None:
    """Each run of a sweep has a peak of its own."""
    backend.reset_peak_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
