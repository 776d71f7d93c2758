"""The make targets: what is typed reaches the program unharmed, and what nobody knows is refused."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from support.commands import ROOT, Done, run_command


def make(*words: str) -> Done:
    return run_command("make", *words)


WORDS = [
    "with spaces",
    "a,b",
    "it's",
    'say "hi"',
    "[1,2]",
    "$HOME $(shell touch pwned) ${PATH}",
    "`touch pwned`",
    "* ?",
    "back\\slash",
    "a;b|c&d>e<f",
    "#hash!",
    "~user",
    "100%",
    "é ü 漢",
]


def handed_over(*words: str) -> list[str]:
    """The words that the shell would give to the program: make's own line, with the program's name for printf's."""
    plan = run_command("make", "-n", "train", *words).out
    line = plan.strip().replace(".venv/bin/python -m train", "printf '%s\\0'", 1)
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]


@pytest.mark.parametrize("text", WORDS)
def test_values_arrive_unharmed(text: str):
    assert handed_over(f"tracking.experiment={text}", "seed=3") in (
        [f"tracking.experiment={text}", "seed=3"],
        ["seed=3", f"tracking.experiment={text}"],
    )
    assert not (ROOT / "pwned").exists()


def test_words_in_args_follow_as_the_shell_reads_them():
    assert handed_over("seed=3", "ARGS=--check '~augment' +x=1") == ["seed=3", "--check", "~augment", "+x=1"]


@pytest.mark.parametrize(("exported", "inner"), [("", []), ("export MAKEFLAGS", ["seed=3", "--check"])])
def test_a_make_that_a_recipe_calls_has_no_words_of_the_outer_one(tmp_path: Path, exported: str, inner: list[str]):
    (tmp_path / "recipe.mk").write_text(f"{exported}\ntrain:\n\t@make -n resume\n")
    done = make("-f", "Makefile", "-f", str(tmp_path / "recipe.mk"), "train", "seed=3", "ARGS=--check")
    handed_on = done.out.split("-m train.resume", 1)[1].splitlines()[0]
    assert handed_on.replace("'", "").split() == inner


def test_quoted_values_reach_the_config():
    done = make("train", "model=vgg16", "model.width=0.5", "tracking.experiment='it, has: [all] $x'", "ARGS=--cfg job")
    config = yaml.safe_load(done.out)
    assert (config["model"]["name"], config["model"]["width"]) == ("vgg16", 0.5)
    assert config["tracking"]["experiment"] == "it, has: [all] $x"


REFUSED = {
    ("train", "vgg16"): '"vgg16" is no target and no key=value word; write e.g. model=vgg16, or see: make help',
    ("trian", "model=vgg16"): '"trian" is no target and no key=value word',
    (
        "train",
        "EPOCHS=3",
    ): "EPOCHS is no knob of this Makefile; use one of: PYTHON ARGS QUICK, or key=value in lower case",
    ("torture",): "make torture is called make stress now",
    ("readme-check",): "make readme-check is called make docs-check now",
    ("test", "model=vgg16"): "make test takes no key=value words, got model=...; the targets that do: train",
}


@pytest.mark.parametrize("words", REFUSED)
def test_words_that_nobody_knows_are_refused_before_anything_runs(words: tuple[str, ...]):
    done = make(*words)
    assert done.code == 2
    assert REFUSED[words] in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


def test_check_passes_through_make():
    assert make("train", "model=inception_v3", "ARGS=--check").out == "the config is valid\n"
    done = make("train", "model=inception_v3", "epochs=0", "ARGS=--check")
    assert done.code == 2
    assert done.err.splitlines()[0] == "error: epochs must be at least 1, got 0; use e.g. epochs=12"


def test_help_lists_every_target():
    listed = {line.split()[0] for line in make("help").out.splitlines()}
    makefile = (ROOT / "Makefile").read_text()
    named = {
        word
        for line in makefile.splitlines()
        if line.startswith(("WORDED :=", "PLAIN :="))
        for word in line.split(":=")[1].split()
    }
    assert listed == named


def test_lock_files_hold_hashes_and_no_address():
    for lock in ROOT.glob("requirements/*.lock"):
        text = lock.read_text()
        assert "://" not in text, lock
        blocks = [b for b in text.replace("\\\n", "").splitlines() if b and not b.startswith((" ", "#"))]
        assert blocks, lock
        assert all("--hash=sha256:" in block for block in blocks), lock


def test_an_environment_that_is_stale_keeps_its_interpreter(tmp_path: Path):
    """Made with another Python, then the lock files changed: it is made anew with that one, not with the usual."""
    for name in (
        "Makefile",
        "requirements/base.lock",
        "requirements/dev.lock",
        "requirements/uv.lock",
        "requirements/gpu.lock",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / made_by(plan_setup(tmp_path, "PYTHON=/opt/python3.12"))
    stamp.write_text("/opt/python3.12\n")
    os.utime(stamp, (0, 0))
    plan = plan_setup(tmp_path)
    assert "/opt/python3.12 -m venv --clear .venv" in plan
    assert f'echo "/opt/python3.12" > {stamp.relative_to(tmp_path)}\n' in plan
    os.utime(stamp)
    assert "-m venv" not in plan_setup(tmp_path)


def plan_setup(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["make", "-n", "setup", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def made_by(plan: str) -> str:
    """The file that set-up writes last, and that tells whether the environment is up to date."""
    return re.findall(r"> (\.venv/\.made-with-_opt_python3\.12-\S+)", plan)[-1]


def test_setup_is_instant_when_the_environment_is_there():
    assert "pip install" not in plan_setup(ROOT)
