"""TensorFlow: one device and its own thread pool."""

from __future__ import annotations

import tensorflow as tf

from train.config.schema import Distributed

NAME = "TensorFlow"
JIT = "off"  # what `jit=auto` means without a measurement


def initialize(*, device: str, devices: str, group: Distributed) -> None:
    """Does nothing: this backend has one process and uses one device."""
    del device, devices, group


def count_devices(_device: str) -> int:
    """The number of devices of a kind that a run may use."""
    return 1


def gpus() -> list[tf.config.PhysicalDevice]:
    return tf.config.list_physical_devices("GPU")


def compute_capability(gpu: tf.config.PhysicalDevice) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) if unknown."""
    return tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))


def describe(gpu: tf.config.PhysicalDevice) -> str:
    """The model name of a GPU."""
    return tf.config.experimental.get_device_details(gpu).get("device_name", "gpu")


def set_up(*, device: str, devices: int, threads: int | None, gpu_memory: int | None, deterministic: bool) -> None:
    """Sets device, memory limit in MiB (None: grows as needed), threads (None: one per core) and determinism."""
    del devices  # one
    if device == "gpu":
        gpu = gpus()[0]
        if gpu_memory is None:
            tf.config.experimental.set_memory_growth(gpu, True)
        else:
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=gpu_memory)
            tf.config.set_logical_device_configuration(gpu, [limit])
        tf.config.set_visible_devices([gpu], "GPU")
    else:
        tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def peak_memory_bytes() -> int | None:
    """Peak GPU memory in use since `reset_peak_memory`; None without a GPU."""
    if not tf.config.get_visible_devices("GPU"):
        return None
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


def reset_peak_memory() -> None:
    if tf.config.get_visible_devices("GPU"):
        tf.config.experimental.reset_memory_stats("GPU:0")
