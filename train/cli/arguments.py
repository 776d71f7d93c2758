"""Parses `key=value` arguments into a dataclass, for the commands that take only a few keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from train.cli import terminal

Keys = TypeVar("Keys")


def parse(keys: type[Keys], argv: list[str]) -> Keys:
    """Parses into an instance of the dataclass `keys`, whose fields all have defaults; values get their default's type.

    Raises: ValueError naming the argument and the valid keys.
    """
    fields_by_name = _fields_by_name(keys)
    values: dict[str, Any] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"arguments must be key=value, got {argument}; valid keys: {', '.join(fields_by_name)}")
        if name not in fields_by_name:
            raise ValueError(f'unknown key "{name}"; valid keys: {", ".join(fields_by_name)}')
        item = fields_by_name[name]
        values[item.name] = _convert(name, text, item.default)
    return keys(**values)


def parse_known(keys: type[Keys], argv: list[str]) -> tuple[Keys, list[str]]:
    """Parses the arguments whose keys are fields of `keys`; returns the other arguments, too."""
    names = _fields_by_name(keys)
    known = [argument for argument in argv if argument.partition("=")[0] in names]
    return parse(keys, known), [argument for argument in argv if argument not in known]


def _fields_by_name(keys: type[Any]) -> dict[str, Any]:
    """The fields by the key that is typed: their name, unless their metadata holds another `word`."""
    return {item.metadata.get("word", item.name): item for item in fields(keys)}


def _convert(name: str, text: str, default: Any) -> Any:
    descriptions = {int: "a whole number", float: "a number"}
    if type(default) not in descriptions:
        return text
    try:
        return type(default)(text)
    except ValueError:
        description = descriptions[type(default)]
        raise ValueError(f"{name} must be {description}, got {text}; use e.g. {name}={default}") from None


def print_error(message: str) -> int:
    """Prints an error in one line; returns the exit code for input that cannot be run."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(command: Callable[[list[str]], int | None], *, only_prints: bool = False) -> None:
    """Runs a command with the arguments of the command line; a ValueError becomes one line and exit code 2.

    only_prints: the command has no other effect, so it ends once its output is closed; every other command continues.
    """
    terminal.protect_output(needed=only_prints)
    try:
        code = command(sys.argv[1:])
    except ValueError as error:
        code = print_error(str(error))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)
