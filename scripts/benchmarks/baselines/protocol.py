"""What all peers train with, and how they tell what they found."""

from __future__ import annotations

import json
from pathlib import Path

AUX_WEIGHT, LEARNING_RATE, MOMENTUM = 0.3, 0.01, 0.9
TOLERANCE = 1e-3  # of logits of about 1, after a hundred layers in another order of summation
WARM_UP = 2  # steps that are not timed


def agree(worst: float) -> None:
    """Raises: AssertionError where the logits differ by more than rounding."""
    assert worst < TOLERANCE, f"logits differ by {worst}"


def tell(batch: int, ends: list[float], *, begun: float, worst: float | None, memory: int | None = None) -> None:
    """One line of JSON. ends: when each step was over, and `begun` when the program was started, in seconds.

    worst: the largest difference in the logits, where it was looked at; memory: bytes, those of the process where the
    device has none of its own.
    """
    timed = len(ends) - WARM_UP
    found = {
        "images_per_second": batch * timed / (ends[-1] - ends[WARM_UP - 1]) if timed else None,
        "first_step_seconds": ends[0] - begun,
        "peak_memory_bytes": peak_memory() if memory is None else memory,
        "worst_difference": worst,
    }
    print(json.dumps(found))


def peak_memory() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
