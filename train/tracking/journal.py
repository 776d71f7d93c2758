"""The journal `metrics.jsonl`, one line per logged step: the truth about a run, on disk before MLflow hears of it.

    {"epoch": 0, "step": 40, "time": 1780000000.0, "values": {"train/loss": 2.3, ...}, "branch": [0, 1]}

`branch` counts accepted changes of the config and rollbacks, and is left out while both are 0. Lines of a later branch
stand in the place of those of an earlier one with the same steps, which stay.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.storage import fault_injection
from train.storage.atomic import fsync_folder, open_inside, read_inside

log = logging.getLogger(__name__)

NONDETERMINISTIC = (
    "images_per_second",
    "data_wait_fraction",
    "cost/peak_memory_bytes",
)  # differ between two equal runs
INITIAL_BRANCH = (0, 0)


class ReplayError(ArithmeticError):
    """A step that was done again gave other numbers."""


class Journal:
    """Adds lines. Those that an earlier life has written are compared and not written again."""

    def __init__(self, path: Path):
        """Cuts off a last line that was being written when the machine went down."""
        self.path = path
        self.position, self.branch = 0, INITIAL_BRANCH  # where we stand: behind so many of the file's lines
        self._replay_queue: deque[tuple[int, dict[str, Any]]] = deque()  # lines of earlier lives, with their numbers
        self._compare = True
        self._line_count = 0
        if path.exists():
            _truncate_partial_line(path)
            self.seek(0, INITIAL_BRANCH, compare=True)

    def seek(self, position: int, branch: tuple[int, int], *, compare: bool) -> None:
        """From behind the first `lines` lines, on `branch`; its lines behind there were written by an earlier life.

        `compare`: whether the same bits must come again.

        Raises: ValueError if the journal has fewer lines.
        """
        known = [line for line, _ in read_journal(self.path)]
        if position > len(known):
            raise ValueError(
                f"{self.path} must have the {position} lines that the checkpoint knows, got {len(known)}; put it back"
            )
        self.position, self.branch, self._compare, self._line_count = position, branch, compare, len(known)
        self._replay_queue = deque(
            (number, line)
            for number, line in enumerate(known)
            if number >= position and tuple(line.get("branch", INITIAL_BRANCH)) == branch
        )

    def append(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Has a line on disk before returning.

        Raises: ReplayError naming the step, if an earlier life found other numbers there; OSError.
        """
        line: dict[str, Any] = {"epoch": epoch, "step": step, "time": time.time(), "values": values}
        if self.branch != INITIAL_BRANCH:
            line["branch"] = list(self.branch)
        if self._replay_queue and not self._compare and _line_key(self._replay_queue[0][1]) != _line_key(line):
            self._replay_queue.clear()  # other bits took another way, such as stopping earlier
        if self._replay_queue:
            number, earlier = self._replay_queue.popleft()
            if self._compare:
                _check_identical(earlier, line)
            self.position = number + 1
        else:
            _append_line(self.path, (json.dumps(line) + "\n").encode())
            self._line_count += 1
            self.position = self._line_count
        fault_injection.fail_point("journal")


def _append_line(path: Path, line: bytes) -> None:
    """The whole line, or nothing of it where the disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
            if not size:
                fsync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def _truncate_partial_line(path: Path) -> None:
    content = read_inside(path.parent, path.name)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("the last line of %s was being written when the run died, and is cut off", path)
        os.truncate(path, whole)


def _line_key(line: dict[str, Any]) -> tuple[int, int, set[str]]:
    return line["epoch"], line["step"], set(line["values"])


def _check_identical(recorded: dict[str, Any], replayed: dict[str, Any]) -> None:
    """What is a function of config, data and code must come again to the last bit; times and rates need not."""
    before, after = comparable(recorded), comparable(replayed)
    if before == after:
        return
    where = f"epoch {replayed['epoch'] + 1} at step {replayed['step']}"
    if before[:2] != after[:2]:
        what = f"the journal goes on at epoch {recorded['epoch'] + 1}, step {recorded['step']}"
    else:
        names = sorted(name for name in {*before[2], *after[2]} if before[2].get(name) != after[2].get(name))
        what = f"{names[0]} was {before[2].get(names[0])}, is {after[2].get(names[0])}"
    raise ReplayError(
        f"a step that is done again must give the same bits, but in {where} {what}; "
        "another machine, driver or library? see train.log"
    )


def comparable(line: dict[str, Any]) -> tuple[int, int, dict[str, str]]:
    """Epoch, step and the values that two equal runs have in common, as texts: a number that is none equals itself."""
    values = {name: json.dumps(value) for name, value in line["values"].items() if name not in NONDETERMINISTIC}
    return line["epoch"], line["step"], values


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from byte `offset` on, each with the offset behind it; a line being written is left for later.

    Raises: ValueError naming the place of a line that is no JSON.
    """
    if not path.exists():
        return
    with open_inside(path.parent, path.name) as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except ValueError:
                raise ValueError(f"{path} must hold JSON lines, got {line[:80]!r} at byte {offset}") from None
            offset += len(line)
            yield found, offset
