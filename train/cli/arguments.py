"""Words `key=value` into a dataclass, for the commands that need no more than a few keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from train.cli import terminal

Keys = TypeVar("Keys")


def parse(keys: type[Keys], argv: list[str]) -> Keys:
    """An instance of the dataclass `keys`, whose keys all have defaults; a value is converted to its default's type.

    Raises: ValueError naming the word and the keys that exist.
    """
    known = _fields_by_name(keys)
    values: dict[str, Any] = {}
    for word in argv:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            raise ValueError(f"words must be key=value with a key of {', '.join(known)}; got {word}")
        values[known[name].name] = _convert(name, text, known[name].default)
    return keys(**values)


def parse_known(keys: type[Keys], argv: list[str]) -> tuple[Keys, list[str]]:
    """`parse` for the words whose keys are known, and the other words."""
    own = [word for word in argv if word.partition("=")[0] in _fields_by_name(keys)]
    return parse(keys, own), [word for word in argv if word not in own]


def _fields_by_name(keys: type[Any]) -> dict[str, Any]:
    """The fields by the word that is typed: their name, unless their metadata has another `word`."""
    return {item.metadata.get("word", item.name): item for item in fields(keys)}


def _convert(name: str, text: str, default: Any) -> Any:
    kinds = {int: "a whole number", float: "a number"}
    if type(default) not in kinds:
        return text
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError(f"{name} must be {kinds[type(default)]}, got {text}; use e.g. {name}={default}") from None


def print_error(message: str) -> int:
    """Prints a fault in one line; the exit code for what can't be run."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(command: Callable[[list[str]], int | None], *, only_prints: bool = False) -> None:
    """Runs a command's story on the words of the command line; a ValueError becomes one line and exit code 2.

    only_prints: it leaves nothing else behind, so that it ends when nobody reads any more; every other goes on.
    """
    terminal.protect_output(needed=only_prints)
    try:
        code = command(sys.argv[1:])
    except ValueError as fault:
        code = print_error(str(fault))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)
