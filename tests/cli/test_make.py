"""The make targets: overrides reach the program unchanged, and unknown ones are rejected."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
    """The arguments that the shell would pass to the program: make's command line, with printf as the program."""
    plan = run_command("make", "-n", "train", *words).out
    line = plan.strip().replace(".venv/bin/python -m train", "printf '%s\\0'", 1)
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]


@pytest.mark.parametrize("text", WORDS)
def test_make_passes_values_unchanged(text: str):
    assert handed_over(f"tracking.experiment={text}", "seed=3") in (
        [f"tracking.experiment={text}", "seed=3"],
        ["seed=3", f"tracking.experiment={text}"],
    )
    assert not (ROOT / "pwned").exists()


def test_args_are_split_as_by_the_shell():
    assert handed_over("seed=3", "ARGS=--check '~augment' +x=1") == ["seed=3", "--check", "~augment", "+x=1"]


@pytest.mark.parametrize(("exported", "inner"), [("", []), ("export MAKEFLAGS", ["seed=3", "--check"])])
def test_nested_make_does_not_inherit_overrides(tmp_path: Path, exported: str, inner: list[str]):
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
    ("train", "vgg16"): '"vgg16" is neither a target nor key=value; use e.g. model=vgg16, or see: make help',
    ("trian", "model=vgg16"): 'unknown target "trian"; did you mean: make train',
    ("train", "ARGS=--check", "evalute"): 'unknown target "evalute"; did you mean: make evaluate',
    ("Sweep",): 'unknown target "Sweep"; did you mean: make sweep',
    ("it's",): "\"it's\" is neither a target nor key=value; use e.g. model=it's, or see: make help",
    ("trian", "PYTHON=/no/python"): '"trian" is neither a target nor key=value; use e.g. model=trian',
    (
        "train",
        "EPOCHS=3",
    ): "unknown make variable EPOCHS; use one of: PYTHON ARGS QUICK, or key=value in lower case",
    ("torture",): "make torture is now called make stress",
    ("readme-check",): "make readme-check is now called make docs-check",
    ("test", "model=vgg16"): "make test takes no key=value arguments, got model=...; targets that do: train",
}


@pytest.mark.parametrize("words", REFUSED)
def test_unknown_variables_are_rejected_before_anything_runs(words: tuple[str, ...]):
    done = make(*words)
    assert done.code == 2
    assert REFUSED[words] in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


def test_make_passes_check():
    assert make("train", "model=inception_v3", "ARGS=--check").out == "the config is valid\n"
    done = make("train", "model=inception_v3", "epochs=0", "ARGS=--check")
    assert done.code == 2
    assert done.err.splitlines()[0] == "error: epochs must be at least 1, got 0; use e.g. epochs=12"


def test_help_lists_every_target():
    lines = make("help").out.splitlines()
    assert lines[-2:] == ["", "the keys of a command with keys, their types and defaults: make TARGET ARGS=--help"]
    listed = {line.split()[0] for line in lines[:-2]}
    makefile = (ROOT / "Makefile").read_text()
    named = {
        word
        for line in makefile.splitlines()
        if line.startswith(("TARGETS_WITH_KEYS :=", "TARGETS_WITHOUT_KEYS :="))
        for word in line.split(":=")[1].split()
    }
    assert listed == named


def test_lock_files_contain_hashes_and_no_urls():
    for lock in ROOT.glob("requirements/*.lock"):
        text = lock.read_text()
        assert "://" not in text, lock
        blocks = [b for b in text.replace("\\\n", "").splitlines() if b and not b.startswith((" ", "#"))]
        assert blocks, lock
        assert all("--hash=sha256:" in block for block in blocks), lock


def test_stale_environment_keeps_its_interpreter(tmp_path: Path):
    """An environment made with another Python is made again with that one after the lock files change."""
    for name in (
        "Makefile",
        "pyproject.toml",
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
    """The file that setup writes last; it shows whether the environment is up to date."""
    return re.findall(r"> (\.venv/\.made-with-_opt_python3\.12-\S+)", plan)[-1]


def test_setup_does_nothing_when_the_environment_exists():
    assert "pip install" not in plan_setup(ROOT)


@pytest.mark.parametrize("name", ["ui", "sync", "reap"])
def test_former_module_name_of_a_command_is_answered(name: str):
    done = run_command(sys.executable, "-m", f"train.tracking.{name}", "run=x")
    assert (done.code, done.err) == (
        2,
        f"error: python -m train.tracking.{name} is now called python -m train.{name}\n",
    )


def test_unknown_key_of_a_command_is_named():
    done = run_command(sys.executable, "-m", "train.report", "colour=red")
    assert (done.code, done.err) == (2, 'error: unknown key "colour"; valid keys: run\n')
