"""Points at which the tests let a run die; without INCEPTION_FAULT, which nobody else sets, they do nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

ASKED = "INCEPTION_FAULT"  # POINT:NUMBER[:SECONDS]

_passed: Counter[str] = Counter()


def point(name: str, number: int | None = None) -> None:
    """Kills the process with SIGKILL if it was asked to die here.

    `number`: which passing this is; by default they are counted. With SECONDS it dies so much later, wherever it is
    then.
    """
    asked = os.environ.get(ASKED)
    if asked is None:
        return
    _passed[name] += 1
    where, at, *delay = asked.split(":")
    if (where, int(at)) != (name, _passed[name] if number is None else number):
        return
    if delay:
        threading.Timer(float(delay[0]), _die).start()
    else:
        _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
