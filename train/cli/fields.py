"""A key of a command line or of the config: a dataclass field with a meaning, a unit, and a range or choices.

This file declares such fields, describes them for `--help`, and checks their values.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

Suggest = Callable[[object, Sequence[object]], object]  # a value and the choices -> the choice that was meant, or None

TYPE_NAMES = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", list: "[A,B]", dict: "{A:B}"}
TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list like [a,b]",
    dict: "a mapping like {a:b}",
}


def setting(
    default: object,
    text: str,
    *,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[object, ...] = (),
    word: str = "",
    internal: bool = False,
) -> Any:  # the field stands for a value of its own type, as dataclasses.field does
    """A dataclass field with a meaning, a unit, and a range (`ge <= v <= le` or `gt < v < lt`) or `choices`.

    word: the key that is typed, if it is not the field's name. internal: commands or files set the key, nobody types
    it.
    """
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata: dict[str, object] = {"text": text, "unit": unit, "choices": choices, "limits": limits}
    metadata |= {"word": word, "internal": internal}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fields_by_key(keys: type) -> dict[str, Field[object]]:
    """The fields of a dataclass by the key that is typed: their name, or the `word` of their setting."""
    return {item.metadata.get("word") or item.name: item for item in fields(keys)}


# ------------------------------------------------------------------------------------------------------ descriptions


def type_of(keys: type, item: Field[object]) -> tuple[type, bool]:
    """The plain type of a field's values, and whether null is one, too: `list[str]` -> list, `int | None` -> int."""
    hint = typing.get_type_hints(keys)[item.name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    [plain] = [part for part in parts if part is not types.NoneType]
    return typing.get_origin(plain) or plain, types.NoneType in parts


def default_of(item: Field[object]) -> object:
    """The default value of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def describe_limits(item: Field[object]) -> str:
    """A key's range in words, such as "at least 0 and below 1"."""
    phrases = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = item.metadata["limits"].items()
    return " and ".join(f"{phrases[name]} {limit:.10g}" for name, limit in limits if limit is not None)


def describe(keys: type, name: str, item: Field[object], default: str) -> tuple[str, str]:
    """What `--help` says of a key: `key=TYPE`, and its meaning, range or choices, and default."""
    choices = ", ".join(map(str, item.metadata["choices"]))
    allowed = [item.metadata["unit"], choices or describe_limits(item)]
    details = "; ".join(filter(None, (", ".join(filter(None, allowed)), f"default: {default}" if default else "")))
    type_name = "NAME" if choices and type_of(keys, item)[0] is str else TYPE_NAMES[type_of(keys, item)[0]]
    return f"{name}={type_name}", f"{item.metadata['text']}{f' ({details})' if details else ''}"


# ------------------------------------------------------------------------------------------------------------ checks


def nearest(value: object, choices: Sequence[object]) -> object:
    """The choice that a mistyped value is nearest to; None if it resembles none."""
    matches = difflib.get_close_matches(str(value), list(map(str, choices)), 1, 0.6)
    return matches[0] if matches else None


def find_problem(name: str, value: object, item: Field[object], suggest: Suggest = nearest) -> str | None:
    """What is wrong with a value of the right type: not finite, none of the choices, out of range."""
    choices = item.metadata["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} must be a finite number, got {value}; use e.g. {name}={example(item)}"
    if choices and value not in choices:
        return choices_message(name, value, choices, suggest(value, choices), in_list=item.default is MISSING)
    if isinstance(value, int | float) and _is_out_of_range(value, item.metadata["limits"]):
        return f"{name} must be {describe_limits(item)}, got {value}; use e.g. {name}={example(item)}"
    return None


def choices_message(
    name: str, value: object, choices: Sequence[object], suggestion: object, *, in_list: bool = False
) -> str:
    """Names the choices, and the one that was meant if that is known. in_list: the value is an element of a list."""
    meant = f"{suggestion}" if in_list else f"{name}={suggestion}"
    hint = f"; did you mean {meant}?" if suggestion is not None else ""
    return f"{name} must be one of {', '.join(map(str, choices))}, got {value}{hint}"


def _is_out_of_range(value: float, limits: dict[str, float | None]) -> bool:
    ge, gt, le, lt = (limits[name] for name in ("ge", "gt", "le", "lt"))
    is_too_low = (ge is not None and value < ge) or (gt is not None and value <= gt)
    return is_too_low or (le is not None and value > le) or (lt is not None and value >= lt)


def example(item: Field[object]) -> object:
    """A valid value of a key that has a range, as it is typed."""
    default = default_of(item)
    if isinstance(default, list):
        return "[" + ",".join(map(str, default)) + "]"
    if isinstance(default, int | float) and not isinstance(default, bool):
        return default
    least = item.metadata["limits"]["ge"]
    return least if least is not None else 0.5
