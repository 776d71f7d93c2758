"""Signals: the first is obeyed after the step, a second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from support.commands import ROOT
from train.training.signals import Interrupted, SignalHandler, StopSignals


def test_second_signal_and_signal_outside_the_loop_raise_immediately():
    with SignalHandler().installed() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code() == 143
    with SignalHandler().installed(), pytest.raises(Interrupted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_repeated_signal_within_a_moment_counts_once(monkeypatch: pytest.MonkeyPatch):
    """make forwards a SIGTERM to a process that has already received it."""
    with SignalHandler().installed() as signals, signals.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(StopSignals, "REPEAT_SECONDS", 0.0)
        with pytest.raises(Interrupted) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.immediate


def test_signal_interrupts_validation():
    with SignalHandler().installed() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            list(signals.guard([1, 2, 3]))
    assert list(SignalHandler().guard([1, 2, 3])) == [1, 2, 3]


# A lock that is held already is waited for in one call: signals don't end it, and Python runs nothing until it ends.
STUCK = """
import ctypes
from train.training.signals import SignalHandler
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with SignalHandler().installed() as signals, signals.deferred():
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""

EXITING = """
import sys, time
from train.training.signals import Interrupted, SignalHandler
try:
    with SignalHandler().installed() as signals, signals.deferred():
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
except Interrupted as stop:
    while not stop.immediate:
        time.sleep(0.01)
    sys.exit(7)
"""


def test_second_signal_kills_a_stuck_process_but_not_one_that_is_exiting():
    """The first signal ends neither process."""
    cases = [
        (STUCK, signal.SIGINT, signal.SIGINT, 130),
        (STUCK, signal.SIGINT, signal.SIGTERM, 143),
        (EXITING, signal.SIGINT, signal.SIGINT, 7),
    ]
    with ExitStack() as stack:
        processes = []
        for script, *_ in cases:
            command = [sys.executable, "-c", script]
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        time.sleep(0.3)  # the second lock is tried right after the line is printed
        for process, (_, first, _, _) in zip(processes, cases, strict=True):
            process.send_signal(first)
        time.sleep(SignalHandler.GRACE_SECONDS + 0.5)
        assert [process.poll() for process in processes] == [None] * 3
        start = time.monotonic()
        for process, (_, _, second, _) in zip(processes, cases, strict=True):
            process.send_signal(second)
        codes = [process.wait(timeout=120) for process in processes[:2]]
        assert time.monotonic() - start >= SignalHandler.GRACE_SECONDS  # who can leave by itself has so long
        assert [*codes, processes[2].wait(timeout=120)] == [code for *_, code in cases]
