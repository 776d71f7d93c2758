"""Standard output and error that outlast whoever reads them.

A closed terminal answers a write with EIO, a closed pipe with EPIPE, a full disk with ENOSPC. Python raises each of
them from `print`, rich turns EPIPE into an exit, and what is left in a buffer raises once more when the interpreter
ends, as exit code 120. The documented remedies (SIGPIPE's default action, or catching EPIPE where the program starts)
end the program. That is wrong for training: nothing depends on what it prints, and train.log has it, too.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CLOSED_OUTPUT_ERRNOS = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
SIGPIPE_EXIT_CODE = 128 + signal.SIGPIPE  # how a shell reports a program that writes to a closed pipe


def protect_output(*, needed: bool = False) -> None:
    """From here on, no write to standard output or error fails: what can't be written is dropped.

    needed: output is what the command is for, so without a reader it ends, with the exit code of SIGPIPE, and on a full
    disk with an error. Streams that somebody else has put in place, such as a test's, stay. Call it before any file is
    opened, since that would get the number of a stream that is closed.
    """
    for descriptor in range(3):
        _reserve_descriptor(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)  # None where it was closed from the start
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream:
            with suppress(OSError):
                stream.flush()
        raw = _StandardStreamFile(descriptor, needed=needed and name == "stdout")
        encoding = stream.encoding if stream else "utf-8"
        protected = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, protected)


def _reserve_descriptor(descriptor: int) -> None:
    """Opens /dev/null where a standard stream is closed; otherwise what is printed would end up in the next file."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free: this one


class _StandardStreamFile(io.FileIO):
    """The file below a standard stream."""

    def __init__(self, descriptor: int, *, needed: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._needed = needed

    def write(self, data: ReadableBuffer, /) -> int:
        """Each write is tried: a disk may get room again, a named pipe another reader."""
        try:
            written = super().write(data)
            if written is None:  # a pipe that must not block is full
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as fault:
            if self._needed:
                self._needed = False  # Python flushes once more at its end
                told = f"error: standard output can't be written ({fault.strerror})"
                raise SystemExit(SIGPIPE_EXIT_CODE if fault.errno in CLOSED_OUTPUT_ERRNOS else told) from None
            return memoryview(data).nbytes
        return written
