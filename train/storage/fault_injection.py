"""Points at which tests kill a run; they do nothing unless INCEPTION_FAULT is set, which only tests do."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

FAULT_VARIABLE = "INCEPTION_FAULT"  # POINT:OCCURRENCE[:SECONDS]

_pass_counts: Counter[str] = Counter()


def fail_point(name: str, occurrence: int | None = None) -> None:
    """Kills the process with SIGKILL if INCEPTION_FAULT names this point and occurrence, or SECONDS later.

    `occurrence`: the number of this pass; by default the passes are counted.
    """
    fault = os.environ.get(FAULT_VARIABLE)
    if fault is None:
        return
    _pass_counts[name] += 1
    point, number, *delay = fault.split(":")
    if (point, int(number)) != (name, _pass_counts[name] if occurrence is None else occurrence):
        return
    if delay:
        threading.Timer(float(delay[0]), _kill_process).start()
    else:
        _kill_process()


def _kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
