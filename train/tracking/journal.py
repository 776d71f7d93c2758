"""The journal `metrics.jsonl`, one line per logged step: the source of truth, on disk before anything reaches MLflow.

    {"epoch": 0, "step": 40, "time": 1780000000.0, "values": {"train/loss": 2.3, ...}, "branch": [0, 1]}

`branch` counts accepted config changes and rollbacks, and is omitted while both are 0. Lines of a later branch
supersede those of an earlier branch with the same steps, which are kept.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from train.storage import fault_injection
from train.storage.atomic import append_and_fsync, open_inside, read_inside
from train.storage.json_types import JsonObject

log = logging.getLogger(__name__)

# Metrics that differ between two otherwise identical runs.
NONDETERMINISTIC = ("images_per_second", "data_wait_fraction", "cost/peak_memory_bytes")
INITIAL_BRANCH = (0, 0)


class ReplayError(ArithmeticError):
    """A replayed step gave different values."""


class Journal:
    """Appends lines. A line that an earlier attempt has written already is compared instead."""

    def __init__(self, path: Path):
        """Opens the journal and removes an incomplete last line, as a crash leaves it."""
        self.path = path
        self.position = 0  # number of lines of the file that precede the next one
        self.branch = INITIAL_BRANCH
        self._replay_queue: deque[tuple[int, JsonObject]] = deque()  # (line number, line) of earlier attempts
        self._compare = True
        self._line_count = 0
        if path.exists():
            _truncate_partial_line(path)
            self.seek(0, INITIAL_BRANCH, compare=True)

    def seek(self, position: int, branch: tuple[int, int], *, compare: bool) -> None:
        """Continues after the first `position` lines, on `branch`; later lines of it are those of an earlier attempt.

        `compare`: whether replayed steps must give the same bits.

        Raises: ValueError if the journal has fewer lines.
        """
        lines = [line for line, _ in read_journal(self.path)]
        if position > len(lines):
            raise ValueError(
                f"{self.path} has {len(lines)} lines, but the checkpoint was saved after line {position}; "
                "restore the journal"
            )
        self.position = position
        self.branch = branch
        self._compare = compare
        self._line_count = len(lines)
        self._replay_queue = deque(
            (number, line)
            for number, line in enumerate(lines)
            if number >= position and tuple(line.get("branch", INITIAL_BRANCH)) == branch
        )

    def append(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Writes a line, which is on disk when this returns, or compares it with that of an earlier attempt.

        Raises: ReplayError naming the step, if the earlier attempt has other values there; OSError.
        """
        line: JsonObject = {"epoch": epoch, "step": step, "time": time.time(), "values": values}
        if self.branch != INITIAL_BRANCH:
            line["branch"] = list(self.branch)
        if self._replay_queue and not self._compare and _line_key(self._replay_queue[0][1]) != _line_key(line):
            self._replay_queue.clear()  # other bits may take another course, such as stopping earlier
        if self._replay_queue:
            number, earlier = self._replay_queue.popleft()
            if self._compare:
                _check_identical(earlier, line)
            self.position = number + 1
        else:
            append_and_fsync(self.path, (json.dumps(line) + "\n").encode())
            self._line_count += 1
            self.position = self._line_count
        fault_injection.fail_point("journal")


def _truncate_partial_line(path: Path) -> None:
    content = read_inside(path.parent, path.name)
    end = content.rfind(b"\n") + 1
    if end < len(content):
        log.warning("removed an incomplete last line from %s: the run died while writing it", path)
        os.truncate(path, end)


def _line_key(line: JsonObject) -> tuple[int, int, set[str]]:
    return line["epoch"], line["step"], set(line["values"])


def _check_identical(recorded: JsonObject, replayed: JsonObject) -> None:
    """Raises: ReplayError unless every value that config, data and code determine is the same, to the last bit."""
    *recorded_step, recorded_values = comparable(recorded)
    *replayed_step, replayed_values = comparable(replayed)
    if recorded_step != replayed_step:
        difference = f"gave {_describe_step(replayed)}, the journal has {_describe_step(recorded)}"
    elif recorded_values != replayed_values:
        names = {*recorded_values, *replayed_values}
        name = min(name for name in names if recorded_values.get(name) != replayed_values.get(name))
        difference = (
            f"{_describe_step(replayed)} gave {name} {replayed_values.get(name)}, "
            f"the journal has {recorded_values.get(name)}"
        )
    else:
        return
    raise ReplayError(f"not reproducible: replaying {difference}; did the machine, driver or a library change?")


def _describe_step(line: JsonObject) -> str:
    return f"step {line['step']} (epoch {line['epoch'] + 1})"


def comparable(line: JsonObject) -> tuple[int, int, dict[str, str]]:
    """Epoch, step and the values that two equal runs share, as JSON texts, so that NaN equals itself."""
    values = {name: json.dumps(value) for name, value in line["values"].items() if name not in NONDETERMINISTIC}
    return line["epoch"], line["step"], values


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[JsonObject, int]]:
    """Yields the complete lines from byte `offset` on, each with the offset of its end; skips one still being written.

    Raises: ValueError naming the byte at which a line is not JSON.
    """
    if not path.exists():
        return
    with open_inside(path.parent, path.name) as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{path} is not valid JSON at byte {offset}: {line[:80]!r}; restore the journal"
                ) from None
            offset += len(line)
            yield record, offset
