"""Runs within this process that do not upload, and that are killed at a chosen point."""

from __future__ import annotations

import pytest

from support.runs import Killed
from train.run import state
from train.tracking import uploader


@pytest.fixture
def no_uploads(monkeypatch: pytest.MonkeyPatch):
    """Runs in this process do not upload to MLflow; those of commands do."""
    monkeypatch.setattr(uploader, "start", lambda *_: None)


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch):
    """kill_at(point, number) kills the following runs at that fail point; kill_at(None) lets them run."""

    def set_point(name: str | None, number: int = 1) -> None:
        passed: dict[str, int] = {}

        def fail_point(point: str, index: int | None = None) -> None:
            passed[point] = passed.get(point, 0) + 1
            if point == name and (passed[point] if index is None else index) == number:
                raise Killed

        monkeypatch.setattr(state.fault_injection, "fail_point", fail_point)

    return set_point
