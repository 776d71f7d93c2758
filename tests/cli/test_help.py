"""`--help` of every command, and the examples of commands in help texts, the README and the Makefile."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from support.commands import ROOT, Done, run_command
from train.cli.arguments import parse_known
from train.cli.fields import default_of, fields_by_key
from train.config import help as config_help
from train.config.composition import conf_loader
from train.config.overrides import CONFIG_GROUPS, all_keys, check_overrides

# Command -> the dataclass of its keys.
COMMANDS = {
    "compare": "Compare", "cost": "Cost", "evaluate": "Evaluate", "export": "Export", "predict": "Predict",
    "reap": "Reap", "report": "Report", "resume": "Resume", "serve": "Serve", "sync": "Sync", "ui": "Ui",
}  # fmt: skip
RUNS = {"train": ["--help"], "sweep": ["--multirun", "--help"]}
HEAVY = {"tensorflow", "keras", "mlflow", "jax", "sklearn", "matplotlib"}


def keys_of(command: str) -> type:
    return getattr(importlib.import_module(f"train.{command}"), COMMANDS[command])


@cache
def help_of(command: str, width: int, flag: str = "--help") -> Done:
    words = ["-m", "train", *RUNS[command]] if command in RUNS else ["-m", f"train.{command}", flag]
    return run_command(sys.executable, *words, env={"COLUMNS": str(width)})


def examples_of(text: str) -> list[str]:
    return [line.strip() for line in text.split("\nexamples:\n")[1].splitlines()]


def test_every_command_is_in_the_table():
    targets = re.findall(r"^TARGETS_WITH_KEYS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert sorted(targets) == sorted([*COMMANDS, *RUNS])
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        assert f"-m train.{command} $(FORWARDED)" in makefile


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("command", [*COMMANDS, *RUNS])
def test_help_fits_the_terminal_and_ends_with_examples(command: str, width: int):
    done = help_of(command, width)
    assert (done.code, done.err) == (0, "")
    text, examples = done.out.split("\nexamples:\n")
    assert text.startswith(f"usage: make {command} [key=value")
    assert max(map(len, text.splitlines())) <= min(width, 120)
    assert f"  make {command}" in examples
    assert max(map(len, examples.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_key_with_its_meaning_and_default(command: str):
    text = " ".join(help_of(command, 160).out.split())
    assert fields_by_key(keys_of(command))
    for name, item in fields_by_key(keys_of(command)).items():
        assert f" {name}=" in text
        assert item.metadata["text"] in text
        if default_of(item):
            assert f"default: {default_of(item)})" in text
        for choice in item.metadata["choices"]:
            assert str(choice) in text


@pytest.mark.parametrize("command", [*COMMANDS, *RUNS])
def test_help_needs_no_heavy_library(command: str):
    words = ["train", *RUNS[command]] if command in RUNS else [f"train.{command}", "-h"]
    done = run_command(sys.executable, "-m", *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert done.code == 0
    assert "argparse" in imported
    assert not imported & HEAVY


# ------------------------------------------------------------------------------------------------------ training runs


def test_help_of_train_lists_groups_options_and_sections_but_no_internal_ones():
    text = " ".join(help_of("train", 80).out.split())
    assert "model=NAME network: inception_resnet_v2, inception_v1, inception_v3, vgg16, vgg16_inception (def" in text
    assert "experiment=NAME settings of several keys, on top of the defaults: fashion_mnist, fine_tune, sign_d" in text
    for group in CONFIG_GROUPS:
        assert f" {group}=NAME " in text
    assert "epochs=INTEGER passes over the training split (epochs, at least 1; default: 12)" in text
    assert "a label spread over all classes (at least 0 and below 1; default: 0.1)" in text  # as in conf/config.yaml
    assert "early_stopping.KEY metric, patience_epochs, min_delta" in text
    for internal in ("schema/", "_base", "claim", "sweep.trial", "until", "hydra"):
        assert internal not in text


def test_help_of_sweep_explains_ranges_and_its_keys():
    text = " ".join(help_of("sweep", 80).out.split())
    assert "key=tag(log,interval(1e-4,1e-1)) the same on a logarithmic scale" in text
    assert "sweep.search=NAME search algorithm (grid, random, tpe, asha; default: grid)" in text
    for internal in ("sweep.trial=", "sweep.until", "sweep.final", "sweep.space"):
        assert internal not in text


def test_help_of_data_says_that_the_image_size_depends_on_the_network():
    meanings = dict(config_help.key_tables("data")["data"])
    assert meanings["data.image_size=INTEGER"].endswith(
        "or the model's minimum if larger (px, at least 1; default: null)"
    )


def test_help_of_a_group_says_where_its_options_differ():
    [(title, rows)] = config_help.key_tables("optimizer").items()
    meanings = dict(rows)
    assert title == "optimizer"
    assert meanings["optimizer.learning_rate=NUMBER"] == (
        "peak learning rate, after the warm-up (above 0; default: 0.01; 0.001 with adamw; 0.045 with rmsprop)"
    )
    assert meanings["optimizer.nesterov=true|false"] == "use Nesterov momentum (default: true; only with optimizer=sgd)"
    assert "optimizer.name=TEXT" not in meanings


def test_all_topics_together_explain_every_key():
    typed = [name.partition("=")[0] for rows in config_help.key_tables("all").values() for name, _ in rows]
    sections = {key.rpartition(".")[0] for key in all_keys()}
    assert set(typed) == set(all_keys()) - sections - {"claim", "experiment"}
    assert {name for name in typed if typed.count(name) > 1} == {"data.root", "schedule.factor"}  # of two meanings


def test_unknown_topic_of_help_is_named():
    done = run_command(sys.executable, "-m", "train", "--help", "optimzer")
    assert done.code == 2
    assert done.err.endswith("got optimzer; did you mean optimizer?\n")
    assert done.err.count("\n") == 1


def test_make_passes_the_request_for_help():
    for words in (("train", "ARGS=--help"), ("sweep", "ARGS=-h"), ("evaluate", "ARGS=--help")):
        done = run_command("make", *words)
        assert done.code == 0
        assert done.out.startswith(f"usage: make {words[0]} ")


@pytest.mark.parametrize("words", [["-m", "train", "--version"], ["-m", "train.report", "--version"]])
def test_version_is_that_of_the_project(words: list[str]):
    [version] = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert run_command(sys.executable, *words) == Done(0, f"inception-laboratory {version}\n", "")


# ----------------------------------------------------------------------------------------------------------- examples


def check_example(line: str) -> None:
    """Parses a command line as its command does. Raises: ValueError for an invalid one."""
    _, command, *words = shlex.split(line, comments=True)
    arguments = [word for word in words if not word.startswith("ARGS=")]
    if command in RUNS:
        with conf_loader() as loader:
            check_overrides(arguments, loader, in_sweep=command == "sweep")
        return
    _, others = parse_known(keys_of(command), arguments)
    for override in others:
        if override.key not in (*all_keys(), *CONFIG_GROUPS):
            raise ValueError(f"unknown key {override.key}")


def examples() -> Iterator[str]:
    """The examples of all help texts, and the commands with keys in the README and the Makefile."""
    for command in (*COMMANDS, *RUNS):
        yield from examples_of(help_of(command, 160).out)
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    commands = "|".join([*COMMANDS, *RUNS])
    yield from re.findall(rf"^make (?:{commands})\b.*$", blocks, re.MULTILINE)
    for example in re.findall(rf"## .*: (make (?:{commands})\b.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        yield re.sub(r"\[[^]]*\]|\|\S*", "", example)  # without what is optional, and with the first of several values


def test_examples_are_valid_command_lines():
    lines = list(examples())
    assert len(lines) > 40
    for line in lines:
        check_example(line)


@pytest.mark.parametrize(
    "line",
    [
        "make train model=vgg",
        "make train seed=0,1",
        "make evaluate run=x beauty=1",
        "make predict colour=red",
        "make export format=caffe",
    ],
)
def test_invalid_example_would_be_found(line: str):
    with pytest.raises(ValueError):
        check_example(line)
