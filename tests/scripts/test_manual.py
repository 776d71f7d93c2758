"""README.md and docs/: sizes, links, listed pages, and commands that exist."""

import shlex
import sys
from pathlib import Path

import pytest

from support.commands import ROOT
from support.scripts import load_script

sys.path.insert(0, str(ROOT / "scripts/docs"))  # where manual.py imports its tables from
manual = load_script("docs/manual.py")
PAGES = manual.pages()


def test_readme_is_one_screen():
    text = manual.README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800


def test_every_page_is_listed():
    assert manual.unlisted_pages() == []
    assert len(PAGES) > 15


def test_unlisted_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "index.md").write_text("[a](a.md)")
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("# Page\n")
    monkeypatch.setattr(manual, "INDEX", tmp_path / "index.md")
    assert manual.unlisted_pages() == [tmp_path / "b.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    assert manual.broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A page: of `mine`\n[1](#a-page-of-mine) [2](#other) [3](page.md#other) [4](no.md) `[5](no)`\n")
    assert manual.broken_links(page) == ["#other", "page.md#other", "no.md"]


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.name)
def test_pages_are_short(page: Path):
    """Without the generated tables."""
    assert len(manual.TABLE.sub("", page.read_text()).splitlines()) <= 300


def test_commands_are_read_from_the_pages(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```sh\nmake help\n# a comment\nmake cost  # explained\n```\n```text\nmake ui\n```\n")
    assert manual.commands(page) == ["make help", "make cost"]


def test_commands_run_in_order_and_each_page_is_quoted_for_the_shell():
    lines = [line for page in PAGES for line in manual.commands(page)]
    assert lines[0] == "make train model=vgg16_inception"
    assert set(manual.LONG) <= set(lines)
    assert all(shlex.split(line) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_a_maker(page: Path):
    assert {name for _, name, _ in manual.TABLE.findall(page.read_text())} <= manual.TABLES.keys()
