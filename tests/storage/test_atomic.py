"""Atomic writes of files, folders and links."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from support.checkpoints import file_contents, file_names
from support.commands import run_command
from train.storage.atomic import append_and_fsync, atomic_file, atomic_folder, replace_symlink, write_atomically


def test_link_is_replaced(tmp_path: Path):
    link = tmp_path / "runs" / "latest"
    for target in ("runs/a", "runs/deep/b", "elsewhere/c"):
        (tmp_path / target).mkdir(parents=True)
        replace_symlink(link, tmp_path / target)
        assert link.resolve() == tmp_path / target
    assert link.readlink() == Path("../elsewhere/c")
    assert file_names(link.parent) == ["a", "deep", "latest"]
    assert file_names(tmp_path / "elsewhere" / "c") == []


def test_dangling_link_and_leftovers_of_a_killed_process_are_replaced(tmp_path: Path):
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / f".latest.{os.getpid()}").symlink_to("of a process that had our number")
    (tmp_path / "run").mkdir()
    replace_symlink(tmp_path / "latest", tmp_path / "run")
    assert (tmp_path / "latest").readlink() == Path("run")
    assert file_names(tmp_path) == ["latest", "run"]


def test_reader_of_a_file_being_replaced_has_the_old_content(tmp_path: Path):
    write_atomically(tmp_path / "file", "old\n")
    with (tmp_path / "file").open() as reader:
        write_atomically(tmp_path / "file", "new\n")
        assert reader.read() == "old\n"
    assert (tmp_path / "file").read_text() == "new\n"


def test_file_is_written_completely(tmp_path: Path):
    for content in ("grün\n", b"\0\xff", ""):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert file_names(tmp_path) == ["file"]


# The process is killed after it has handed half of the content to the kernel.
KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from train.storage.atomic import atomic_file
path = Path(sys.argv[1])
with atomic_file(path) if sys.argv[2] == "atomic" else path.open("wb") as file:
    file.write(b"ne")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "left"), [("atomic", "old\n"), ("plain", "ne")])
def test_process_killed_while_writing_leaves_the_old_content(how: str, left: str, tmp_path: Path):
    """Negative control: a file that is opened for writing itself has half of the new content."""
    path = tmp_path / "file"
    write_atomically(path, "old\n")
    assert run_command(sys.executable, "-c", KILLED_WHILE_WRITING, str(path), how).code == -signal.SIGKILL
    assert path.read_text() == left
    write_atomically(path, "new\n")  # what the killed process left does not stand in the way
    assert (path.read_text(), file_names(tmp_path)) == ("new\n", ["file"])


def test_file_is_intact_after_an_error_while_writing(tmp_path: Path):
    write_atomically(tmp_path / "file", "old\n")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert file_contents(tmp_path) == {"file": b"old\n"}


def test_file_is_not_written_through_a_link(tmp_path: Path):
    """Whoever can write the folder could put a link where the temporary file will be."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.file.new").symlink_to(outside)
    (tmp_path / "run/file").symlink_to(outside)
    write_atomically(tmp_path / "run/file", "new\n")
    assert file_contents(tmp_path) == {"outside": b"secret", "run/file": b"new\n"}
    assert not (tmp_path / "run/file").is_symlink()
    (tmp_path / "run/log").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        append_and_fsync(tmp_path / "run/log", b"line\n")
    assert outside.read_text() == "secret"


def test_append_keeps_what_is_there(tmp_path: Path):
    for line in (b"one\n", b"two\n"):
        append_and_fsync(tmp_path / "file", line)
    assert file_contents(tmp_path) == {"file": b"one\ntwo\n"}


# ----------------------------------------------------------------------------------------------------------- folders

WRITE_FOLDER = """
import sys
from pathlib import Path
from train.storage.atomic import atomic_folder
folder = Path(sys.argv[1])
with atomic_folder(folder / "new", folder / ".new"):
    (folder / ".new/below").mkdir()
    (folder / ".new/below/file").write_text("content")
"""
COMPLETE = {"below/file": b"content"}


@pytest.mark.parametrize(
    ("fault", "left"),
    [("folder/complete", [".new"]), ("folder/renamed", ["new"]), ("none", ["new"])],
)
def test_folder_is_complete_or_absent_wherever_the_process_is_killed(fault: str, left: list[str], tmp_path: Path):
    done = run_command(sys.executable, "-c", WRITE_FOLDER, str(tmp_path), env={"INCEPTION_FAULT": f"{fault}:1"})
    assert done.code == (0 if fault == "none" else -signal.SIGKILL)
    assert file_names(tmp_path) == left
    assert file_contents(tmp_path / left[0]) == COMPLETE


def test_folder_is_absent_after_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new", tmp_path / ".new"):
        (tmp_path / ".new/file").touch()
        raise KeyboardInterrupt
    assert file_names(tmp_path) == []


def test_folder_that_exists_is_not_replaced(tmp_path: Path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "new", tmp_path / ".new"):
        (tmp_path / ".new/file").touch()
    assert file_contents(tmp_path) == {"new/mine": b"mine"}
    assert file_names(tmp_path) == ["new"]


def test_everything_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a crash of the machine loses cannot be tested here: this is the order of the calls that prevent it."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        calls.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    with atomic_folder(tmp_path / "new", tmp_path / ".new"):
        (tmp_path / ".new/below").mkdir()
        (tmp_path / ".new/below/file").touch()
        (tmp_path / ".new/file").touch()
    *flushed, renamed, parent = calls
    assert sorted(flushed) == [".new", ".new/below", ".new/below/file", ".new/file"]
    assert (renamed, parent) == ("rename", ".")
