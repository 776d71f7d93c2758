"""Hyperparameters that all baselines share, and the format of their results."""

from __future__ import annotations

import json
from pathlib import Path

AUX_WEIGHT, LEARNING_RATE, MOMENTUM = 0.3, 0.01, 0.9
TOLERANCE = 1e-3  # for logits of about 1, after a hundred layers with another order of summation
WARM_UP = 2  # steps that are not timed


def check_parity(worst: float) -> None:
    """Raises: AssertionError if the logits differ by more than rounding."""
    assert worst < TOLERANCE, f"logits differ by {worst}"


def print_results(
    batch: int, ends: list[float], *, start: float, worst: float | None, memory: int | None = None
) -> None:
    """Prints the results as one line of JSON. ends: end time of each step; start: start of the program, in seconds.

    worst: the largest difference in the logits, if checked. memory: peak bytes of the device; None: of the process.
    """
    timed = len(ends) - WARM_UP
    results = {
        "images_per_second": batch * timed / (ends[-1] - ends[WARM_UP - 1]) if timed else None,
        "first_step_seconds": ends[0] - start,
        "peak_memory_bytes": peak_memory() if memory is None else memory,
        "worst_difference": worst,
    }
    print(json.dumps(results))


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
