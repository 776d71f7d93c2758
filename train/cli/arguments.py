"""Command lines: `key=value` arguments, parsed into a dataclass, and the `--help` that describes it."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from train.cli import terminal
from train.cli.fields import TYPE_DESCRIPTIONS, default_of, describe, fields_by_key, find_problem, type_of

Keys = TypeVar("Keys")
Rows = Sequence[tuple[str, str]]  # of a section of `--help`: what is typed, what it means

HELP_FLAGS = ("-h", "--help")
VERSION_FLAG = "--version"
PACKAGE = "inception-laboratory"
MAX_HELP_WIDTH = 120  # characters; longer lines are hard to read
MAX_KEY_WIDTH = 36


@dataclass(frozen=True)
class Override:
    """An argument `key=value`; the value as it was typed."""

    key: str
    value: str

    @classmethod
    def parse(cls, argument: str) -> Override:
        """Raises: ValueError for anything but key=value."""
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(f"arguments must be key=value, got {argument}; --help lists the keys")
        return cls(key.lstrip("+"), value)

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

    @classmethod
    def key_of(cls, argument: str) -> str:
        """The key of an argument; one without a value, such as `~augment`, is its own."""
        return cls.parse(argument).key if "=" in argument else argument


def typed_keys(arguments: Iterable[str]) -> set[str]:
    """The keys of these arguments."""
    return set(map(Override.key_of, arguments))


def parse(keys: type[Keys], argv: Iterable[str]) -> Keys:
    """Parses into an instance of the dataclass `keys`, whose fields are settings with defaults.

    Raises: ValueError naming the key, the value and what is allowed.
    """
    known, others = parse_known(keys, argv)
    check_keys(others, fields_by_key(keys))
    return known


def parse_known(keys: type[Keys], argv: Iterable[str]) -> tuple[Keys, list[Override]]:
    """Parses the arguments whose keys are fields of `keys`; returns the other arguments, too.

    Raises: ValueError as `parse` does, but for an unknown key.
    """
    items = fields_by_key(keys)
    overrides = [Override.parse(argument) for argument in argv]
    known = {items[override.key].name: _convert(keys, override) for override in overrides if override.key in items}
    return keys(**known), [override for override in overrides if override.key not in items]


def check_keys(overrides: Iterable[Override], valid_keys: Iterable[str]) -> None:
    """Raises: ValueError for a key that is not valid."""
    valid_keys = list(valid_keys)
    for override in overrides:
        if override.key not in valid_keys:
            raise ValueError(unknown_key_message(override.key, valid_keys, nearest_key(override.key, valid_keys)))


def _convert(keys: type, override: Override) -> object:
    """The value in its field's type, in range."""
    item = fields_by_key(keys)[override.key]
    plain = type_of(keys, item)[0]  # int, float or str
    try:
        value = plain(override.value)
    except ValueError:
        advice = f"use e.g. {override.key}={default_of(item)}"
        raise ValueError(f"{override.key} must be {TYPE_DESCRIPTIONS[plain]}, got {override.value}; {advice}") from None
    if problem := find_problem(override.key, value, item):
        raise ValueError(problem)
    return value


def nearest_key(key: str, valid_keys: Iterable[str]) -> str | None:
    """The key that a mistyped one is nearest to; None if it resembles none."""
    return next(iter(difflib.get_close_matches(key, list(valid_keys), 1, 0.75)), None)


def unknown_key_message(key: str, valid_keys: Iterable[str], suggestion: str | None) -> str:
    """Names the key that was meant if that is known, else all valid ones."""
    if suggestion:
        return f'unknown key "{key}"; did you mean {suggestion}?'
    return f'unknown key "{key}"; valid keys: {", ".join(valid_keys)}'


# --------------------------------------------------------------------------------------------------------------- help


def help_of(command: Callable[..., object], keys: type, other_keys: str = "") -> str:
    """The help of a command: its module's docstring, and the keys of its dataclass.

    The docstring starts with `make NAME ...`: and a sentence; its indented lines are examples. other_keys: which keys
    the command takes besides.
    """
    module = sys.modules[command.__module__]
    description, examples = split_docstring(module.__doc__ or "")
    name = (module.__spec__ or module).name.rpartition(".")[2]
    rows = [
        describe(keys, key, item, "" if default_of(item) is None else str(default_of(item)))
        for key, item in fields_by_key(keys).items()
    ]
    return format_help(f"make {name} [key=value ...]", description, {"keys": rows}, other_keys, examples)


def split_docstring(text: str) -> tuple[str, list[str]]:
    """The description without the command that it begins with, and the examples, without their indentation."""
    paragraphs = text.strip().split("\n\n")
    examples = [line.strip() for part in paragraphs if part.startswith("    ") for line in part.splitlines()]
    texts = [" ".join(part.split()) for part in paragraphs if not part.startswith("    ")]
    summary = texts[0].partition("`: ")[2]
    return "\n\n".join([summary[:1].upper() + summary[1:], *texts[1:]]).replace("`", ""), examples


def format_help(usage: str, description: str, sections: dict[str, Rows], note: str, examples: Sequence[str]) -> str:
    """Lays a help text out in the width of the terminal, as argparse does."""
    width = max(40, min(shutil.get_terminal_size().columns, MAX_HELP_WIDTH) - 2)
    longest = max(len(typed) for rows in sections.values() for typed, _ in rows)
    formatter = argparse.HelpFormatter("", max_help_position=min(longest + 4, MAX_KEY_WIDTH, width // 2), width=width)
    for title, rows in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(argparse.Action([], typed, metavar=typed, help=_escape(text)) for typed, text in rows)
        formatter.end_section()
    paragraphs = [textwrap.fill(paragraph, width) for paragraph in description.split("\n\n")]
    parts = [f"usage: {usage}", *paragraphs, formatter.format_help().strip("\n")]
    parts += [textwrap.fill(note, width)] if note else []
    return "\n\n".join([*parts, "\n".join(["examples:", *(f"  {line}" for line in examples)])])


def _escape(text: str) -> str:
    return text.replace("%", "%%")  # argparse fills in %(default)s and the like


def version() -> str:
    """The name and version of this project."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


# --------------------------------------------------------------------------------------------------------------- main


def print_error(message: str) -> int:
    """Prints an error in one line; returns the exit code for input that cannot be run."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(
    command: Callable[[list[str]], int | None],
    keys: type,
    *,
    other_keys: str = "",
    only_prints: bool = False,
) -> None:
    """Runs a command with the arguments of the command line; a ValueError becomes one line and exit code 2.

    keys, other_keys: for `--help`, as in `help_of`. only_prints: the command has no other effect, so it ends once its
    output is closed; every other command continues.
    """
    terminal.protect_output(needed=only_prints)
    argv = sys.argv[1:]
    if text := answer_flags(argv, lambda: help_of(command, keys, other_keys)):
        print(text)
        sys.exit()
    try:
        code = command(argv)
    except ValueError as error:
        code = print_error(str(error))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)


def answer_flags(argv: Sequence[str], help_text: Callable[[], str]) -> str | None:
    """What to print for `--help` or `--version`; None if neither was typed."""
    if set(HELP_FLAGS) & set(argv):
        return help_text()
    return version() if VERSION_FLAG in argv else None
