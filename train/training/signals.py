"""SIGINT, SIGTERM and SIGHUP, for runs and sweeps: what they ask for, and when a run obeys.

During training they are deferred to the next batch boundary, and obeyed by all processes of the run.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, Self, TypeVar

Item = TypeVar("Item")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop by `signal_number`; `immediate`: without saving a checkpoint first.

    `all_processes`: all processes of the run stop at this step.
    """

    def __init__(self, signal_number: int, *, immediate: bool = False, all_processes: bool = False):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.immediate = immediate
        self.all_processes = all_processes


class SignalExchange(Protocol):
    """The part of a training step that passes signals between the processes of a run."""

    local_signal: Callable[[], int]

    def agreed_signal(self) -> int: ...


class StopSignals:
    """Records the signals that ask to stop: the first asks for it at the next boundary, a second one at once.

    immediate: whether there was a second one.
    """

    REPEAT_SECONDS = 1.0  # the same signal within this time is one request: make and its children all get it
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.immediate = False
        self._signal_number = 0
        self._received_at = 0.0

    def receive(self, number: int) -> bool:
        """Records a signal. Returns whether it is a request of its own, and does not just repeat the previous one."""
        if self._is_repeat(number):
            return False
        self.immediate = self._signal_number != 0
        self._signal_number = number
        self._received_at = time.monotonic()
        return True

    def _is_repeat(self, number: int) -> bool:
        """Whether a signal repeats the previous request.

        When a terminal closes, the kernel and the shell each send SIGHUP, and the session manager may send SIGTERM.
        SIGHUP is never a person in a hurry, so that it never counts as the second signal.
        """
        if not self._signal_number:
            return False
        if number == signal.SIGHUP:
            return True
        same = self._signal_number in (number, signal.SIGHUP)
        return same and time.monotonic() - self._received_at < self.REPEAT_SECONDS

    def received_signal(self) -> int:
        """The number of the received signal; 0 for none."""
        return self._signal_number

    def exit_code(self) -> int:
        """The exit code for the received signal; 0 for none."""
        return 128 + self._signal_number if self._signal_number else 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.receive(number)

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Handles the signals until the block ends. An ignored SIGHUP stays ignored: nohup works by that."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in self.SIGNALS if not (nohup and number == signal.SIGHUP)]
        previous_handlers = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, previous in previous_handlers.items():
                signal.signal(number, previous)


class SignalHandler(StopSignals):
    """Raises Interrupted at once, or between two batches within `deferred`, where an abort would lose work.

    A second signal always raises at once. If Python cannot run its handler because a long step does not return, the
    process exits a moment later, which loses no more than a kill would.
    """

    GRACE_SECONDS = 3.0

    def __init__(self) -> None:
        super().__init__()
        self._deferring = False
        self._poll_signal = self.received_signal

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.receive(number) and (self.immediate or not self._deferring):
            raise Interrupted(number, immediate=self.immediate)

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Handles the signals until the block ends, and watches for a second one that Python cannot handle."""
        with super().installed():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._exit_on_second_signal, args=(reader,), daemon=True).start()
            try:
                yield self
            finally:
                signal.set_wakeup_fd(previous)
                os.close(writer)

    def _exit_on_second_signal(self, reader: int) -> None:
        """Runs in a thread: a pipe delivers the number of every signal, even while the main thread is busy."""
        signals = StopSignals()  # of its own: the handler, which runs in the main thread, may not have run yet
        while byte := os.read(reader, 1):
            if byte[0] in self.SIGNALS:
                signals.receive(byte[0])
            if signals.immediate and not _wait_for_close(reader, self.GRACE_SECONDS):
                os._exit(signals.exit_code())
        os.close(reader)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block signals are only recorded; `raise_if_requested` raises them."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def synchronized(self, step: SignalExchange) -> Iterator[None]:
        """Within this block a signal to one process stops all, after the same step, which passes the signal on."""
        step.local_signal, self._poll_signal = self.received_signal, step.agreed_signal
        try:
            yield
        finally:
            self._poll_signal = self.received_signal

    def raise_if_requested(self) -> None:
        """Raises: Interrupted if a signal has been received."""
        if number := self._poll_signal():
            raise Interrupted(number, all_processes=self._poll_signal != self.received_signal)

    def guard(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yields the batches. Raises: Interrupted before the next one, if a signal has been received."""
        for batch in batches:
            self.raise_if_requested()
            yield batch


def _wait_for_close(reader: int, seconds: float) -> bool:
    """Waits until the other end of the pipe is closed, at most `seconds`; whether it was closed."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], remaining)[0] and not os.read(reader, 1):
            return True
    return False
