"""Throughput of the training loop, and the time it waits for data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepTimer:
    """Images trained on, the time that took, and how much of it was spent waiting for data.

    The first step of an attempt is excluded.
    """

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def data_wait_fraction(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def add(self, other: StepTimer) -> None:
        self.images += other.images
        self.seconds += other.seconds
        self.wait_seconds += other.wait_seconds
