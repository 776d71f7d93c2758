"""Composes overrides and stored configs, with Hydra, into a checked `Config`."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from train.cli.arguments import unknown_key_message
from train.config import schema as schema
from train.config.overrides import (
    HYDRA_ERRORS,
    Sections,
    check_form,
    check_override,
    check_overrides,
    check_single_value,
    explain,
    parse_overrides,
    schema_sections,
    unknown_config_key_message,
)
from train.config.schema import Config, ConfigError
from train.config.serialization import Redactor, extract_credentials, flatten, format_value, quote_value
from train.config.suggestions import suggest_key
from train.config.validation import check
from train.storage.json_types import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REDACTED = "(from the environment)"


@cache
def register_schema() -> None:
    """Registers the dataclasses with Hydra, under `schema/` so that they are not options of the real groups."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, options in schema.GROUPS.items():
        for name, node in options.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def to_config(node: DictConfig, *, is_stored: bool = False) -> Config:
    """Converts a composed node to dataclasses, checks every value and fills in `data.image_size`.

    is_stored: whether the node comes from a run folder, whose paths have been expanded already.

    Raises: ConfigError.
    """
    try:
        config = OmegaConf.to_object(node)
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from None
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
    """Expands `~` in paths: the shell does not, in `data.root="'~/images'"`."""
    for key in PATH_KEYS:
        group, _, name = key.rpartition(".")
        node = getattr(config, group) if group else config
        if getattr(node, name, None):
            setattr(node, name, _expand_value(key, getattr(node, name)))


def _expand_value(key: str, value: object) -> object:
    """The value of a key; in a path, the home directory replaces `~`."""
    if key in PATH_KEYS and isinstance(value, str):
        return os.path.expanduser(value)  # noqa: PTH111 - keeps the rest as typed
    return value


def _resolve_links(config: Config) -> None:
    """Replaces links such as runs/latest, which may soon name another run, by what they name now."""
    if config.distill.teacher is not None:
        config.distill.teacher = str(Path(config.distill.teacher).resolve())
    weights = Path(config.model.weights or "")
    if weights.parent.name == "best":  # itself a link, which later epochs replace
        config.model.weights = str(weights.parent.parent.resolve() / "best" / weights.name)


def _reject_unknown_keys(config: DataclassInstance, prefix: str = "") -> None:
    """Rejects keys that `+key=value` adds where the overrides could not be checked, as with Hydra's --config-dir."""
    names = {item.name for item in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in names:
            raise ConfigError(unknown_config_key_message(prefix + name, schema_sections()))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _reject_unknown_keys(value, f"{prefix}{name}.")


def compose(overrides: list[str]) -> Config:
    """The config that `make train` would run with these overrides.

    Raises: ConfigError.
    """
    from hydra import compose as hydra_compose

    try:
        with conf_loader() as loader:
            check_overrides(overrides, loader)
            return to_config(hydra_compose("config", overrides=overrides))
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from None


@contextmanager
def conf_loader() -> Iterator[ConfigLoader]:
    """Hydra, set up with conf/ and the schema, but for whatever else uses it in this process."""
    from hydra import initialize_config_dir

    register_schema()
    with isolated_hydra(), initialize_config_dir(str(schema.ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@contextmanager
def isolated_hydra() -> Iterator[None]:
    """Clears Hydra's state, which is global to a process, and restores it for a Hydra command that is running."""
    global_hydra = GlobalHydra.instance()
    previous = global_hydra.hydra
    global_hydra.clear()
    try:
        yield
    finally:
        global_hydra.hydra = previous


def from_stored(
    stored_config: JsonObject,
    overrides: list[str],
    trusted: References | None = None,
    *,
    command_keys: tuple[str, ...] = (),
) -> DictConfig:
    """The config that a run folder holds, with these overrides applied.

    command_keys: keys of the command itself, which the error for an unknown key lists, too.

    Anybody may have written the folder, and `${oc.env:SECRET}` in an address would send the secret there. A stored
    reference is resolved only if `trusted` holds the same one: it was typed, or is in conf/ (the default).

    Raises: ConfigError for an override of an unknown key, and for a value that was neither stored nor passed.
    """
    stored_keys = flatten(stored_config)
    parsed = parse_overrides(overrides)
    overridden = [override.key_or_group for override in parsed]
    valid_keys = [*command_keys, *sorted(stored_keys)]
    for name in overridden:
        if name not in stored_keys:
            raise ConfigError(unknown_key_message(name, valid_keys, suggest_key(name, valid_keys)))
    try:
        names = {group: stored_config[group]["name"] for group in schema.GROUPS}
        node_types = {group: schema.GROUPS[group][name] for group, name in names.items()}
    except (KeyError, TypeError):
        raise ConfigError("config.yaml is not the config of a run; restore the original file") from None
    references = frozenset((key, text) for key, text in find_references(stored_config) if key not in overridden)
    if references and trusted is None:
        trusted = conf_references(names)
    for key, text in sorted(references - (trusted or frozenset())):
        raise ConfigError(
            f"{key} is stored as {text}, a reference that is resolved only on the command line or in conf/; "
            f"pass it again: '{key}={text}'"
        )
    try:
        node = OmegaConf.structured(Config)
        for group, node_type in node_types.items():
            node[group] = OmegaConf.structured(node_type)
        node = cast(DictConfig, OmegaConf.merge(node, stored_config, _to_node(parsed, schema_sections() | node_types)))
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from None
    redacted = [
        name for name, value in flatten(cast(JsonObject, OmegaConf.to_container(node))).items() if value == REDACTED
    ]
    if redacted:
        raise ConfigError(f"{redacted[0]} was not stored with the run; pass it again: {redacted[0]}=VALUE")
    return node


def _to_node(overrides: list[Override], sections: Sections) -> DictConfig:
    """The checked values of the overrides. Raises: ConfigError."""
    node = OmegaConf.create()
    for override in overrides:
        check_form(override)
        check_single_value(override, "use one of them")
        check_override(override, [sections])
        OmegaConf.update(node, override.key_or_group, _expand_value(override.key_or_group, override.value()))
    return node


References = frozenset[tuple[str, str]]  # dotted key, text with ${...}


def find_references(stored_config: JsonObject) -> References:
    """The strings of a config that hold a reference, those in lists included."""
    return frozenset(
        (key, text) for key, value in flatten(stored_config).items() for text in _iterate_strings(value) if "${" in text
    )


def _iterate_strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _iterate_strings(element)


def conf_references(chosen_options: dict[str, str]) -> References:
    """The references in conf/ today. chosen_options: the option of each group."""
    from hydra import compose as hydra_compose

    with conf_loader():
        node = hydra_compose("config", overrides=[f"{group}={name}" for group, name in chosen_options.items()])
    return find_references(cast(JsonObject, OmegaConf.to_container(node, resolve=False)))


# --------------------------------------------------------------------------------------- references and secrets

ENV_REFERENCE = re.compile(r"oc\.env\s*:\s*(\w+)")
WHOLE_REFERENCE = re.compile(r"\$\{\s*[\w.]+\s*(:\s*\w+\s*)?\}")


# Keys that belong to one machine: where a run is stored, and where it is logged.
NOT_REPRODUCED = ("run_dir", "tracking.uri", "tracking.wait_seconds", "data.directory", "data.fingerprint")


def minimal_command(flat_config: JsonObject) -> str:
    """The shortest `make train ...` that reproduces a run on top of conf/. flat_config: values as they were typed."""
    chosen = {group: flat_config[f"{group}.name"] for group in schema.GROUPS}
    defaults = _defaults_for(*(f"{group}={name}" for group, name in chosen.items()))
    overrides = [
        f"{group}={name}"
        for group, name in chosen.items()
        if group in ("model", "data") or name != _defaults_for()[f"{group}.name"]
    ]
    for name, value in flat_config.items():
        if name in defaults and value not in (defaults[name], REDACTED) and name not in NOT_REPRODUCED:
            plain = not isinstance(value, str) or re.fullmatch(r"[\w./:-]+", value) or WHOLE_REFERENCE.fullmatch(value)
            overrides.append(f"{name}={format_value(value) if plain else quote_value(value)}")
    return " ".join(["make train", *map(shlex.quote, overrides)])


@cache
def _defaults_for(*groups: str) -> JsonObject:
    """The flat config of conf/ with these options and no other override."""
    return flatten(dataclasses.asdict(compose(list(groups))))


def make_redactor(node: DictConfig) -> Redactor:
    """The redactor for the secrets of a composed config: environment values, passwords in addresses.

    A value that is nothing but a reference is stored as that reference; one that mixes it with text is not stored.
    """
    raw = flatten(cast(JsonObject, OmegaConf.to_container(node, resolve=False)))
    from_env = {name: str(value) for name, value in raw.items() if ENV_REFERENCE.search(str(value))}
    for _ in raw:  # a reference to such a key leads to the environment, too
        from_env |= {
            name: str(value) for name, value in raw.items() if any(f"${{{key}}}" in str(value) for key in from_env)
        }
    variables = {name for value in from_env.values() for name in ENV_REFERENCE.findall(value)}
    secrets = {os.environ[name]: f"${{oc.env:{name}}}" for name in variables if os.environ.get(name)}
    for address in (str(raw.get("tracking.uri")), *secrets):
        secrets |= dict.fromkeys(extract_credentials(address), "***")
    references = {name: value if WHOLE_REFERENCE.fullmatch(value) else REDACTED for name, value in from_env.items()}
    return Redactor(references, secrets)


@contextmanager
def redacting_errors(redactor: Redactor) -> Iterator[None]:
    """Removes secrets from the messages of errors. Raises: ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(redactor.redact(str(error))) from None
