"""What is made once for all workers of a test session: a finished run, a tracking server."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.commands import Done, run_command
from support.waiting import answers, free_port, happens_within

SERVER_PROCESS = "INCEPTION_TEST_SERVER_PROCESS"
SECRET = "hunter2-in-the-address"


@dataclass
class Finished:
    """A finished run: what it printed, its folder, its MLflow store."""

    done: Done
    path: Path
    uri: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    @property
    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What `make` makes in a folder of its own, once for all workers of a session: the others wait and read it."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = place / "made.pickle"
        if not made.exists():
            made.write_bytes(pickle.dumps(make(place)))
        return pickle.loads(made.read_bytes())


def finish(place: Path) -> Finished:
    uri = f"sqlite:///{place / SECRET / 'mlflow.db'}"
    done = run_command(
        "make",
        "train",
        "model=vgg16_inception",
        "model.width=0.125",
        "epochs=2",
        "tracking.every_steps=7",
        "tracking.uri=${oc.env:INCEPTION_TEST_STORE}",
        f"run_dir={place / 'run folder'}",
        env={"INCEPTION_TEST_STORE": uri},
    )
    assert done.code == 0, done.err
    return Finished(done, place / "run folder", uri)


@dataclass
class TrackingServer:
    """A real `mlflow server`, through which artifacts go, too. artifacts: where it keeps them."""

    uri: str
    artifacts: Path


def start_server(place: Path) -> TrackingServer:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}",
         "--artifacts-destination", str(place / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1"],
        cwd=place, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(place / "server.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    Path(os.environ[SERVER_PROCESS]).write_text(str(process.pid))
    server = TrackingServer(f"http://127.0.0.1:{port}", place / "artifacts")
    if not happens_within(lambda: answers(f"{server.uri}/health") == b"OK", 300):
        raise AssertionError((place / "server.log").read_text())
    return server
