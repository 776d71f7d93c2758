"""A closed terminal, a pipe without a reader, a full disk under the output: none of them ends a run."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.commands import ROOT, THREADS, Done, run_command
from support.runs import train_session
from train.cli import terminal
from train.config import composition
from train.config.serialization import Redactor
from train.sweep.workers import classify_exit
from train.tracking import uploader
from train.tracking.run_dir import create_run_dir
from train.training import checkpoint
from train.training.signals import Interrupted, SignalHandler, StopSignals

DEADLINE_SECONDS = 120.0  # generous; no test asserts how long something takes

# What a shell does before it starts a command: a terminal in standard input becomes the controlling one.
# SIGHUP must not be inherited from whoever runs the tests, who may have used nohup.
LAUNCH = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def wait_until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class OnTerminal:
    """A process on its own pseudo-terminal. screen: the output so far."""

    process: subprocess.Popen
    master: int
    screen: bytes = b""

    @classmethod
    def start(cls, *words: str, hangup: str = "SIG_DFL", stdout: Any = None) -> OnTerminal:
        """hangup: the initial action of SIGHUP; nohup sets SIG_IGN. stdout: if not the terminal."""
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, hangup, *words], cwd=ROOT, start_new_session=True,
            stdin=slave, stdout=stdout or slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        return cls(process, master)

    def show_until(self, reached: Callable[[], Any]) -> None:
        """Read the output, like a terminal, until the condition is true."""

        def read() -> Any:
            with suppress(OSError):  # the process has ended
                if select.select([self.master], [], [], 0)[0]:
                    self.screen += os.read(self.master, 65536)
            assert self.process.poll() is None, self.screen.decode(errors="replace")
            return reached()

        wait_until(read)

    def close(self) -> None:
        """The kernel sends SIGHUP, and from here on every write fails with EIO."""
        os.close(self.master)

    def code(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)


# ------------------------------------------------------------------------------------------------------- the streams

# Output like that of a run: a progress bar, lines, errors, and something still in the buffer at the end.
STORY = """
import os, sys, time
from pathlib import Path
from train.cli import terminal
from train.cli.progress import TerminalProgressDisplay, print_and_log
protected, gone, finished = sys.argv[1] == "protected", Path(sys.argv[2]), Path(sys.argv[3])
if protected:
    terminal.protect_output()
def wait():
    while not gone.exists():
        time.sleep(0.01)
if sys.argv[4] == "before":
    wait()
with TerminalProgressDisplay(epochs=2, steps=3, batch_size=8) as watch:
    for step in range(1, 4):
        watch.step(0, step, {"train/accuracy": 0.5})
        if sys.argv[4] == "between":
            print("a line", flush=True)
            wait()
    watch.epoch(0, {"train/loss": 1.0, "images_per_second": 1.0, "data_wait_fraction": 0.0})
print_and_log("the last line but one")
print("an error", file=sys.stderr)
sys.stdout.buffer.write(b"bytes")
if sys.argv[4] == "end":
    sys.stdout.flush()
    wait()
print("the last line", end="")
finished.write_text("finished")
"""


def tell(tmp_path: Path, start: Callable[..., tuple[subprocess.Popen, Callable[[], None]]], *words: str) -> bool:
    """Run the script on an output that `start` opens and removes; whether it finished with exit code 0."""
    gone, finished = tmp_path / f"gone-{words[0]}", tmp_path / f"finished-{words[0]}"
    process, take_away = start("-c", STORY, words[0], str(gone), str(finished), *words[1:])
    take_away()
    gone.touch()
    code = process.wait(DEADLINE_SECONDS)
    assert code == 0 or words[0] == "unprotected"
    return code == 0 and finished.exists()


def on_terminal(*words: str) -> tuple[subprocess.Popen, Callable[[], None]]:
    started = OnTerminal.start(*words, hangup="SIG_IGN")

    def take_away() -> None:
        if words[-1] != "before":
            started.show_until(lambda: b"a line" in started.screen or b"bytes" in started.screen)
        started.close()

    return started.process, take_away


def on_pipe(*words: str) -> tuple[subprocess.Popen, Callable[[], None]]:
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)

    def take_away() -> None:
        seen = b""
        while words[-1] != "before" and b"bytes" not in seen:
            seen += os.read(reader, 65536)
        os.close(reader)

    return process, take_away


def on_full_disk(*words: str) -> tuple[subprocess.Popen, Callable[[], None]]:
    with Path("/dev/full").open("w") as full:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=full, stderr=full), lambda: None


@pytest.mark.parametrize(
    ("start", "when"),
    [
        (on_terminal, "between"),
        (on_terminal, "end"),
        (on_pipe, "before"),
        (on_pipe, "end"),  # where only Python's own flush at exit fails: code 120
        (on_full_disk, "before"),
    ],
)
def test_process_survives_the_reader_of_its_output(start: Any, when: str, tmp_path: Path):
    """With Python's own streams it does not."""
    assert tell(tmp_path, start, "protected", when)
    assert not tell(tmp_path, start, "unprotected", when)


# TensorFlow and others write to descriptor 1, past Python's stream.
CLOSED = """
import os, sys
from train.cli import terminal
if sys.argv[1] == "protected":
    terminal.protect_output()
    sys.stdout.flush()
    os.write(2, b"noise")
with open(sys.argv[2], "w") as journal:
    print("a line")
    os.write(1, b"noise")
"""


def test_streams_closed_at_start_do_not_write_into_files(tmp_path: Path):
    """The next opened file gets the descriptor of a closed stream unless something else occupies it."""
    written = {}
    for name in ("protected", "unprotected"):
        words = [sys.executable, "-c", CLOSED, name, str(tmp_path / name)]
        assert run_command("sh", "-c", '"$@" >&- 2>&-', "sh", *words) == Done(0, "", "")
        written[name] = (tmp_path / name).read_text()
    assert written == {"protected": "", "unprotected": "noise"}


PROPERTIES = """
import os, sys
from pathlib import Path
from train.cli import terminal
before = [(stream.isatty(), stream.encoding, stream.fileno(), stream.writable()) for stream in (sys.stdout, sys.stderr)]
terminal.protect_output()
protected = sys.stdout
terminal.protect_output()
assert sys.stdout is protected and protected is not sys.__stdout__
after = [(stream.isatty(), stream.encoding, stream.fileno(), stream.writable()) for stream in (sys.stdout, sys.stderr)]
assert before == after, (before, after)
assert before[0][0] and before[0][2] == 1
print("caf\\u00e9 \\udcff", "a" * 200_000)  # a character that a terminal cannot show must not end a run either
sys.stdout.buffer.write(b"bytes\\n")
sys.stdout.flush()
sys.stderr.write("at once\\n")
os.read(0, 1)
"""


def test_protected_stream_behaves_normally_while_it_has_a_reader(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    started = OnTerminal.start("-c", PROPERTIES)
    started.show_until(lambda: started.screen.endswith(b"at once\r\n"))
    assert started.screen == b"caf\\xe9 \\udcff " + b"a" * 200_000 + b"\r\nbytes\r\nat once\r\n"
    os.write(started.master, b"\n")
    assert started.code() == 0
    started.close()


@pytest.mark.usefixtures("capsys")
def test_replaced_streams_are_kept():
    before = sys.stdout, sys.stderr
    terminal.protect_output()
    assert (sys.stdout, sys.stderr) == before


PRINTS = """
import sys
from dataclasses import dataclass
from train.cli import arguments
@dataclass
class Keys:
    pass
def story(words):
    for number in range(100_000):
        print("line", number)
    print("done", file=sys.stderr)
arguments.main(story, Keys, only_prints=sys.argv.pop() == "prints")
"""


def test_only_a_command_that_just_prints_ends_without_a_reader():
    """By the convention of the shell, the exit code is that of SIGPIPE."""
    shell = '"$@" | head -1; echo "${PIPESTATUS[0]}"'
    words = ["bash", "-c", shell, "bash", sys.executable, "-c", PRINTS]
    assert run_command(*words, "prints") == Done(0, "line 0\n141\n", "")
    assert run_command(*words, "writes") == Done(0, "line 0\n0\n", "done\n")


def test_command_that_just_prints_reports_lost_output():
    done = run_command("sh", "-c", '"$@" > /dev/full', "sh", sys.executable, "-c", PRINTS, "prints")
    assert (done.code, done.err) == (1, "error: cannot write to standard output (No space left on device)\n")


# ------------------------------------------------------------------------------------------------------- the signals


@pytest.fixture
def hangup() -> Iterator[None]:
    """The default action of SIGHUP, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("numbers", [(HUP,), (HUP, HUP), (HUP, TERM), (HUP, HUP, TERM), (TERM, HUP), (INT, HUP)])
def test_all_signals_of_a_closing_terminal_count_as_one_request(numbers: tuple[int, ...]):
    with SignalHandler().installed() as signals, signals.deferred():
        send(*numbers)
        with pytest.raises(Interrupted, match=f"^stopped by {signal.Signals(numbers[0]).name}$") as stop:
            signals.raise_if_requested()
    assert (signals.exit_code(), stop.value.immediate) == (128 + numbers[0], False)
    sweep_signals = StopSignals()
    with sweep_signals.installed():
        send(*numbers)
    assert (sweep_signals.exit_code(), sweep_signals.immediate) == (128 + numbers[0], False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@pytest.mark.usefixtures("hangup")
def test_only_a_repeated_signal_of_a_person_stops_immediately(monkeypatch: pytest.MonkeyPatch):
    """However late the signals arrive."""
    monkeypatch.setattr(StopSignals, "REPEAT_SECONDS", 0.0)
    sweep_signals = StopSignals()
    with SignalHandler().installed() as signals, signals.deferred():
        send(HUP, HUP)
        with pytest.raises(Interrupted, match="SIGTERM") as stop:
            send(TERM)
    assert stop.value.immediate
    with sweep_signals.installed():
        send(HUP, HUP)
        assert (sweep_signals.received_signal(), sweep_signals.immediate) == (HUP, False)
        send(TERM)
        assert (sweep_signals.received_signal(), sweep_signals.immediate) == (TERM, True)


@pytest.mark.usefixtures("hangup")
def test_sighup_ignored_at_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sweep_signals = StopSignals()
    with SignalHandler().installed() as signals, sweep_signals.installed():
        send(HUP, HUP)
    assert (signals.exit_code(), sweep_signals.exit_code()) == (0, 0)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# Waiting for a locked mutex is a single call: Python runs no handler until it returns.
STUCK = """
import ctypes
from train.training.signals import SignalHandler, StopSignals
SignalHandler.GRACE_SECONDS, StopSignals.REPEAT_SECONDS = 0.1, 60.0
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with SignalHandler().installed() as signals, signals.deferred():
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""


@pytest.mark.parametrize(("numbers", "code"), [((HUP, TERM, HUP), None), ((INT, TERM), 143)])
def test_closing_terminal_does_not_kill_a_process_in_a_long_step(numbers: tuple[int, ...], code: int | None):
    words = [sys.executable, "-c", LAUNCH, "SIG_DFL", "-c", STUCK]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)  # else the kernel may deliver a later one first
        try:
            if code is None:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1)
            else:
                assert process.wait(DEADLINE_SECONDS) == code
        finally:
            process.kill()


def test_trial_ended_by_sighup_is_retryable(tmp_path: Path):
    class Trial:
        folder = tmp_path

        def summary(self) -> dict[str, Any]:
            return {}

    ended = classify_exit(129, "", Trial(), 0.0)  # type: ignore[arg-type]
    assert (ended.exit_code, ended.is_retryable, ended.is_out_of_memory) == (129, True, False)


# -------------------------------------------------------------------------------------------------------- whole runs

TINY = [
    "model=vgg16", "model.head=fc", "model.width=0.1", "batch_size=16", "steps_per_epoch=20", "epochs=3",
    "tracking.every_steps=2", "tracking.log_model=false", "evaluate.report=false", "evaluate.test=false",
    "checkpoint.every_epochs=9", "tracking.wait_seconds=0", f"threads={THREADS}",
]  # fmt: skip


STEPS = 60


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def log_of(folder: Path) -> str:
    return (folder / "train.log").read_text()


def steps_done(folder: Path) -> int:
    journal = folder / "metrics.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that keeps its output."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    config = composition.compose([*TINY, f"run_dir={folder}"])
    run_dir = create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "start", lambda *_: None)
        return train_session(run_dir, config, Redactor())


def uploaders(folder: Path) -> list[int]:
    """Process ids of the uploader of a run."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended in the meantime
            if f"train.tracking.uploader\0{folder}\0".encode() in (process / "cmdline").read_bytes():
                processes.append(int(process.name))
    return processes


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The path of a run; its uploader is ended after the test."""
    yield tmp_path / "run"
    for process in uploaders(tmp_path / "run"):
        os.kill(process, signal.SIGKILL)


def words_of(folder: Path) -> list[str]:
    return [*TINY, f"run_dir={folder}", f"tracking.uri=sqlite:///{folder.parent / 'mlflow.db'}"]


def tells_its_end(folder: Path, status: str) -> bool:
    """Whether train.log ends with the summary line and contains no traceback."""
    log = log_of(folder)
    return "Traceback" not in log and f"status={status} model=vgg16 " in log.splitlines()[-1]


def goes_on_to_its_end(started: OnTerminal, folder: Path, until: int) -> bool:
    """Close its terminal during an epoch, with the progress bar on it; whether it continues to the end."""
    started.show_until(lambda: steps_done(folder) >= until)
    assert b"epoch" in started.screen and b" left " in started.screen
    at = steps_done(folder)
    started.close()
    assert started.code() == 0
    return at < steps_done(folder) == STEPS


@pytest.mark.slow
def test_closed_terminal_stops_a_run_cleanly_unless_nohup(folder: Path, untouched: dict[str, Any]):
    """First `make train | head -1` on a terminal that is closed later, with SIGTERM right after its SIGHUP; then
    `make resume` on another terminal, with SIGHUP ignored.
    """
    with subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as head:
        assert head.stdin and head.stdout
        first = OnTerminal.start("-m", "train", *words_of(folder), stdout=head.stdin)
        head.stdin.close()
        assert head.stdout.read().count(b"\n") == 1
        assert head.wait() == 0
    first.show_until(lambda: steps_done(folder) >= 2)
    first.close()
    first.process.terminate()
    assert first.code() == 129
    assert uploaders(folder)
    stopped = summary_of(folder)
    assert (stopped["status"], stopped["failure"]) == ("interrupted", "stopped by SIGHUP")
    [saved] = (folder / "checkpoints").iterdir()
    assert saved.name.endswith("-stop")
    assert (
        checkpoint.read_checkpoint(saved).metadata["progress"]["steps"]
        == stopped["steps"]
        == stopped["steps_executed"]
        < STEPS
    )
    assert f"to continue: make resume run={folder}\n" in log_of(folder)
    assert tells_its_end(folder, "interrupted")
    assert b"Traceback" not in first.screen

    second = OnTerminal.start("-m", "train.resume", f"run={folder}", hangup="SIG_IGN")
    assert goes_on_to_its_end(second, folder, stopped["steps"] + 2)
    finished = summary_of(folder)
    assert (finished["status"], finished["steps_executed"], finished["attempts"]) == ("finished", STEPS, 2)
    assert finished["weights_sha256"] == untouched["weights_sha256"]
    assert "epoch 3/3  loss " in log_of(folder)
    assert tells_its_end(folder, "finished")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "printed"),
    [
        ('"$@" 2>&- | head -1; exit "${PIPESTATUS[0]}"', 1),
        ('"$@" <&- >&- 2>&-', 0),
        ('"$@" > /dev/full 2> /dev/full', 0),
    ],
    ids=["head", "closed", "full"],
)
def test_run_without_a_reader_trains_to_the_same_bits(
    shell: str, printed: int, folder: Path, untouched: dict[str, Any]
):
    done = run_command("bash", "-c", shell, "bash", sys.executable, "-m", "train", *words_of(folder))
    assert (done.code, len(done.out.splitlines()), done.err) == (0, printed, "")
    assert summary_of(folder)["weights_sha256"] == untouched["weights_sha256"]
    assert "epoch 3/3  loss " in log_of(folder)
    assert tells_its_end(folder, "finished")


UNPROTECTED = """
import sys
from train import __main__
from train.cli import terminal
terminal.protect_output = lambda: None
__main__.main()
"""


@pytest.mark.slow
def test_closed_terminal_kills_a_run_with_unprotected_streams(folder: Path):
    """Negative control: SIGHUP is ignored, but writing to the closed terminal kills the run."""
    started = OnTerminal.start("-c", UNPROTECTED, *words_of(folder), hangup="SIG_IGN")
    started.show_until(lambda: steps_done(folder) >= 2)
    started.close()
    assert started.code() != 0
    assert steps_done(folder) < STEPS


@pytest.mark.slow
def test_closed_terminal_stops_a_sweep_cleanly(tmp_path: Path):
    """The trial has its own session; the launcher forwards the stop."""
    folder = tmp_path / "sweep"
    words = [word for word in words_of(folder) if not word.startswith(("epochs", "evaluate"))]
    launcher = OnTerminal.start("-m", "train", "-m", *words, "epochs=500", "seed=0,1", "sweep.parallel=1")
    launcher.show_until(lambda: steps_done(folder / "000") >= 2)
    launcher.close()
    assert launcher.code() == 129
    trial = summary_of(folder / "000")
    assert (trial["status"], trial["failure"]) == ("interrupted", "stopped by SIGTERM")
    assert [path.name.endswith("-stop") for path in (folder / "000/checkpoints").iterdir()] == [True]
    assert not (folder / "001").exists()
    for process in uploaders(folder / "000"):
        os.kill(process, signal.SIGKILL)
