"""Atomic writes of files and links."""

from __future__ import annotations

import os
from pathlib import Path

from support.checkpoints import file_names
from train.storage.atomic import replace_symlink, write_atomically


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
