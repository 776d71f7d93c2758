"""A state of every type and shape, checkpoints of it, and what a folder contains."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest

from train.training.checkpoint import CheckpointManager
from train.training.loop import Progress

# Every type that a network's state has, and the shapes and values at which a copy may go wrong.
STATE: dict[str, np.ndarray] = {
    "model/conv/kernel": np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32),
    "model/bits": np.frombuffer(struct.pack("<4I", 0x7FC00001, 0x80000000, 1, 0xFF800000), np.float32),
    "model/half": np.array([65504, -0.0, 6e-8], np.float16),
    "optimizer/iteration": np.array(2**62 + 1, np.int64),
    "seed/state": np.array([2**32 - 1, 0], np.uint32),
    "model/turned": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "model/every_other": np.arange(10, dtype=np.int64)[::2],
    "model/flags": np.array([True, False]),
    "empty": np.empty((0, 7), np.float32),
    "scalar": np.array(1.5, np.float32),
}
CONTENT = {
    "run_id": "f00d",
    "progress": {
        "epoch": 1,
        "steps": 40,
        "best_accuracy": 0.1 + 0.2,
        "best_loss": 0.5,
        "best_metric": None,
        "stopped_early": False,
    },
    "journal_lines": 7,
    "provenance": {"model.blocks": ["conv_bn", "inception_v1"], "tracking.experiment": "grün ☃"},
}


def checkpoint_name(epoch: int, batch: int = 0) -> str:
    return Progress(epoch=epoch, batch=batch).checkpoint_name


def save_checkpoint(folder: Path, epoch: int, keep: int = 9, **arrays: np.ndarray) -> Path:
    """Writes one checkpoint with a manager of its own."""
    manager = CheckpointManager(folder, keep)
    manager.save(checkpoint_name(epoch), arrays or STATE, CONTENT | {"epoch": epoch})
    manager.close()
    return folder / checkpoint_name(epoch)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logged_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
