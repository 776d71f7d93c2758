"""Makes standard output and error survive the loss of their reader.

A closed terminal answers a write with EIO, a closed pipe with EPIPE, a full disk with ENOSPC. Python raises each of
them from `print`, rich turns EPIPE into an exit, and what is left in a buffer raises once more when the interpreter
ends, as exit code 120. The documented remedies (SIGPIPE's default action, or catching EPIPE where the program starts)
end the program. That is wrong for training: nothing depends on what it prints, and train.log holds it, too.
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
    """Makes writes to standard output and error never fail from here on: what cannot be written is dropped.

    needed: output is the command's purpose, so without a reader it ends with the exit code of SIGPIPE, and on a full
    disk with an error. Streams that were replaced before, such as by a test, are left alone. Call this before any file
    is opened, since a file would get the descriptor of a closed stream.
    """
    for descriptor in range(3):
        _reserve_descriptor(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)  # None if it was closed from the start
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
    """Opens /dev/null in place of a closed standard stream; otherwise prints would end up in the next opened file."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one


class _StandardStreamFile(io.FileIO):
    """The file below a standard stream."""

    def __init__(self, descriptor: int, *, needed: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._needed = needed

    def write(self, data: ReadableBuffer, /) -> int:
        """Tries every write anew: a disk may have space again, a named pipe another reader."""
        try:
            written = super().write(data)
            if written is None:  # a full non-blocking pipe
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if self._needed:
                self._needed = False  # Python flushes once more at its end
                message = f"error: cannot write to standard output ({error.strerror})"
                raise SystemExit(SIGPIPE_EXIT_CODE if error.errno in CLOSED_OUTPUT_ERRNOS else message) from None
            return memoryview(data).nbytes
        return written
