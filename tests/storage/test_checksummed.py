"""Files with a checksum beside them."""

from __future__ import annotations

import hashlib
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from support.checkpoints import file_names
from support.commands import run_command
from train.storage import checksummed
from train.storage.checksummed import file_sha256


def write(path: Path, content: bytes) -> None:
    checksummed.write(path, lambda file: file.write(content) and None)


def test_digest_is_that_of_the_content(tmp_path: Path):
    contents = [b"", b"one", bytes(2**20) + b"two"]
    paths = [tmp_path / str(number) for number, _ in enumerate(contents)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
        assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert file_sha256(*paths) == hashlib.sha256(b"".join(contents)).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "none")


def test_file_is_intact_until_a_bit_flips(tmp_path: Path):
    path = tmp_path / "below/file"
    assert not checksummed.is_intact(path)
    write(path, b"content")
    assert (path.read_bytes(), checksummed.is_intact(path)) == (b"content", True)
    assert file_names(path.parent) == ["file", "file.sha256"]
    path.write_bytes(b"contenu")
    assert not checksummed.is_intact(path)
    path.write_bytes(b"content")
    (path.parent / "file.sha256").unlink()
    assert not checksummed.is_intact(path)


def test_old_file_is_intact_after_an_error_while_writing(tmp_path: Path):
    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    write(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt):
        checksummed.write(tmp_path / "file", fill)
    assert ((tmp_path / "file").read_bytes(), checksummed.is_intact(tmp_path / "file")) == (b"old", True)
    assert file_names(tmp_path) == ["file", "file.sha256"]


KILLED = """
import os, signal, sys
from pathlib import Path
from train.storage import checksummed
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before the new file":
    Path.replace = kill
def fill(file):
    file.write(b"new")
    if sys.argv[2] == "while writing":
        kill()
checksummed.write(Path(sys.argv[1]), fill)
"""


@pytest.mark.parametrize(("when", "intact"), [("while writing", True), ("before the new file", False)])
def test_process_killed_while_writing_leaves_nothing_that_is_taken_for_new(when: str, intact: bool, tmp_path: Path):
    """The old content stays; with the new checksum beside it, it is not used."""
    path = tmp_path / "file"
    write(path, b"old")
    assert run_command(sys.executable, "-c", KILLED, str(path), when).code == -signal.SIGKILL
    assert (path.read_bytes(), checksummed.is_intact(path)) == (b"old", intact)
    write(path, b"new")
    assert (path.read_bytes(), checksummed.is_intact(path)) == (b"new", True)
