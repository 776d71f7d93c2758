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
from train.config.compatibility import changed
from train.config.schema import Config, ConfigError

PART = 2**22  # 32-bit words that are sent at a time, so that one compiled function does for all
OWN = "processor"  # may differ from process to process, but not from life to life


class LostError(ConnectionError):
    """Another process of the run is gone, and with it the run."""


@dataclass(frozen=True)
class Team:
    """One of `size` processes. With one, nothing is sent and JAX is not needed."""

    index: int
    size: int

    @classmethod
    def of(cls, config: Config) -> Team:
        return cls(config.distributed.index, config.distributed.processes)

    @property
    def leads(self) -> bool:
        return self.index == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def agree(self, ground: dict[str, Any]) -> dict[str, Any]:
        """All have the same config, data and code; what the run of all stands on: other processors by index, too.

        Raises: ConfigError in all processes, naming what differs.
        """
        if self.alone:
            return ground
        grounds = [json.loads(text) for text in self._gather(json.dumps(ground).encode())]
        for index, other in enumerate(grounds):
            names = [name for name in changed(grounds[0], other) if name != OWN]
            if names:
                told = "; ".join(f"{name} is {grounds[0].get(name)}, and {other.get(name)}" for name in names)
                raise ConfigError(
                    f"all processes must train the same, but of index 0 and index {index} {told}; use the same words, "
                    "data and code"
                )
        return ground | {
            f"{OWN}.{index}": other[OWN] for index, other in enumerate(grounds) if other[OWN] != grounds[0][OWN]
        }

    def heed(self, values: dict[str, float]) -> dict[str, float]:
        """What process 0 was called with, on all: other processors may round otherwise, and not decide otherwise."""
        return values if self.alone else json.loads(self._sent(json.dumps(values).encode()))

    def share(self, content: dict[str, Any], state: dict[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
        """What process 0 was called with, on all. state: the others' must be of the same names, shapes and types."""
        if self.alone:
            return content, state
        text = self._sent(json.dumps(content).encode())
        whole = self._sent(b"".join(np.ascontiguousarray(value).tobytes() for value in state.values()))
        found, start = {}, 0
        for name, value in state.items():
            part = whole[start : start + value.nbytes]
            found[name], start = np.frombuffer(part, value.dtype).reshape(value.shape), start + value.nbytes
        return json.loads(text), found

    def _sent(self, own: bytes) -> bytes:
        """What process 0 was called with. Sent as whole numbers: as floats, a negative nought would lose its sign."""
        from jax.experimental import multihost_utils

        gibibytes, rest = divmod(len(own) if self.leads else 0, 2**30)  # there are no numbers of 64 bits
        lengths = np.asarray(multihost_utils.broadcast_one_to_all(np.array([gibibytes, rest], np.int32)))
        length = int(lengths[0]) * 2**30 + int(lengths[1])
        size = min(PART, -(-length // 4) or 1)
        parts = []
        for start in range(0, length, 4 * size):
            part = own[start : start + 4 * size] if self.leads else b""
            words = np.frombuffer(part.ljust(4 * size, b"\0"), np.int32)
            parts.append(np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes())
        return b"".join(parts)[:length]

    def _gather(self, own: bytes) -> list[bytes]:
        """What each was called with, by index."""
        from jax.experimental import multihost_utils

        lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(own)))).reshape(-1)
        padded = np.frombuffer(own.ljust(int(lengths.max()), b"\0"), np.uint8)
        texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.size, -1)
        return [text.tobytes()[:length] for text, length in zip(texts, lengths, strict=True)]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Says what it means when JAX can't reach another process any more. Raises: LostError."""
        if self.alone:
            yield
            return
        from jax.errors import JaxRuntimeError

        try:
            yield
        except JaxRuntimeError as fault:
            if not any(word in str(fault) for word in ("Gloo", "NCCL", "coordination", "Connection")):
                raise
            raise LostError(
                f"a process of the run is gone, and this one, of index {self.index}, can't go on without it; see what "
                "the others say, then: make resume"
            ) from fault

    def leave(self, code: int, *, with_all: bool) -> int:
        """The exit code. with_all: when all have come here, process 0 with everything written, so that whoever starts
        processes sees either all of them at their end, or a failure and has to start all again.

        Otherwise the process ends here and at once, since JAX would wait for the others.
        """
        if self.alone:
            return code
        if with_all:
            import jax
            from jax.experimental import multihost_utils

            try:
                with self.holding():
                    multihost_utils.sync_global_devices("left")
                    jax.distributed.shutdown()
                return code
            except LostError as fault:
                arguments.tell(str(fault))
                code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
