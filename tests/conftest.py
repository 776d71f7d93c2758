"""What the tests share: one real run through the command line, and quick ways to call the commands."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.commands import THREADS, Done, run_command
from support.exports import ship
from support.shared import SERVER_PROCESS, Finished, TrackingServer, finish, once, start_server


def pytest_collection_finish(session: pytest.Session) -> None:
    """TensorFlow's threads can be set only before its first operation, and some tests run whole trainings here."""
    if {Path(item.path).stem for item in session.items} - {
        "test_architecture",
        "test_config",
        "test_make",
        "test_setup",
        "test_checkpoint",
        "test_journal",
        "test_run_dir",
        "test_atomic",
        "test_full_disk",
    }:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(THREADS)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`make train` with a narrow network for two epochs; the store's address comes from the environment."""
    return once(tmp_path_factory, "finished", finish)


@pytest.fixture(scope="session")
def shipped(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """The finished run in all formats."""
    return once(tmp_path_factory, "shipped", lambda place: ship(place, finished.path, "format=all"))


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> TrackingServer:
    """One for the session, whichever worker wants it first; `pytest_sessionfinish` ends it."""
    return once(tmp_path_factory, "tracking server", start_server)


def pytest_configure() -> None:
    """Where a worker of pytest-xdist leaves the number of the server's process for the session, which outlives it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SERVER_PROCESS] = str(Path(tempfile.mkdtemp(prefix="tests-"), "server"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test was skipped that may not be")


# Tests that may be skipped where they are counted: of data sets that are not in the repository, where there are none.
EXPECTED_SKIPS = {
    "tests/data/test_real_data.py::test_fashion_mnist_loads_from_files",
    "tests/data/test_real_data.py::test_sign_digits_load_with_orientation",
    "tests/data/test_ingestion.py::test_odd_images_are_accepted_or_rejected",
    "tests/run/test_run.py::test_image_folder_of_photographs_is_learned",
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
