"""The journal: lines survive a kill, a torn line is cut off, and replayed lines are compared."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

import pytest

from support.checkpoints import logged_warnings
from support.commands import run_command
from train.tracking.journal import INITIAL_BRANCH, Journal, ReplayError, read_journal

LINES: list[tuple[int, int, dict[str, float]]] = [
    (0, 0, {"cost/parameters": 1000}),
    (0, 5, {"train/loss": 2.3, "learning_rate": 0.1, "images_per_second": 50.0}),
    (0, 10, {"train/loss": 0.1 + 0.2, "validation/loss": math.nan, "data_wait_fraction": 0.5}),
    (1, 15, {"train/loss": 1e-300, "validation/loss": math.inf}),
]


def write_journal(path: Path, lines: list[tuple[int, int, dict[str, float]]] = LINES) -> Journal:
    journal = Journal(path)
    for epoch, step, values in lines:
        journal.append(epoch, step, values)
    return journal


def journal_steps(path: Path) -> list[int]:
    return [line["step"] for line, _ in read_journal(path)]


def test_appended_line_is_on_disk(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal, start = Journal(path), time.time()
    for number, (epoch, step, values) in enumerate(LINES, 1):
        journal.append(epoch, step, values)
        assert journal.position == len(path.read_text().splitlines()) == number
    lines = [line for line, _ in read_journal(path)]
    assert [(line["epoch"], line["step"], json.dumps(line["values"])) for line in lines] == [
        (epoch, step, json.dumps(values)) for epoch, step, values in LINES
    ]
    assert all(line.keys() == {"epoch", "step", "time", "values"} for line in lines)
    assert start <= lines[0]["time"] <= lines[-1]["time"] <= time.time()


def test_torn_last_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_journal(tmp_path / "whole")
    content, path = (tmp_path / "whole").read_bytes(), tmp_path / "metrics.jsonl"
    last = content.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(content)):
        caplog.clear()
        path.write_bytes(content[:cut])
        assert journal_steps(path) == [0, 5, 10]  # what another process reads meanwhile
        journal = Journal(path)
        assert path.read_bytes() == content[:last]
        torn = f"removed an incomplete last line from {path}: the run died while writing it"
        assert logged_warnings(caplog) == ([torn] if cut > last else [])
    journal.seek(3, INITIAL_BRANCH, compare=True)
    journal.append(*LINES[3])
    assert journal_steps(path) == [0, 5, 10, 15]


def test_journal_of_only_a_torn_line_starts_empty(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0, "st')
    write_journal(path, LINES[:1])
    assert journal_steps(path) == [0]


def test_appended_lines_survive_a_kill(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom train.tracking.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\nfor step in range(9): journal.append(0, step, {'loss': 1.5})"
    )
    path = tmp_path / "metrics.jsonl"
    done = run_command(sys.executable, "-c", code, str(path), env={"INCEPTION_FAULT": "journal:3"})
    assert done.code == -signal.SIGKILL, done.err
    assert journal_steps(path) == [0, 1, 2]


def test_replayed_lines_are_compared_and_not_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_journal(path)
    before = path.read_bytes()
    journal = write_journal(path)  # the same run, from the start
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {"train/loss": 1.0})
    assert path.read_bytes().startswith(before)
    assert (journal_steps(path), journal.position) == ([0, 5, 10, 15, 20], 5)


@pytest.mark.parametrize("lines", range(5))
def test_resumed_journal_continues_after_the_lines_of_its_checkpoint(lines: int, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_journal(path)
    before = path.read_bytes()
    journal = Journal(path)
    journal.seek(lines, INITIAL_BRANCH, compare=True)
    at = [journal.position]
    for line in LINES[lines:]:
        journal.append(*line)
        at.append(journal.position)
    assert at == list(range(lines, 5))
    assert path.read_bytes() == before
    journal.append(1, 20, {})
    assert journal_steps(path) == [0, 5, 10, 15, 20]


DIFFERENT = {
    "a value": (
        (0, 5, {"train/loss": 2.4, "learning_rate": 0.1}),
        "step 5 (epoch 1) gave train/loss 2.4, the journal has 2.3;",
    ),
    "one ulp": (
        (0, 5, {"train/loss": math.nextafter(2.3, 3), "learning_rate": 0.1}),
        "step 5 (epoch 1) gave train/loss 2.3000000000000003, the journal has 2.3;",
    ),
    "not a number": (
        (0, 5, {"train/loss": math.nan, "learning_rate": 0.1}),
        "step 5 (epoch 1) gave train/loss NaN, the journal has 2.3;",
    ),
    "a value missing": (
        (0, 5, {"train/loss": 2.3}),
        "step 5 (epoch 1) gave learning_rate None, the journal has 0.1;",
    ),
    "a value more": (
        (0, 5, {"train/loss": 2.3, "learning_rate": 0.1, "train/top5": 0.5}),
        "step 5 (epoch 1) gave train/top5 0.5, the journal has None;",
    ),
    "the step": (
        (0, 6, {"train/loss": 2.3, "learning_rate": 0.1}),
        "gave step 6 (epoch 1), the journal has step 5 (epoch 1);",
    ),
    "the epoch": (
        (1, 5, {"train/loss": 2.3, "learning_rate": 0.1}),
        "gave step 5 (epoch 2), the journal has step 5 (epoch 1);",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_differing_replay_is_rejected(what: str, tmp_path: Path):
    path, (line, message) = tmp_path / "metrics.jsonl", DIFFERENT[what]
    write_journal(path)
    before = path.read_bytes()
    journal = write_journal(path, LINES[:1])
    with pytest.raises(ReplayError) as refused:
        journal.append(*line)
    assert str(refused.value) == (f"not reproducible: replaying {message} did the machine, driver or a library change?")
    assert path.read_bytes() == before


def test_times_and_rates_may_differ(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    timed_names = ("images_per_second", "data_wait_fraction", "cost/peak_memory_bytes")
    write_journal(path, [(0, 5, {"train/loss": 2.3, **dict.fromkeys(timed_names, 1.0)})])
    before = path.read_bytes()
    for timed in (dict.fromkeys(timed_names, 2.0), dict.fromkeys(timed_names, math.nan), {}):
        write_journal(path, [(0, 5, {"train/loss": 2.3, **timed})])
        assert path.read_bytes() == before


def test_existing_line_is_kept_without_comparison(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_journal(path)
    before = path.read_bytes()
    journal = Journal(path)
    journal.seek(1, INITIAL_BRANCH, compare=False)
    for epoch, step, values in LINES[1:]:
        journal.append(epoch, step, dict.fromkeys(values, 0.0))
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {"train/loss": 0.0})
    assert journal_steps(path) == [0, 5, 10, 15, 20]


def test_new_step_is_written_without_comparison(tmp_path: Path):
    """For example, a run that stops earlier than in its previous attempt: its last line must not be lost."""
    path = tmp_path / "metrics.jsonl"
    write_journal(path)
    journal = Journal(path)
    journal.seek(1, INITIAL_BRANCH, compare=False)
    journal.append(0, LINES[1][1], {"test/loss": 0.5})
    assert [line["values"] for line, _ in read_journal(path)][-1] == {"test/loss": 0.5}
    assert len(journal_steps(path)) == len(LINES) + 1


def test_branch_appends_its_own_lines(tmp_path: Path):
    path, once, twice = tmp_path / "metrics.jsonl", (0, 1), (0, 2)
    journal = write_journal(path)
    journal.seek(2, once, compare=True)
    assert journal.position == 2
    journal.append(0, 10, {"train/loss": 7.0})
    assert journal.position == 5
    journal.seek(2, twice, compare=True)
    journal.append(0, 10, {"train/loss": 8.0})
    before = path.read_bytes()
    lines = [line for line, _ in read_journal(path)]
    assert [line.get("branch") for line in lines] == [None] * 4 + [[0, 1], [0, 2]]

    # Each attempt compares with the lines of the same branch only.
    for branch, loss, behind in ((once, 7.0, 5), (twice, 8.0, 6)):
        journal = Journal(path)
        journal.seek(2, branch, compare=True)
        journal.append(0, 10, {"train/loss": loss})
        assert (path.read_bytes(), journal.position) == (before, behind)
        journal.seek(2, branch, compare=True)
        with pytest.raises(ReplayError, match=rf"gave train/loss 9\.0, the journal has {loss};"):
            journal.append(0, 10, {"train/loss": 9.0})
    journal.seek(2, INITIAL_BRANCH, compare=True)
    for line in LINES[2:]:
        journal.append(*line)
    assert (path.read_bytes(), journal.position) == (before, 4)
    journal.append(1, 20, {})
    assert (path.read_bytes()[: len(before)], journal.position) == (before, 7)


def test_journal_with_fewer_lines_than_the_checkpoint_is_rejected(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = write_journal(path)
    with pytest.raises(ValueError) as refused:
        journal.seek(5, INITIAL_BRANCH, compare=True)
    assert str(refused.value) == f"{path} has 4 lines, but the checkpoint was saved after line 5; restore the journal"
    path.unlink()
    with pytest.raises(ValueError, match="has 0 lines, but the checkpoint was saved after line 1; restore the journal"):
        Journal(path).seek(1, INITIAL_BRANCH, compare=True)


def test_broken_line_in_the_middle_is_named_with_its_offset(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_journal(path)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    path.write_bytes(content[:start] + b"#" + content[start + 1 :])
    with pytest.raises(ValueError) as refused:
        Journal(path)
    shown = b"#" + content[start + 1 : start + 80]
    assert str(refused.value) == f"{path} is not valid JSON at byte {start}: {shown!r}; restore the journal"
    assert path.read_bytes()[start : start + 1] == b"#"


def test_reader_continues_from_an_offset(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = write_journal(path, LINES[:2])
    behind = [offset for _, offset in read_journal(path)]
    assert behind[-1] == path.stat().st_size
    journal.append(*LINES[2])
    assert [line["step"] for line, _ in read_journal(path, behind[-1])] == [10]
    assert [line["step"] for line, _ in read_journal(path, behind[0])] == [5, 10]
