"""The run folder: its heartbeat, its locks, its status, and the newest unfinished run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from support.commands import ROOT, run_command
from train.storage.atomic import replace_symlink
from train.tracking.run_dir import Heartbeat, RunDir, latest_unfinished

# ------------------------------------------------------------------------------------------------------- heartbeat


def test_heartbeat_counts_steps_and_attempts_over_all_attempts(tmp_path: Path):
    path, counted = tmp_path / "heartbeat", []
    for beats in (3, 0, 4):
        heartbeat = Heartbeat(path)
        for _ in range(beats):
            heartbeat.tick()
        counted.append((heartbeat.steps, heartbeat.attempts, path.read_text().split()))
        heartbeat.close()
    assert counted == [(3, 1, ["3", "1"]), (3, 2, ["3", "2"]), (7, 3, ["7", "3"])]


def test_heartbeat_is_raised_to_the_steps_of_the_checkpoint(tmp_path: Path):
    heartbeat = Heartbeat(tmp_path / "heartbeat")
    counted = []
    for steps in (5, 2, 6):
        heartbeat.ensure(steps)
        counted.append((heartbeat.steps, (tmp_path / "heartbeat").read_text().split()[0]))
    heartbeat.close()
    assert counted == [(5, "5"), (5, "5"), (6, "6")]


@pytest.mark.parametrize("content", [b"", b"\0" * 27])
def test_empty_heartbeat_starts_at_zero(content: bytes, tmp_path: Path):
    """After a crash of the machine the file may be empty or full of zeros."""
    (tmp_path / "heartbeat").write_bytes(content)
    heartbeat = Heartbeat(tmp_path / "heartbeat")
    heartbeat.ensure(40)
    heartbeat.close()
    assert (tmp_path / "heartbeat").read_text().split() == ["40", "1"]


def test_heartbeat_is_as_old_as_the_last_step(tmp_path: Path):
    heartbeat = Heartbeat(tmp_path / "heartbeat")
    os.utime(tmp_path / "heartbeat", (1e9, 1e9))
    heartbeat.tick()
    heartbeat.close()
    assert abs((tmp_path / "heartbeat").stat().st_mtime - time.time()) < 5


def test_heartbeat_survives_a_kill(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom train.storage import fault_injection\n"
        "from train.tracking.run_dir import Heartbeat\n"
        "heartbeat = Heartbeat(Path(sys.argv[1]))\nfor _ in range(99):\n    heartbeat.tick()\n"
        "    fault_injection.fail_point('step', heartbeat.steps)"
    )
    path = tmp_path / "heartbeat"
    for attempt, step in enumerate((12, 30), 1):
        done = run_command(sys.executable, "-c", code, str(path), env={"INCEPTION_FAULT": f"step:{step}"})
        assert done.code == -signal.SIGKILL, done.err
        assert path.read_text().split() == [str(step), str(attempt)]


# ----------------------------------------------------------------------------------------------------------- run folder


def make_run(path: Path, began: float = 0.0, status: str | None = None) -> RunDir:
    path.mkdir(parents=True)
    folder = RunDir(path, f"id of {path.name}")
    folder.write_json("run.json", {"run_id": folder.run_id, "time": began})
    if status:
        folder.write_json("summary.json", {"status": status})
    return folder


HOLD = """
import sys, time
from pathlib import Path
from train.tracking.run_dir import open_run_dir
with open_run_dir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_run_is_locked_by_one_process_while_it_runs(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    assert not folder.is_running()
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert folder.is_running()
            with pytest.raises(ValueError) as refused, folder.locked():
                pass
            assert str(refused.value) == f"run_dir {folder.path} is in use by a running process"
        finally:
            holder.kill()  # says no farewell
    assert not folder.is_running()
    with folder.locked():
        assert folder.is_running()
        with pytest.raises(ValueError, match="is in use by a running process"), folder.locked():
            pass
    assert not folder.is_running()


def test_shared_lock_of_another_reader_does_not_count_as_running(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    with folder.locked():
        pass
    with (folder.path / ".lock").open("r+") as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert not folder.is_running()


def test_run_dir_with_another_run_is_rejected(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    with folder.locked():
        pass
    folder.write_json("run.json", {"run_id": "another", "time": 1.0})
    with pytest.raises(ValueError) as refused, folder.locked():
        pass
    assert str(refused.value) == f"run_dir {folder.path} already holds another run; use another run_dir"
    assert not folder.is_running()  # the lock was let go


@pytest.mark.parametrize("status", [None, "finished", "failed", "interrupted"])
def test_status_is_that_of_the_last_attempt(status: str | None, tmp_path: Path):
    assert make_run(tmp_path / "run", status=status).status() == status


def test_latest_unfinished_run_is_the_one_that_started_last(tmp_path: Path):
    make_run(tmp_path / "inception" / "z", began=1.0)
    make_run(tmp_path / "other" / "a", began=3.0, status="interrupted")
    make_run(tmp_path / "inception" / "b", began=2.0, status="failed")
    make_run(tmp_path / "inception" / "c", began=4.0, status="finished")
    alive = make_run(tmp_path / "inception" / "d", began=5.0)
    replace_symlink(tmp_path / "latest", alive.path)
    with alive.locked():
        latest = latest_unfinished(tmp_path)
        assert (latest.path, latest.run_id) == (tmp_path / "other" / "a", "id of a")
    assert latest_unfinished(tmp_path).path == alive.path


def test_missing_unfinished_run_is_reported(tmp_path: Path):
    expected = f"no unfinished run below {tmp_path}; use run=FOLDER"
    with pytest.raises(ValueError) as refused:
        latest_unfinished(tmp_path)
    assert str(refused.value) == expected
    make_run(tmp_path / "inception" / "a", status="finished")
    with make_run(tmp_path / "inception" / "b").locked(), pytest.raises(ValueError) as refused:
        latest_unfinished(tmp_path)
    assert str(refused.value) == expected


def test_run_is_uploaded_by_one_process_at_a_time(tmp_path: Path):
    folder, order = make_run(tmp_path / "run"), []

    def wait() -> None:
        with folder.upload_lock(wait=True):
            order.append("the one that waited")

    with folder.upload_lock(wait=False):
        with pytest.raises(ValueError) as refused, folder.upload_lock(wait=False):
            pass
        assert str(refused.value) == f"another process is uploading run {folder.path}; try again in a moment"
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not folder.is_running()  # recording is no living
        order.append("the one that held")
    waiting.join(10)
    assert order == ["the one that held", "the one that waited"]
    with folder.upload_lock(wait=False):
        pass
