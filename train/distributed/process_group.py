"""The processes that train one network together, and what they tell each other.

All take the same steps with the same numbers, each on its part of every batch; process 0 leads: it alone writes. What
they exchange goes through JAX, which has connected them (`train.runtime.jax.join`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.cli import arguments
from train.config.compatibility import differing_keys
from train.config.schema import Config, ConfigError

CHUNK_WORDS = 2**22  # 32-bit words that are sent at a time, so that one compiled function does for all
PER_PROCESS_KEY = "processor"  # may differ from process to process, but not from life to life


class WorkerLostError(ConnectionError):
    """Another process of the run is gone, and with it the run."""


@dataclass(frozen=True)
class ProcessGroup:
    """One of `size` processes. With one, nothing is sent and JAX is not needed."""

    index: int
    size: int

    @classmethod
    def from_config(cls, config: Config) -> ProcessGroup:
        return cls(config.distributed.index, config.distributed.processes)

    @property
    def is_leader(self) -> bool:
        return self.index == 0

    @property
    def is_single(self) -> bool:
        return self.size == 1

    def verify_same_config(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """All have the same config, data and code; what the run of all stands on: other processors by index, too.

        Raises: ConfigError in all processes, naming what differs.
        """
        if self.is_single:
            return provenance
        grounds = [json.loads(text) for text in self._gather_bytes(json.dumps(provenance).encode())]
        for index, other in enumerate(grounds):
            names = [name for name in differing_keys(grounds[0], other) if name != PER_PROCESS_KEY]
            if names:
                told = "; ".join(f"{name} is {grounds[0].get(name)}, and {other.get(name)}" for name in names)
                raise ConfigError(
                    f"all processes must train the same, but of index 0 and index {index} {told}; use the same words, "
                    "data and code"
                )
        return provenance | {
            f"{PER_PROCESS_KEY}.{index}": other[PER_PROCESS_KEY]
            for index, other in enumerate(grounds)
            if other[PER_PROCESS_KEY] != grounds[0][PER_PROCESS_KEY]
        }

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """What process 0 was called with, on all: other processors may round otherwise, and not decide otherwise."""
        return values if self.is_single else json.loads(self._broadcast_bytes(json.dumps(values).encode()))

    def broadcast_state(
        self, metadata: dict[str, Any], state: dict[str, np.ndarray]
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """What process 0 was called with, on all. state: the others' must be of the same names, shapes and types."""
        if self.is_single:
            return metadata, state
        text = self._broadcast_bytes(json.dumps(metadata).encode())
        whole = self._broadcast_bytes(b"".join(np.ascontiguousarray(value).tobytes() for value in state.values()))
        found, start = {}, 0
        for name, value in state.items():
            part = whole[start : start + value.nbytes]
            found[name], start = np.frombuffer(part, value.dtype).reshape(value.shape), start + value.nbytes
        return json.loads(text), found

    def _broadcast_bytes(self, payload: bytes) -> bytes:
        """What process 0 was called with. Sent as whole numbers: as floats, a negative nought would lose its sign."""
        from jax.experimental import multihost_utils

        gibibytes, rest = divmod(len(payload) if self.is_leader else 0, 2**30)  # there are no numbers of 64 bits
        lengths = np.asarray(multihost_utils.broadcast_one_to_all(np.array([gibibytes, rest], np.int32)))
        length = int(lengths[0]) * 2**30 + int(lengths[1])
        size = min(CHUNK_WORDS, -(-length // 4) or 1)
        parts = []
        for start in range(0, length, 4 * size):
            part = payload[start : start + 4 * size] if self.is_leader else b""
            words = np.frombuffer(part.ljust(4 * size, b"\0"), np.int32)
            parts.append(np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes())
        return b"".join(parts)[:length]

    def _gather_bytes(self, payload: bytes) -> list[bytes]:
        """What each was called with, by index."""
        from jax.experimental import multihost_utils

        lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(payload)))).reshape(-1)
        padded = np.frombuffer(payload.ljust(int(lengths.max()), b"\0"), np.uint8)
        texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.size, -1)
        return [text.tobytes()[:length] for text, length in zip(texts, lengths, strict=True)]

    @contextmanager
    def translate_connection_errors(self) -> Iterator[None]:
        """Says what it means when JAX can't reach another process any more. Raises: LostError."""
        if self.is_single:
            yield
            return
        from jax.errors import JaxRuntimeError

        try:
            yield
        except JaxRuntimeError as fault:
            if not any(word in str(fault) for word in ("Gloo", "NCCL", "coordination", "Connection")):
                raise
            raise WorkerLostError(
                f"a process of the run is gone, and this one, of index {self.index}, can't go on without it; see what "
                "the others say, then: make resume"
            ) from fault

    def shutdown(self, exit_code: int, *, all_processes: bool) -> int:
        """The exit code. with_all: when all have come here, process 0 with everything written, so that whoever starts
        processes sees either all of them at their end, or a failure and has to start all again.

        Otherwise the process ends here and at once, since JAX would wait for the others.
        """
        if self.is_single:
            return exit_code
        if all_processes:
            import jax
            from jax.experimental import multihost_utils

            try:
                with self.translate_connection_errors():
                    multihost_utils.sync_global_devices("left")
                    jax.distributed.shutdown()
                return exit_code
            except WorkerLostError as fault:
                arguments.print_error(str(fault))
                exit_code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
