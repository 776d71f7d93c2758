"""Explains Hydra's and OmegaConf's errors in one line each: what is wrong, what is allowed, what to do."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from train.config import schema as schema
from train.config.schema import Config
from train.config.serialization import flatten, format_value

HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, overrides: list[str] | None = None) -> str:
    """One line for the user: what is wrong, what is allowed, what to do."""
    text = _join_messages(error)
    handlers: tuple[tuple[Callable, Callable], ...] = (
        (_match_missing_option, _missing_option_message),
        (_match_wrong_stage, _wrong_stage_message),
        (_match_wrong_type, _wrong_type_message),
        (_match_unknown_key, unknown_key_message),
        (_match_multiple_values, _multiple_values_message),
        (_match_invalid_override, _invalid_override_message),
    )
    for match, format_message in handlers:
        details = match(error, text)
        if details is not None:
            return format_message(*details, overrides or [])
    return " ".join(text.split())


def _join_messages(error: BaseException | None) -> str:
    """The messages of an error and of its chain of causes, one a line."""
    lines = []
    while error is not None:
        lines.append(str(error))
        error = error.__cause__
    return "\n".join(lines)


def _match_missing_option(error: Exception, _: str) -> tuple | None:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return group, option, sorted(error.options)
    return None


def _missing_option_message(group: str, option: str, options: list[str], _: list[str]) -> str:
    suggestions = difflib.get_close_matches(option, options, 1, 0.5)
    hint = f"; did you mean {group}={suggestions[0]}?" if suggestions else ""
    return f"{group} must be one of {', '.join(options)}, got {option}{hint}"


def _match_wrong_stage(_: Exception, text: str) -> tuple | None:
    """OmegaConf names only the key within the element of the list, not the list."""
    return () if re.search(rf"reference_type=(List\[)?{schema.FineTuneStage.__name__}\b", text) else None


def _wrong_stage_message(overrides: list[str]) -> str:
    name = "fine_tune.stages"
    example = format_value([dataclasses.asdict(schema.FineTuneStage())])
    return f"{name} must be a list like {example}{_got(name, overrides)}"


def _got(name: str, overrides: list[str]) -> str:
    """ ", got VALUE" for the last override of a key; empty if the value comes from a file."""
    values = [value for key, _, value in (override.partition("=") for override in overrides) if key.lstrip("+") == name]
    return f", got {values[-1]}" if values else ""


def _match_wrong_type(_: Exception, text: str) -> tuple | None:
    if re.search(r"could not be converted|is not a valid|is not Optional|Invalid (value|type) assigned", text):
        match = re.search(r"full_key: ([\w.\[\]]+)", text)
        return (match[1],) if match else None
    return None


def _wrong_type_message(name: str, overrides: list[str]) -> str:
    example = _default_values().get(name)
    descriptions = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list: "a list like [a,b]",
        str: "a string",
    }
    problem = f"must be {descriptions[type(example)]}" if type(example) in descriptions else "has the wrong type"
    hint = f"; use e.g. {name}={format_value(example)}" if example not in (None, "") else ""
    return f"{name} {problem}{_got(name, overrides)}{hint}"


def _match_unknown_key(_: Exception, text: str) -> tuple | None:
    match = re.search(r"Could not override '([^']+)'", text)
    match = match or re.search(r"(?:Could not append|already at) '([^']+)'", text)
    match = match or re.search(r"Key '\w+' not in '\w+'\s+full_key: ([\w.\[\]]+)", text)
    return (match[1],) if match else None


def unknown_key_message(name: str, overrides: list[str]) -> str:
    """What to say of a key that does not exist, or only with another option of its group."""
    available = _available_keys(overrides)
    prefix, _, leaf = name.rpartition(".")
    options = schema.GROUPS.get(prefix, {})
    owners = [option for option, node in options.items() if leaf in {item.name for item in dataclasses.fields(node)}]
    if owners:
        return f"{name} exists only for {prefix}={' or '.join(owners)}"
    suggestions = [key for key in available if "." in key and key.rpartition(".")[2] == leaf]
    same_depth = [key for key in available if ("." in key) == ("." in name)]
    suggestions = suggestions or difflib.get_close_matches(name, same_depth, 1, 0.75)
    if suggestions:
        return f'unknown key "{name}"; did you mean {suggestions[0]}?'
    siblings = [key for key in available if key.rpartition(".")[0] == prefix]
    siblings = siblings or [key for key in available if "." not in key]
    return f'unknown key "{name}"; valid keys: {", ".join(siblings)}'


def _match_multiple_values(_: Exception, text: str) -> tuple | None:
    match = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    match = match or re.search(r"'schema/(\w+)/.*is not a subclass of(.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else None


def _multiple_values_message(name: str, value: str, overrides: list[str]) -> str:
    value = dict(override.split("=", 1) for override in overrides if "=" in override).get(name, value).strip("[]")
    all_of_them = "both" if value.count(",") == 1 else "all"
    if name == "tracking.uri":  # it may hold a password
        return f"{name} takes a single value, got several"
    return f"{name} takes a single value, got {value}; to run {all_of_them}: make sweep {name}={value}"


def _match_invalid_override(error: Exception, _: str) -> tuple | None:
    return (error.override,) if isinstance(error, OverrideParseException) else None


def _invalid_override_message(override: str, _: list[str]) -> str:
    if override.lstrip("+").startswith("tracking.uri="):  # it may hold a password
        override = "tracking.uri=..."
    return f"arguments must be key=value, got {override}; quote special characters twice: key=\"'...'\""


def _available_keys(overrides: list[str]) -> list[str]:
    """All keys of the options that these overrides choose."""
    chosen = default_options() | dict(override.split("=", 1) for override in overrides if "=" in override)
    keys = [item.name for item in dataclasses.fields(Config)] + ["experiment"]
    for name, part in vars(Config()).items():
        node = schema.GROUPS[name].get(chosen[name]) if name in schema.GROUPS else type(part)
        if node is not None and dataclasses.is_dataclass(node):
            keys += [f"{name}.{item.name}" for item in dataclasses.fields(node)]
    return sorted(keys)


def default_options() -> dict[str, str]:
    """The default option of every group, from conf/config.yaml."""
    defaults = yaml.safe_load((schema.ROOT / "conf/config.yaml").read_text())["defaults"]
    return {group: name for item in defaults if isinstance(item, dict) for group, name in item.items()}


def _default_values() -> dict[str, Any]:
    """Default values by dotted key, over all options of all groups."""
    values = flatten(dataclasses.asdict(Config()))
    for group, options in schema.GROUPS.items():
        for node in options.values():
            values |= {f"{group}.{name}": value for name, value in flatten(dataclasses.asdict(node())).items()}
    return values
