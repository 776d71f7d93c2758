"""Points at which the tests let a run die; without INCEPTION_FAULT, which nobody else sets, they do nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

FAULT_VARIABLE = "INCEPTION_FAULT"  # POINT:NUMBER[:SECONDS]

_pass_counts: Counter[str] = Counter()


def fail_point(name: str, occurrence: int | None = None) -> None:
    """Kills the process with SIGKILL if it was asked to die here.

    `number`: which passing this is; by default they are counted. With SECONDS it dies so much later, wherever it is
    then.
    """
    asked = os.environ.get(FAULT_VARIABLE)
    if asked is None:
        return
    _pass_counts[name] += 1
    where, at, *delay = asked.split(":")
    if (where, int(at)) != (name, _pass_counts[name] if occurrence is None else occurrence):
        return
    if delay:
        threading.Timer(float(delay[0]), _kill_process).start()
    else:
        _kill_process()


def _kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
