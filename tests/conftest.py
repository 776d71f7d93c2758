"""What the tests share: one real run through the command line, and quick ways to call the commands."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2
FROM_MAKE = {
    "MAKELEVEL",
    "MAKEFLAGS",
    "MAKEOVERRIDES",
    "MFLAGS",
    "ARGS",
}  # its words are not ours
SERVER_PROCESS = "INCEPTION_TEST_SERVER_PROCESS"
SECRET = "hunter2-in-the-address"


def pytest_collection_finish(session: pytest.Session) -> None:
    """TensorFlow's threads can be set only before its first operation, and some tests run whole trainings here."""
    if {Path(item.path).stem for item in session.items} - {
        "test_architecture",
        "test_config",
        "test_make",
        "test_setup",
        "test_checkpoint",
    }:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(THREADS)


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.strip().splitlines()[-1]


def run_train(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """`python -m train WORDS`, as make calls it, without the pictures, which take longer than the runs of the tests."""
    return run_command(sys.executable, "-m", "train", *words, "evaluate.report=false", env=env, timeout=timeout)


def run_command(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    done = subprocess.run(
        words, cwd=ROOT, env=inherited | (env or {}), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The line that it refuses with."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    said = str(caught.value)
    assert "\n" not in said
    return said


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`make train` with a narrow network for two epochs; the store's address comes from the environment."""
    return once(tmp_path_factory, "finished", finish)


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


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> TrackingServer:
    """One for the session, whichever worker wants it first; `pytest_sessionfinish` ends it."""
    return once(tmp_path_factory, "tracking server", start_server)


def start_server(place: Path) -> TrackingServer:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}",
         "--artifacts-destination", str(place / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1"],
        cwd=place, stdout=(place / "server.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    Path(os.environ[SERVER_PROCESS]).write_text(str(process.pid))
    server = TrackingServer(f"http://127.0.0.1:{port}", place / "artifacts")
    wait_for(lambda: answers(f"{server.uri}/health") == b"OK", 120)
    return server


def pytest_configure() -> None:
    """Where a worker of pytest-xdist leaves the number of the server's process for the session, which outlives it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SERVER_PROCESS] = str(Path(tempfile.mkdtemp(prefix="tests-"), "server"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test was skipped that may not be")


# Tests that may be skipped where they are counted: of data sets that are not in the repository, where there are none.
EXPECTED_SKIPS = {
    "tests/test_data.py::test_fashion_mnist_from_files",
    "tests/test_data.py::test_sign_digits",
    "tests/test_ingest.py::test_the_odd_images",
    "tests/test_run.py::test_a_folder_of_photographs_is_learned",
}
skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        skipped.add(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped.add(report.nodeid)


def unexpected_skips() -> list[str]:
    return sorted(skipped - (set() if os.environ.get("INCEPTION_REAL_DATA") else EXPECTED_SKIPS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--strict-skips"):
        terminalreporter.section("skips")
        terminalreporter.line(f"{len(skipped)} skipped, {len(unexpected_skips())} of them unexpected")
        for name in unexpected_skips():
            terminalreporter.line(f"unexpected: {name}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        if session.config.getoption("--strict-skips") and unexpected_skips():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        number = Path(os.environ[SERVER_PROCESS])
        if number.exists():
            os.killpg(int(number.read_text()), signal.SIGTERM)
        shutil.rmtree(number.parent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(address: str) -> bytes:
    """What a web address answers; nothing where nobody does."""
    try:
        return urllib.request.urlopen(address, timeout=5).read()
    except OSError:
        return b""


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Fails where something that has to happen has not happened in a time that is generous on any machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.1)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """tiny_disk("2m") is a disk of that size, in memory; mounting one takes a privilege."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = run_command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        if done.code:
            pytest.skip(f"no small disk can be mounted here: {done.err.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        run_command("umount", "--lazy", str(place))  # a database may still be open
