"""The backends: one module each for devices, threads and determinism, with the same functions in all.

`train.runtime.setup` calls them; the JAX step also takes its mesh from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from train.config.schema import Distributed

BACKENDS = ("tensorflow", "jax")


class Backend(Protocol):
    """The functions of a backend's module. A GPU is an object of the backend's own, from `gpus`."""

    @property
    def NAME(self) -> str: ...  # noqa: N802  # a constant of the module

    @property
    def JIT(self) -> str: ...  # noqa: N802  # a constant of the module

    def initialize(self, *, device: str, devices: str, group: Distributed) -> None: ...

    def count_devices(self, device: str, /) -> int: ...

    def gpus(self) -> Sequence[object]: ...

    def compute_capability(self, gpu: object, /) -> tuple[int, int]: ...

    def describe(self, gpu: object, /) -> str: ...

    def set_up(
        self, *, device: str, devices: int, threads: int | None, gpu_memory: int | None, deterministic: bool
    ) -> None: ...

    def peak_memory_bytes(self) -> int | None: ...

    def reset_peak_memory(self) -> None: ...


def get_backend(backend: str) -> Backend:
    """Imports and returns the module of a backend. Raises: KeyError if the backend is unknown."""
    if backend == "tensorflow":
        from train.runtime import tensorflow

        return tensorflow
    if backend == "jax":
        from train.runtime import jax

        return jax
    raise KeyError(backend)
