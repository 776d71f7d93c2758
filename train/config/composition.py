"""From words on a command line to a checked `Config`; what Hydra complains about is told in one line."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import schema as schema
from train.config.schema import Config, ConfigError
from train.config.serialization import Redactor, extract_credentials, flatten
from train.config.validation import check

REDACTED = "(from the environment)"
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


def register_schema() -> None:
    """Makes the dataclasses known to Hydra, in a group of their own so that they are no options of the real groups."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, options in schema.GROUPS.items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def to_config(node: DictConfig, *, is_stored: bool = False) -> Config:
    """The composed node as dataclasses, every value checked, `data.image_size` filled in.

    stored: whether the node comes from a folder, whose paths have been expanded and are taken as they stand.

    Raises: ConfigError.
    """
    try:
        config = OmegaConf.to_object(node)
    except HYDRA_ERRORS as fault:
        raise ConfigError(explain(fault)) from None
    assert isinstance(config, Config)
    _reject_unknown_keys(config)
    check(config)
    if not is_stored:
        _expand_home(config)
    _resolve_links(config)
    config.data.image_size = schema.resolve_image_size(config)
    return config


PATH_KEYS = ("data.root", "data.manual_dir", "data.file", "model.weights", "distill.teacher", "run_dir")


def _expand_home(config: Config) -> None:
    """The shell leaves `~` alone in `data.root=~/images`."""
    for key in PATH_KEYS:
        group, _, name = key.rpartition(".")
        part = getattr(config, group) if group else config
        if getattr(part, name, None):
            setattr(part, name, _expand_value(key, getattr(part, name)))


def _expand_value(key: str, value: Any) -> Any:
    """The value of a key, a path with the home directory in the place of `~`."""
    if key in PATH_KEYS and isinstance(value, str):
        return os.path.expanduser(value)  # noqa: PTH111 - keeps the rest as typed
    return value


def _resolve_links(config: Config) -> None:
    """Runs that are named by runs/latest, which will be another run in a moment."""
    if config.distill.teacher is not None:
        config.distill.teacher = str(Path(config.distill.teacher).resolve())
    weights = Path(config.model.weights or "")
    if weights.parent.name == "best":  # itself a link, which turns
        config.model.weights = str(weights.parent.parent.resolve() / "best" / weights.name)


def _reject_unknown_keys(config: Any, prefix: str = "") -> None:
    """A `+name=value` gets past Hydra's own test for unknown keys."""
    known = {item.name for item in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in known:
            raise ConfigError(_unknown_key_message(prefix + name, []))
        if dataclasses.is_dataclass(value):
            _reject_unknown_keys(value, f"{prefix}{name}.")


def compose(overrides: list[str]) -> Config:
    """What `make train` with these words would run.

    Raises: ConfigError.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    try:
        with isolated_hydra(), initialize_config_dir(str(schema.ROOT / "conf"), version_base="1.3"):
            return to_config(hydra_compose("config", overrides=overrides))
    except HYDRA_ERRORS as fault:
        raise ConfigError(explain(fault, overrides)) from None


@contextmanager
def isolated_hydra() -> Iterator[None]:
    """Hydra has one state for a process; where a command of its own is at work, it finds that as it was."""
    holder = GlobalHydra.instance()
    before = holder.hydra
    holder.clear()
    try:
        yield
    finally:
        holder.hydra = before


def from_stored(stored_config: dict[str, Any], overrides: list[str], trusted: References | None = None) -> DictConfig:
    """The config that a folder holds, with these words in it.

    Anybody may have written the folder, and `${oc.env:SECRET}` in an address would send the secret there. A reference
    in the content is resolved only where the same one is in `trusted`: was typed, or stands in conf/ (the default).

    Raises: ConfigError for a word that is no key of the run, and for a value that was not stored and is not given.
    """
    known = flatten(stored_config)
    for word in overrides:
        name = word.partition("=")[0]
        if name not in known:
            raise ConfigError(f"{name} is no key of this run; use one of run, accept, {', '.join(sorted(known))}")
    typed = {word.partition("=")[0] for word in overrides}
    try:
        names = {group: stored_config[group]["name"] for group in schema.GROUPS}
        kinds = {group: schema.GROUPS[group][name] for group, name in names.items()}
    except (KeyError, TypeError):
        raise ConfigError("config.yaml does not hold a config of this program; put back the file of the run") from None
    given = frozenset((key, text) for key, text in find_references(stored_config) if key not in typed)
    if given and trusted is None:
        trusted = conf_references(names)
    for key, text in sorted(given - (trusted or frozenset())):
        raise ConfigError(
            f"{key} is stored as {text}, which is looked up only where it is typed or stands in conf/; type a value, "
            f"e.g. '{key}={text}'"
        )
    try:
        node = OmegaConf.structured(Config)
        for group, kind in kinds.items():
            node[group] = OmegaConf.structured(kind)
        node = cast(DictConfig, OmegaConf.merge(node, stored_config, _parse_overrides(overrides)))
    except HYDRA_ERRORS as fault:
        raise ConfigError(explain(fault, overrides)) from None
    hidden = [name for name, value in flatten(cast(dict, OmegaConf.to_container(node))).items() if value == REDACTED]
    if hidden:
        raise ConfigError(f"{hidden[0]} must be given again, since it was not stored; use {hidden[0]}=VALUE")
    return node


def _parse_overrides(overrides: list[str]) -> DictConfig:
    """Values in Hydra's grammar, as in `make train`: of YAML's, off would be false."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = OmegaConf.create()
    for word in OverridesParser.create().parse_overrides(overrides):
        if word.is_sweep_override():
            raise ConfigError(f"{word.key_or_group} must be one value, got {word.get_value_string()}; use one of them")
        OmegaConf.update(found, word.key_or_group, _expand_value(word.key_or_group, word.value()))
    return found


References = frozenset[tuple[str, str]]  # dotted key, text with ${...}


def find_references(stored_config: dict[str, Any]) -> References:
    """The texts of a config that refer to something else, those in lists too."""
    return frozenset(
        (key, text) for key, value in flatten(stored_config).items() for text in _iterate_strings(value) if "${" in text
    )


def _iterate_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _iterate_strings(element)


def conf_references(chosen_options: dict[str, str]) -> References:
    """The references that conf/ holds now. names: the option that was chosen of each group."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema()
    with isolated_hydra(), initialize_config_dir(str(schema.ROOT / "conf"), version_base="1.3"):
        node = hydra_compose("config", overrides=[f"{group}={name}" for group, name in chosen_options.items()])
    return find_references(cast(dict, OmegaConf.to_container(node, resolve=False)))


# --------------------------------------------------------------------------------------- what came from outside

ENV_REFERENCE = re.compile(r"oc\.env\s*:\s*(\w+)")
WHOLE_REFERENCE = re.compile(r"\$\{\s*[\w.]+\s*(:\s*\w+\s*)?\}")


# Where a run lies and who hears of it is nobody else's business.
NOT_REPRODUCED = ("run_dir", "tracking.uri", "tracking.wait_seconds", "data.directory", "data.fingerprint")


def minimal_command(flat_config: dict[str, Any]) -> str:
    """The shortest `make train ...` that makes a run of this config, flat and as it was typed, of what conf/ says."""
    chosen = {group: flat_config[f"{group}.name"] for group in schema.GROUPS}
    usual = _defaults_for(*(f"{group}={name}" for group, name in chosen.items()))
    words = [
        f"{group}={name}"
        for group, name in chosen.items()
        if group in ("model", "data") or name != _default_options()[group]
    ]
    for name, value in flat_config.items():
        if name in usual and value not in (usual[name], REDACTED) and name not in NOT_REPRODUCED:
            plain = not isinstance(value, str) or re.fullmatch(r"[\w./:-]+", value) or WHOLE_REFERENCE.fullmatch(value)
            words.append(f"{name}={format_value(value) if plain else quote_value(value)}")
    return " ".join(["make train", *map(shlex.quote, words)])


@cache
def _defaults_for(*groups: str) -> dict[str, Any]:
    """What conf/ says where nothing but these options is typed."""
    return flatten(dataclasses.asdict(compose(list(groups))))


def make_redactor(node: DictConfig) -> Redactor:
    """What of a composed config is not for anybody's eyes: environment values, passwords in addresses.

    A value that is nothing but a reference is stored as the reference; one that mixes it with text is not stored.
    """
    raw = flatten(cast(dict, OmegaConf.to_container(node, resolve=False)))
    stored = {name: str(value) for name, value in raw.items() if ENV_REFERENCE.search(str(value))}
    for _ in raw:  # a reference to such a key is one, too
        stored |= {
            name: str(value) for name, value in raw.items() if any(f"${{{key}}}" in str(value) for key in stored)
        }
    variables = {name for value in stored.values() for name in ENV_REFERENCE.findall(value)}
    secrets = {os.environ[name]: f"${{oc.env:{name}}}" for name in variables if os.environ.get(name)}
    for address in (str(raw.get("tracking.uri")), *secrets):
        secrets |= dict.fromkeys(extract_credentials(address), "***")
    shown = {name: value if WHOLE_REFERENCE.fullmatch(value) else REDACTED for name, value in stored.items()}
    return Redactor(shown, secrets)


@contextmanager
def redacting_errors(redactor: Redactor) -> Iterator[None]:
    """What is wrong with a config is told without what must not be shown. Raises: ConfigError."""
    try:
        yield
    except ValueError as fault:
        raise ConfigError(redactor.redact(str(fault))) from None


# ---------------------------------------------------------------------------------------- Hydra's faults in one line


def explain(error: Exception, overrides: list[str] | None = None) -> str:
    """One line for the user: what was given, what is allowed, what to do."""
    text = _join_messages(error)
    kinds: tuple[tuple[Callable, Callable], ...] = (
        (_match_missing_option, _missing_option_message),
        (_match_wrong_stage, _wrong_stage_message),
        (_match_wrong_type, _wrong_type_message),
        (_match_unknown_key, _unknown_key_message),
        (_match_multiple_values, _multiple_values_message),
        (_match_invalid_override, _invalid_override_message),
    )
    for match, sentence in kinds:
        found = match(error, text)
        if found is not None:
            return sentence(*found, overrides or [])
    return " ".join(text.split())


def _join_messages(error: BaseException | None) -> str:
    """All messages from the fault down to its cause."""
    lines = []
    while error is not None:
        lines.append(str(error))
        error = error.__cause__
    return "\n".join(lines)


def _match_missing_option(error: Exception, _: str) -> tuple | None:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, given = (error.missing_cfg_file or "").rpartition("/")
        return group, given, sorted(error.options)
    return None


def _missing_option_message(group: str, option: str, options: list[str], _: list[str]) -> str:
    near = difflib.get_close_matches(option, options, 1, 0.5)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group} must be one of {', '.join(options)}, got {option}{hint}"


def _match_wrong_stage(_: Exception, text: str) -> tuple | None:
    """Told with the key within the element, which says nothing by itself."""
    return () if re.search(rf"reference_type=(List\[)?{schema.FineTuneStage.__name__}\b", text) else None


def _wrong_stage_message(overrides: list[str]) -> str:
    name = "fine_tune.stages"
    typed = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith(f"{name}=")]
    example = format_value([dataclasses.asdict(schema.FineTuneStage())])
    return f"{name} must be a list like {example}, got {typed[-1] if typed else 'that'}"


def _match_wrong_type(_: Exception, text: str) -> tuple | None:
    if re.search(r"could not be converted|is not a valid|is not Optional|Invalid (value|type) assigned", text):
        found = re.search(r"full_key: ([\w.\[\]]+)", text)
        return (found[1],) if found else None
    return None


def _wrong_type_message(name: str, overrides: list[str]) -> str:
    words = [word.partition("=") for word in overrides]
    typed = [value for key, _, value in words if key.lstrip("+") == name]
    example = _default_values().get(name)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", list: "a list like [a,b]", str: "a word"}
    hint = f"; use e.g. {name}={format_value(example)}" if example not in (None, "") else ""
    return f"{name} must be {kinds.get(type(example), 'of another type')}, got {typed[-1] if typed else 'that'}{hint}"


def format_value(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return "[" + ",".join(map(format_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{format_value(element)}" for name, element in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def quote_value(text: str) -> str:
    """A text as one would type it where it may hold what Hydra's grammar has a use for."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"


def _match_unknown_key(_: Exception, text: str) -> tuple | None:
    found = re.search(r"Could not override '([^']+)'", text)
    found = found or re.search(r"(?:Could not append|already at) '([^']+)'", text)
    found = found or re.search(r"Key '\w+' not in '\w+'\s+full_key: ([\w.\[\]]+)", text)
    return (found[1],) if found else None


def _unknown_key_message(name: str, overrides: list[str]) -> str:
    known = _available_keys(overrides)
    leaf, prefix = name.rpartition(".")[2], name.rpartition(".")[0]
    options = schema.GROUPS.get(prefix, {})
    owners = [option for option, node in options.items() if leaf in {item.name for item in dataclasses.fields(node)}]
    if owners:
        return f"{name} is no key of the chosen {prefix}; it belongs to {prefix}={' or '.join(owners)}"
    near = [k for k in known if "." in k and k.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(name, [k for k in known if ("." in k) == ("." in name)], 1, 0.75)
    if near:
        return f"{name} is no key; did you mean {near[0]}?"
    siblings = [k for k in known if k.rpartition(".")[0] == prefix] or [k for k in known if "." not in k]
    return f"{name} is no key{f' of {prefix}' if prefix else ''}; use one of {', '.join(siblings)}"


def _match_multiple_values(_: Exception, text: str) -> tuple | None:
    found = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    found = found or re.search(r"'schema/(\w+)/.*is not a subclass of(.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else None


def _multiple_values_message(name: str, value: str, overrides: list[str]) -> str:
    value = dict(word.split("=", 1) for word in overrides if "=" in word).get(name, value).strip("[]")
    value = "..." if name == "tracking.uri" else value
    return f"{name} must be one value, got {value}; to try each of them use make sweep {name}={value}"


def _match_invalid_override(error: Exception, _: str) -> tuple | None:
    return (error.override,) if isinstance(error, OverrideParseException) else None


def _invalid_override_message(override: str, _: list[str]) -> str:
    if override.lstrip("+").startswith("tracking.uri="):  # it may hold a password
        override = "tracking.uri=..."
    return f"words must be key=value, got {override}; put quotes inside for special characters: key=\"'...'\""


def _available_keys(overrides: list[str]) -> list[str]:
    """All keys of the options that these words choose."""
    chosen = _default_options() | dict(word.split("=", 1) for word in overrides if "=" in word)
    keys = [item.name for item in dataclasses.fields(Config)] + ["experiment"]
    for name, part in vars(Config()).items():
        node = schema.GROUPS[name].get(chosen[name]) if name in schema.GROUPS else type(part)
        if node is not None and dataclasses.is_dataclass(node):
            keys += [f"{name}.{item.name}" for item in dataclasses.fields(node)]
    return sorted(keys)


def _default_options() -> dict[str, str]:
    """The option of every group that is taken where none is typed."""
    defaults = yaml.safe_load((schema.ROOT / "conf/config.yaml").read_text())["defaults"]
    return {group: name for item in defaults if isinstance(item, dict) for group, name in item.items()}


def _default_values() -> dict[str, Any]:
    """Default values by dotted key, over all options of all groups."""
    values = flatten(dataclasses.asdict(Config()))
    for group, options in schema.GROUPS.items():
        for node in options.values():
            values |= {f"{group}.{name}": value for name, value in flatten(dataclasses.asdict(node())).items()}
    return values
