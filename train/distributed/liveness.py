"""Tells whether the other processes of the run are there, by the connections that the rendezvous made.

They stay open and carry nothing. The kernel closes a process's connections when it ends, however it ends, so that
one that closes is a process that is gone. JAX does not say so: the type of its error depends on how the function ran.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait


class PeerMonitor:
    """Watches the connections of this process. Process 0 is connected to all others, each of them to process 0."""

    def __init__(self, connections: Sequence[Connection]):
        self._connections = connections
        self._lost = threading.Event()
        self._stop, self._running = Pipe(duplex=False)
        threading.Thread(target=self._watch, daemon=True, name="peer-monitor").start()

    def is_peer_lost(self, timeout: float) -> bool:
        """Whether a process is gone; waits for the news, which may come a moment after JAX's error."""
        return self._lost.wait(timeout)

    def leave(self) -> None:
        """Tells the others that this process will not go on, before it ends."""
        self._running.close()

    def _watch(self) -> None:
        wait([*self._connections, self._stop])  # nothing is sent, so one that is readable has been closed
        for connection in self._connections:  # the loss of a worker is passed on: the others know only process 0
            connection.close()
        self._lost.set()


_monitor: PeerMonitor | None = None  # one for a process, like JAX's own connection


def watch(connections: Sequence[Connection]) -> None:
    """Starts to watch; call it once, after the rendezvous."""
    global _monitor
    _monitor = PeerMonitor(connections)


def is_peer_lost(timeout: float) -> bool:
    """Whether a process is gone; waits up to `timeout` seconds for that."""
    return _monitor is not None and _monitor.is_peer_lost(timeout)


def leave() -> None:
    """Tells the others that this process will not go on."""
    if _monitor is not None:
        _monitor.leave()
