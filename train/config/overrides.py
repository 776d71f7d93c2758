"""Overrides, `key=value`: parsed by Hydra's grammar, and checked against the schema before Hydra composes anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from train.cli import arguments
from train.cli.fields import TYPE_DESCRIPTIONS, choices_message, default_of, find_problem, type_of
from train.config import schema as schema
from train.config.schema import Config, ConfigError, SeveralFaultsError
from train.config.serialization import format_value
from train.config.suggestions import other_name_of, suggest_key, suggest_value, suggest_whole_number
from train.config.validation import check_value

HYDRA_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
CONFIG_GROUPS = (*schema.GROUPS, "experiment", "sweep")  # the folders of conf/
SECRET_KEY = "tracking.uri"  # it may hold a password, so no message repeats its value
Sections = dict[str, type]  # dataclass of every section of a config, by its key; "" for the keys without a section


def parse_overrides(overrides: Iterable[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parses by Hydra's grammar. loader: needed for `glob(*)`. Raises: ConfigError for what is no override."""
    parser = OverridesParser.create(config_loader=loader)
    return [_parse(parser, text) for text in overrides]


def _parse(parser: OverridesParser, text: str) -> Override:
    try:
        [override] = parser.parse_overrides([text])  # unlike `parse_override`, this passes the loader on
        return override
    except HydraException:
        key = arguments.Override.key_of(text).lstrip("~")
        shown = f"{key}=..." if "=" in text and may_hold_secret(key, text) else text
    groups = [group for group, options in schema.GROUPS.items() if text in options]
    advice = f"use {groups[0]}={text}" if groups else "quote special characters twice: key=\"'...'\""
    raise ConfigError(f"arguments must be key=value, got {shown}; {advice}")


def may_hold_secret(key: str, text: str) -> bool:
    """Whether no message may repeat the value: of the key with a secret or its section, and any address."""
    return f"{SECRET_KEY}.".startswith(f"{key}.") or "://" in text


def check_grammar(overrides: list[str], *, in_sweep: bool) -> list[str]:
    """Checks what needs neither the schema nor conf/; returns the overrides.

    Raises: ConfigError for bad grammar, and, unless `in_sweep`, for several values.
    """
    for override in parse_overrides(overrides):
        if not in_sweep:
            check_single_value(override)
    return overrides


def check_overrides(overrides: Iterable[str], loader: ConfigLoader, *, in_sweep: bool = False) -> None:
    """Checks the overrides of one run, or, with `in_sweep`, of a sweep. loader: of conf/.

    Raises: ConfigError for an unknown key or option, a key of another option, a wrong type, a value out of range,
    several values where one is needed.
    """
    parsed = [override for override in parse_overrides(overrides, loader) if not override.is_hydra_override()]
    faults = Faults()
    well_formed = faults.keep_valid(parsed, check_form)
    if not in_sweep:
        well_formed = faults.keep_valid(well_formed, check_single_value)
    group_overrides = [override for override in well_formed if _selects_option(override, loader)]
    chosen = faults.keep_valid(group_overrides, lambda override: _check_options(override, loader))
    candidates = [sections_of(choices, loader) for choices in _combinations(chosen)]
    unknown = {o.key_or_group for o in parsed if o.key_or_group in CONFIG_GROUPS and o not in well_formed}
    unknown |= {o.key_or_group for o in group_overrides if o not in chosen}
    if unknown <= set(schema.GROUPS):  # else any group may have another option
        keys = [o for o in well_formed if o not in group_overrides and o.key_or_group.partition(".")[0] not in unknown]
        faults.keep_valid(keys, lambda override: check_override(override, candidates))
    faults.raise_all()


class Faults:
    """The messages about invalid overrides."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def keep_valid(self, overrides: list[Override], check: Callable[[Override], None]) -> list[Override]:
        """The overrides that pass the check, which raises ConfigError for the others."""
        return [override for override in overrides if self._passes(override, check)]

    def _passes(self, override: Override, check: Callable[[Override], None]) -> bool:
        try:
            check(override)
        except ConfigError as error:
            self._messages.append(str(error))
            return False
        return True

    def raise_all(self) -> None:
        """Raises: ConfigError for a single fault, SeveralFaultsError for several."""
        if self._messages:
            raise SeveralFaultsError(self._messages) if len(self._messages) > 1 else ConfigError(self._messages[0])


def add_missing_keys(overrides: Iterable[str], loader: ConfigLoader) -> list[str]:
    """The checked overrides of a sweep, as Hydra takes them: with `++` before each key that only swept options have.

    Hydra composes a sweep once with the default options, then every trial with its own.
    """
    parsed = parse_overrides(overrides, loader)
    fixed = [o for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]
    sections = sections_of(chain(*(_option_words(o) for o in fixed if _selects_option(o, loader))), loader)
    missing = [o for o in fixed if not _selects_option(o, loader) and _is_missing(o.key_or_group, sections)]
    return [f"++{str(o.input_line).lstrip('+')}" if o in missing else str(o.input_line) for o in parsed]


def _is_missing(name: str, sections: Sections) -> bool:
    return name not in sections and find_key(name, sections) is None and not _is_inside_a_value(name, sections)


# ------------------------------------------------------------------------------------------------------- one override


def check_form(override: Override) -> None:
    """Rejects what Hydra's grammar allows and a fixed schema has no use for. Raises: ConfigError."""
    key = override.key_or_group
    if override.package is not None:
        raise ConfigError(f"{key}@{override.package} is not supported: the package of a group is fixed; use {key}=NAME")
    if override.is_delete() and key not in (*_removable_groups(), "experiment", "sweep"):
        raise ConfigError(f"~{key}: a key cannot be removed; set it instead: {key}=VALUE")
    if override.is_add() and (key in CONFIG_GROUPS or key in all_keys()):
        raise ConfigError(f"+{key}: the key exists already; omit the +")


def check_single_value(override: Override, advice: str | None = None) -> None:
    """Rejects several values outside a sweep. advice: what to do, by default a sweep. Raises: ConfigError."""
    if override.is_sweep_override():
        raise ConfigError(_single_value_message(override, advice or _sweep_advice(override)))


def _removable_groups() -> list[str]:
    """The groups that the schema has a default option for, such as augment (none)."""
    return [group for group in schema.GROUPS if getattr(Config(), group).name]


def _single_value_message(override: Override, advice: str) -> str:
    key = override.key_or_group
    if may_hold_secret(key, override.get_value_string()):
        return f"{key} takes a single value, got several"
    return f"{key} takes a single value, got {_without_brackets(override)}; {advice}"


def _sweep_advice(override: Override) -> str:
    values = _without_brackets(override)
    if _takes_list(override.key_or_group) and not any(isinstance(value, list) for value in values_of(override)):
        return f"use a list: {override.key_or_group}=[{values}]"
    all_of_them = "both" if values.count(",") == 1 and "(" not in values else "all"
    return f"to run {all_of_them}: make sweep {override.key_or_group}={values}"


def _without_brackets(override: Override) -> str:
    text = override.get_value_string()
    return text.strip("[]") if isinstance(override.value(), list) else text


def _takes_list(name: str) -> bool:
    key = find_key(name, _all_sections(name))
    return key is not None and type_of(key.owner, key.item)[0] is list


def values_of(override: Override) -> list[object]:
    """The values of an override, of a range (`range(0,9)`, `interval(0,1)`) its ends; several only in a sweep."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [end for end in (value.start, value.end) if end is not None]
    if isinstance(value, RangeSweep):
        _check_step(override.key_or_group, value)
        numbers = value.range()
        return _ends(numbers if isinstance(numbers, range) else list(numbers))
    return sweep_values(override) if override.is_sweep_override() else [value]


def sweep_values(override: Override) -> list[object]:
    """Every value of a sweep over a list or a range. Raises: ConfigError for a range without end."""
    value = override.value()
    if isinstance(value, RangeSweep):
        _check_step(override.key_or_group, value)
    return [_plain(value) for value in override.sweep_iterator()]


def _check_step(key: str, sweep: RangeSweep) -> None:
    if sweep.step == 0:
        raise ConfigError(f"{key} must be a range with a step other than 0; use e.g. {key}=range(0,10,2)")


def _ends(values: Sequence[object]) -> list[object]:
    return [values[0], values[-1]] if len(values) > 1 else list(values)


def _plain(value: object) -> object:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {_plain(name): _plain(element) for name, element in value.items()}
    return value


# ------------------------------------------------------------------------------------------------------------ options


def _selects_option(override: Override, loader: ConfigLoader) -> bool:
    """Whether it selects options of a group of conf/, of the user's own, too; a dict holds values of a group's keys.

    Raises: ConfigError for several dicts.
    """
    group = override.key_or_group
    if group in schema_sections() and not override.is_delete():
        values = [override.value()] if isinstance(override.value(), Glob) else values_of(override)
        if any(isinstance(value, dict) for value in values):
            if override.is_sweep_override():
                raise ConfigError(f"{group} takes no mapping in a sweep; sweep over its keys: {group}.KEY=a,b")
            return False
    return group in CONFIG_GROUPS or bool(loader.get_group_options(group))


def _check_options(override: Override, loader: ConfigLoader) -> None:
    """Rejects an option that conf/ does not have."""
    group = override.key_or_group
    if override.is_delete() or (override.is_sweep_override() and isinstance(override.value(), Glob)):
        return
    for value in values_of(override):
        if isinstance(value, list):
            raise ConfigError(_single_value_message(override, _sweep_advice(override)))
        if value is None and group not in schema.GROUPS:
            raise ConfigError(f"{group}=null is not needed: omit it")
        option = str(value).removesuffix(".yaml")
        if option not in (options := options_of(group, loader, option)):
            suggestion = suggest_value(group, format_value(value), options)
            typed = f"+{group}" if override.is_add() else group
            raise ConfigError(choices_message(typed, format_value(value), options, suggestion))


def options_of(group: str, loader: ConfigLoader, like: str = "") -> list[str]:
    """The options of a group in conf/; with `like` in a sub-folder, such as claims/depth, those of that folder."""
    folder = like.rpartition("/")[0]
    if folder and (names := loader.get_group_options(f"{group}/{folder}")):
        return sorted(f"{folder}/{name}" for name in names if not name.startswith("_"))
    return sorted(name for name in loader.get_group_options(group) if not name.startswith("_"))


def _combinations(group_overrides: list[Override]) -> Iterator[tuple[str, ...]]:
    """Choices of options, as overrides, in which every option that a sweep names occurs."""
    words = {override.key_or_group: _option_words(override) for override in group_overrides}
    first = {group: options[0] for group, options in words.items() if options}
    yield tuple(first.values())
    for group, options in words.items():
        for option in options[1:]:
            yield tuple((first | {group: option}).values())


def _option_words(override: Override) -> list[str]:
    if override.is_delete():
        return [f"~{override.key_or_group}"]
    prefix = "+" if override.is_add() else ""
    return [f"{prefix}{override.key_or_group}={format_value(value)}" for value in values_of(override)]


def sections_of(choices: Iterable[str], loader: ConfigLoader) -> Sections:
    """The dataclass of every section, with these options chosen and whatever those choose in turn.

    An option builds on a dataclass of the schema by `/schema/GROUP/NAME@_here_` in its defaults.
    """
    sections = schema_sections()
    for default in loader.compute_defaults_list("config", list(choices), RunMode.RUN).defaults:
        folder, _, path = (default.config_path or "").partition("/")
        group, _, option = path.partition("/")
        if folder == "schema" and option:
            sections[group] = schema.GROUPS[group][option]
    return sections


def schema_sections() -> Sections:
    """The dataclasses of the schema, of groups those that hold the keys of every option."""
    parts = vars(Config()).items()
    return {"": Config} | {name: type(part) for name, part in parts if dataclasses.is_dataclass(part)}


# --------------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key:
    """A key of the schema: `item` is its field in the dataclass `owner`."""

    name: str
    owner: type
    item: dataclasses.Field[object]


def find_key(name: str, sections: Sections) -> Key | None:
    """The key with this name, or None."""
    section, _, leaf = name.rpartition(".")
    owner = sections.get(section)
    items = dataclasses.fields(owner) if owner else ()
    return next((Key(name, owner, item) for item in items if owner and item.name == leaf), None)


def check_override(override: Override, candidates: list[Sections]) -> None:
    """Checks an override of a key in each of the combinations of options. Raises: ConfigError."""
    _check_interval(override)
    for value in values_of(override):
        several = override.is_sweep_override()
        text = format_value(value) if several else override.get_value_string()
        for sections in candidates:
            _check_value(override.key_or_group, value, text, sections)


def _check_interval(override: Override) -> None:
    """Rejects an interval, which holds fractions, for a key that takes whole numbers."""
    name = override.key_or_group
    value = override.value()
    key = find_key(name, _all_sections(name))
    if not isinstance(value, IntervalSweep) or key is None or type_of(key.owner, key.item)[0] is not int:
        return
    if value.start is None or value.end is None:
        return
    advice = f"{name}=range({math.ceil(value.start)},{math.floor(value.end) + 1})"
    raise ConfigError(f"{name} must be a whole number, got {override.get_value_string()}; use {advice}")


def _check_value(name: str, value: object, text: str, sections: Sections) -> None:
    """Checks that the key exists and takes the value. text: the value as typed. Raises: ConfigError."""
    if name in sections and isinstance(value, dict):
        for leaf, element in value.items():
            _check_value(f"{name}.{leaf}", element, format_value(element), sections)
        return
    key = find_key(name, sections)
    if key is None and _is_inside_a_value(name, sections):
        return  # an element of a list or a mapping: composing checks the whole value
    if key is None:
        raise ConfigError(unknown_config_key_message(name, sections))
    if name in sections:
        raise ConfigError(_section_message(name, sections[name], text))
    _check_type_and_range(key, value, text)


def _is_inside_a_value(name: str, sections: Sections) -> bool:
    """Whether the name leads into a list or a mapping: `fine_tune.stages.0.epochs`, `claim.variants.plain`."""
    parts = name.split(".")
    parents = (find_key(".".join(parts[:length]), sections) for length in range(2, len(parts)))
    return any(type_of(key.owner, key.item)[0] in (list, dict) for key in parents if key)


def _check_type_and_range(key: Key, value: object, text: str) -> None:
    section, _, leaf = key.name.rpartition(".")
    if section in schema.GROUPS and leaf == "name" and value != default_of(key.item):
        raise ConfigError(f"{key.name} cannot be set by itself, got {text}; use {section}={text}")
    node = OmegaConf.structured(key.owner)
    try:
        OmegaConf.update(node, leaf, value)
    except OmegaConfBaseException:
        raise ConfigError(wrong_type_message(key, text)) from None
    if "${" not in str(value):  # a reference has its value only after composing
        check_value(key.name, getattr(OmegaConf.to_object(node), leaf), key.item)


# ----------------------------------------------------------------------------------------------------------- messages


def wrong_type_message(key: Key, text: str | None = None) -> str:
    """What the key takes. text: the value as typed; None if it comes from a file."""
    plain, optional = type_of(key.owner, key.item)
    got = "" if text is None or may_hold_secret(key.name, text) else f", got {text}"
    default = default_of(key.item)
    if default == [] and key.name == "fine_tune.stages":
        default = [dataclasses.asdict(schema.FineTuneStage())]
        return f"{key.name} must be a list like {format_value(default)}{got}"
    whole = suggest_whole_number(text or "") if plain is int else None
    if whole is not None and not find_problem(key.name, whole, key.item):
        advice = f"; use {key.name}={whole}"
    else:
        advice = f"; use e.g. {key.name}={format_value(default)}" if default not in (None, "") else ""
    return f"{key.name} must be {TYPE_DESCRIPTIONS[plain]}{' or null' if optional else ''}{got}{advice}"


def _section_message(name: str, section: type, text: str = "") -> str:
    example = next(item.name for item in dataclasses.fields(section))
    got = "" if not text or may_hold_secret(name, text) else f", got {text}"
    return f"{name} is a section and takes no value{got}; set one of its keys, e.g. {name}.{example}=..."


def unknown_config_key_message(name: str, sections: Sections) -> str:
    """What to say of a key that does not exist, or only with another option of its group."""
    section, _, leaf = name.rpartition(".")
    if owners := _options_with(section, leaf):
        return f"{name} exists only for {section}={' or '.join(owners)}"
    available = keys_of(sections)
    if (meant := other_name_of(name, all_keys())) and meant not in available:
        return arguments.unknown_key_message(name, (), f"{meant} (only with {_only_with(meant)})")
    if meant := suggest_key(name, available):
        return arguments.unknown_key_message(name, (), meant)
    siblings = sorted(key for key in available if key.rpartition(".")[0] == section)
    siblings = siblings or sorted(key for key in available if "." not in key)
    return arguments.unknown_key_message(name, siblings, None)


def _only_with(key: str) -> str:
    group, _, leaf = key.rpartition(".")
    return f"{group}={' or '.join(_options_with(group, leaf))}"


def _options_with(group: str, leaf: str) -> list[str]:
    """The options of a group that have the key."""
    options = schema.GROUPS.get(group, {})
    return [option for option, node in options.items() if leaf in {item.name for item in dataclasses.fields(node)}]


def keys_of(sections: Sections) -> list[str]:
    """The keys with these sections, but internal ones: `epochs`, `model.width`; the sections and groups themselves."""
    return ["experiment"] * ("" in sections) + [
        f"{section}.{item.name}" if section else item.name
        for section, owner in sections.items()
        for item in dataclasses.fields(owner)
        if is_typed(section, item)
    ]


def is_typed(section: str, item: dataclasses.Field[object]) -> bool:
    """Whether anybody types the key: it is not internal, nor the name of an option, nor of `make claims`."""
    is_option_name = section in schema.GROUPS and item.name == "name"
    return not is_option_name and not item.metadata.get("internal") and "claim" not in (section, item.name)


def all_keys() -> list[str]:
    """The keys of every option of every group."""
    variants = ({group: node} for group, options in schema.GROUPS.items() for node in options.values())
    return list(dict.fromkeys(chain(keys_of(schema_sections()), *map(keys_of, variants))))


def explain(error: BaseException) -> str:
    """One line about an error of Hydra's or OmegaConf's that only composing shows: in a file of conf/, a reference."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            group, _, option = (cause.missing_cfg_file or "").rpartition("/")
            options = sorted(cause.options)
            return choices_message(group, option, options, suggest_value(group, option, options))
        if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark:
            mark = cause.problem_mark
            return f"invalid YAML in {mark.name}, line {mark.line + 1}: {cause.problem}; correct the file"
        if isinstance(cause, OmegaConfBaseException) and (message := _explain_by_key(cause)):
            return message
    return " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_by_key(error: OmegaConfBaseException) -> str | None:
    """What is wrong with the key that OmegaConf names; None if it names none."""
    name = error.full_key
    if not name:
        return None
    if message := _explain_in_list(name):
        return message
    sections = _all_sections(name)
    key = find_key(name, sections)
    if isinstance(error, ValidationError) and name in sections:
        return _section_message(name, sections[name])
    if isinstance(error, ValidationError) and key:
        return wrong_type_message(key)
    if isinstance(error, InterpolationResolutionError):
        return f"the reference ${{...}} in {name} cannot be resolved; check its name, or set the environment variable"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        if name.partition(".")[0] == "hydra":
            return f'unknown key "{name}"; python -m train --cfg hydra prints the keys of Hydra'
        return unknown_config_key_message(name, schema_sections())
    return None


def _explain_in_list(name: str) -> str | None:
    """What the list takes that the name leads into, as `fine_tune.stages[0].epochs` does; None if there is none."""
    list_name, bracket, _ = name.partition("[")
    key = find_key(list_name, _all_sections(list_name))
    return f"{name} is not valid: {wrong_type_message(key)}" if bracket and key else None


def _all_sections(name: str) -> Sections:
    """The sections, of a group with the first option that has the key."""
    section, _, leaf = name.rpartition(".")
    owners = _options_with(section, leaf)
    return schema_sections() | ({section: schema.GROUPS[section][owners[0]]} if owners else {})
