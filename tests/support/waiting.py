"""Waiting for what another process does."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address: str) -> bytes:
    """The body of the response of a URL; empty if it cannot be reached."""
    try:
        return urllib.request.urlopen(address, timeout=5).read()
    except OSError:
        return b""


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Fail unless the condition becomes true in a time that is generous on any machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.1)


def happens_within(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for the condition; whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())
