"""Finished sweeps, each run once for all workers of a test session."""

from __future__ import annotations

import pytest

from support.shared import once
from support.sweeps import CompletedSweep, run_killed_sweep, run_sweep


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> CompletedSweep:
    return once(tmp_path_factory, "swept", run_sweep)


@pytest.fixture(scope="session")
def swept_twice(tmp_path_factory: pytest.TempPathFactory) -> CompletedSweep:
    return once(tmp_path_factory, "swept twice", run_killed_sweep)
