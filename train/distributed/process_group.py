"""The processes that train one model together, and their communication.

All take the same steps with the same values, each on its shard of every batch; only process 0, the leader, writes
files. They communicate through JAX, which has connected them (`train.runtime.jax.initialize`).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.cli import arguments
from train.config.compatibility import differing_keys
from train.config.schema import ROOT, ConfigError
from train.distributed import liveness
from train.storage.json_types import JsonObject

CHUNK_WORDS = 2**22  # 32-bit words per message, so that one compiled function serves all
LOSS_SECONDS = 2.0  # for the news that a process is gone to arrive, after JAX's error
PER_PROCESS_KEY = "processor"  # may differ between processes, but not between attempts


class WorkerLostError(ConnectionError):
    """Another process of the run is gone, so that the run cannot continue."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among `size`. With a single one, nothing is sent and JAX is not needed."""

    index: int
    size: int

    @property
    def is_leader(self) -> bool:
        return self.index == 0

    @property
    def is_single(self) -> bool:
        return self.size == 1

    def verify_same_config(self, provenance: JsonObject) -> JsonObject:
        """Checks that all processes have the same config, data and code; adds their processors, where they differ.

        Raises: ConfigError in all processes, naming the differences.
        """
        if self.is_single:
            return provenance
        provenances = [json.loads(text) for text in self._gather_bytes(json.dumps(provenance).encode())]
        leader = provenances[0]
        for index, other in enumerate(provenances):
            names = [name for name in differing_keys(leader, other) if name != PER_PROCESS_KEY]
            if names:
                differences = "; ".join(f"{name} is {leader.get(name)} and {other.get(name)}" for name in names)
                raise ConfigError(
                    f"processes 0 and {index} differ: {differences}; start all processes with the same settings, data "
                    "and code"
                )
        return provenance | {
            f"{PER_PROCESS_KEY}.{index}": other[PER_PROCESS_KEY]
            for index, other in enumerate(provenances)
            if other[PER_PROCESS_KEY] != leader[PER_PROCESS_KEY]
        }

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Process 0's values, on all: processors may round differently, but must decide the same."""
        return values if self.is_single else json.loads(self._broadcast_bytes(json.dumps(values).encode()))

    def broadcast_state(
        self, metadata: JsonObject, state: dict[str, np.ndarray]
    ) -> tuple[JsonObject, dict[str, np.ndarray]]:
        """Process 0's arguments, on all. state: must have the same names, shapes and dtypes on all."""
        if self.is_single:
            return metadata, state
        metadata_json = self._broadcast_bytes(json.dumps(metadata).encode())
        payload = self._broadcast_bytes(b"".join(np.ascontiguousarray(value).tobytes() for value in state.values()))
        received: dict[str, np.ndarray] = {}
        start = 0
        for name, value in state.items():
            end = start + value.nbytes
            received[name] = np.frombuffer(payload[start:end], value.dtype).reshape(value.shape)
            start = end
        return json.loads(metadata_json), received

    def _broadcast_bytes(self, payload: bytes) -> bytes:
        """Process 0's payload, on all. It is sent as integers: as floats, a negative zero would lose its sign."""
        from jax.experimental import multihost_utils

        gibibytes, rest = divmod(len(payload) if self.is_leader else 0, 2**30)  # JAX has no 64-bit integers by default
        lengths = np.asarray(multihost_utils.broadcast_one_to_all(np.array([gibibytes, rest], np.int32)))
        length = int(lengths[0]) * 2**30 + int(lengths[1])
        size = min(CHUNK_WORDS, -(-length // 4) or 1)
        chunks = []
        for start in range(0, length, 4 * size):
            chunk = payload[start : start + 4 * size] if self.is_leader else b""
            integers = np.frombuffer(chunk.ljust(4 * size, b"\0"), np.int32)
            chunks.append(np.asarray(multihost_utils.broadcast_one_to_all(integers)).tobytes())
        return b"".join(chunks)[:length]

    def _gather_bytes(self, payload: bytes) -> list[bytes]:
        """The payloads of all processes, by index."""
        from jax.experimental import multihost_utils

        lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(payload)))).reshape(-1)
        padded = np.frombuffer(payload.ljust(int(lengths.max()), b"\0"), np.uint8)
        texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.size, -1)
        return [text.tobytes()[:length] for text, length in zip(texts, lengths, strict=True)]

    @contextmanager
    def translate_connection_errors(self) -> Iterator[None]:
        """Turns JAX's error, where it is due to a process that is gone, into a message. Raises: WorkerLostError.

        JAX raises its own type for an asynchronous function, and ValueError itself for one that runs at once.
        """
        if self.is_single:
            yield
            return
        from jax.errors import JaxRuntimeError

        try:
            yield
        except (JaxRuntimeError, ValueError) as error:
            if type(error) not in (JaxRuntimeError, ValueError) or _is_raised_here(error):
                raise
            if not liveness.is_peer_lost(timeout=LOSS_SECONDS):
                liveness.leave()  # this process has failed: the others must not wait for it
                raise
            raise WorkerLostError(
                "lost contact with another process; see its log, then run make resume run=FOLDER for each process"
            ) from error

    def shutdown(self, exit_code: int, *, all_processes: bool) -> int:
        """Leaves the group; returns the exit code. all_processes: waits until all are here and process 0 has written
        everything, so that a launcher sees either all of them succeed, or a failure after which it restarts all.

        Otherwise, or on failure, the process exits here at once, since JAX would wait for the others.
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
            except WorkerLostError as error:
                arguments.print_error(str(error))
                exit_code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _is_raised_here(error: Exception) -> bool:
    """Whether this project's own code raised the error: JAX raises ValueError, too, if a process is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "train")
