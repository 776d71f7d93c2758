"""docs/contributing.md: its patches apply to this version, and what they add works."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT, run_command

PAGE = (ROOT / "docs/contributing.md").read_text()
BLOCKS = re.compile(r"^```(diff|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def copy_of_the_project(place: Path) -> Path:
    """The files that git knows, and nothing else."""
    project = place / "project"
    files = run_command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").out.split("\0")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    return project


def run_line(line: str, project: Path) -> None:
    """`make COMMAND WORD ... ARGS=FLAG`, as make calls it, with the copy's code."""
    command, *words = shlex.split(line)[1:]
    module = "train" if command == "train" else f"train.{command}"
    subprocess.run(
        [sys.executable, "-m", module, *(word.removeprefix("ARGS=") for word in words)],
        cwd=project, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_every_patch_applies_and_its_commands_run(tmp_path: Path):
    """In the order of the page, each on top of the others."""
    project = copy_of_the_project(tmp_path)
    blocks = BLOCKS.findall(PAGE)
    assert [kind for kind, _ in blocks] == ["diff", "text"] * 4
    for kind, text in blocks:
        if kind == "diff":
            subprocess.run(["git", "apply", "-"], cwd=project, input=text, check=True, text=True)
        else:
            for line in text.splitlines():
                run_line(line, project)
    runs = [json.loads(path.read_text()) for path in sorted((project / "runs").glob("*/*/summary.json"))]
    assert sorted({run["model"] for run in runs}) == ["mini_vgg", "vgg16"]
    assert {run["status"] for run in runs} == {"finished"}
    scores = json.loads((project / "runs/latest/evaluation/test/scores.json").read_text())
    assert -1 <= scores["kappa"] <= 1
    assert (project / "runs/latest/augmented.png").exists()
