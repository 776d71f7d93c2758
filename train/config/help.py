"""What `--help` says of training runs and sweeps: the config groups with their options, and the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from train.cli.arguments import Rows, format_help, nearest_key
from train.cli.fields import describe
from train.config import schema as schema
from train.config.composition import compose, conf_loader
from train.config.overrides import CONFIG_GROUPS, is_typed, options_of, schema_sections
from train.config.schema import ConfigError
from train.config.serialization import flatten, format_value

DESCRIPTION = """Trains a network, evaluates its best weights, and writes a report.

A key is set as key=value, an option of a group as group=NAME; a key of the option as group.key=value. Lists are written
[a,b], no value null. A value with other special characters is quoted twice: key="'...'"."""
SWEEP_DESCRIPTION = """Trains every combination of the values that are separated by commas, one process per trial.

The same command again resumes the sweep. The best trial is evaluated on the test split."""
FLAGS = (
    ("--check", "check the command line and the data's folders, train nothing"),
    ("--cfg job", "print the config, train nothing"),
    ("--version", "print the version"),
    ("--help [SECTION]", "print this help, or the keys of a group or section; all: every key"),
)
VALUES = (
    ("key=a,b", "each of these values; also choice(a,b)"),
    ("key=range(0,3)", "0, 1 and 2; with a step: range(0,10,2)"),
    ("model=glob(vgg*)", "the options of a group whose names match"),
    ("key=interval(0.1,1)", "values from a range (sweep.search=random, tpe or asha)"),
    ("key=tag(log,interval(1e-4,1e-1))", "the same on a logarithmic scale"),
)
NOTE = (
    "FLAG goes through make as ARGS=FLAG. The keys of a group or section, with types, ranges and defaults: "
    'make train ARGS="--help optimizer", or python -m train --help optimizer.'
)
EXAMPLES = (
    "make train model=inception_v1 data=mnist epochs=3",
    "make train optimizer=adamw optimizer.learning_rate=0.001 augment=none seed=1",
    'make train experiment=fashion_mnist ARGS="--check"',
)
SWEEP_EXAMPLES = (
    "make sweep model=vgg16,vgg16_inception seed=0,1,2 epochs=6",
    'make sweep "label_smoothing=interval(0,0.2)" sweep.search=tpe sweep.trials=10',
    "make sweep sweep=blocks sweep.parallel=1",
)
OTHER_GROUPS = {"experiment": "settings of several keys, on top of the defaults", "sweep": "search space of make sweep"}
EVERYTHING = "all"
HIDDEN_SECTIONS = ("claim",)  # belongs to `make claims`


def train_help(topics: Iterable[str]) -> str:
    """The help of `make train`, or the keys of the groups and sections that `topics` names.

    Raises: ConfigError for an unknown topic, or a broken file in conf/.
    """
    if tables := {f"keys of {topic}": rows for topic in topics for topic, rows in key_tables(topic).items()}:
        return format_help("make train [key=value ...]", DESCRIPTION, tables, "", EXAMPLES)
    tables = {"groups": group_rows(), "keys": section_rows(""), "sections": list_sections(), "flags": FLAGS}
    return format_help("make train [key=value ...] [FLAG ...]", DESCRIPTION, tables, NOTE, EXAMPLES)


def sweep_help() -> str:
    """The help of `make sweep`."""
    tables: dict[str, Rows] = {"values": VALUES, "groups": group_rows(), "keys of the sweep": section_rows("sweep")}
    note = "All other keys are those of a run: make train ARGS=--help. ARGS=--check lists the trials and runs none."
    return format_help("make sweep [key=value[,value ...] ...]", SWEEP_DESCRIPTION, tables, note, SWEEP_EXAMPLES)


def group_rows() -> Rows:
    """The groups, each with the options in conf/."""
    with conf_loader() as loader:
        options = {group: ", ".join(options_of(group, loader)) for group in CONFIG_GROUPS}
    texts = {group: _meaning(group) for group in schema.GROUPS} | OTHER_GROUPS
    defaults = {group: getattr(compose([]), group).name for group in schema.GROUPS}
    return [(f"{g}=NAME", f"{texts[g]}: {options[g]} (default: {defaults.get(g, 'none')})") for g in CONFIG_GROUPS]


def _meaning(group: str) -> str:
    [name] = [item for item in dataclasses.fields(schema_sections()[group]) if item.name == "name"]
    return name.metadata["text"].partition(";")[0]


def list_sections() -> Rows:
    """The sections that are no groups, each with its keys."""
    return [
        (f"{section}.KEY", ", ".join(item.name for item in dataclasses.fields(owner) if is_typed(section, item)))
        for section, owner in schema_sections().items()
        if section and section not in (*schema.GROUPS, *HIDDEN_SECTIONS, "sweep")
    ]


def key_tables(topic: str) -> dict[str, Rows]:
    """The keys of a group or section, or of all of them, by section. Raises: ConfigError for an unknown topic."""
    sections = [section for section in schema_sections() if section not in HIDDEN_SECTIONS]
    if topic == EVERYTHING:
        return {section or "a run": section_rows(section) for section in sections}
    if topic not in sections:
        valid = [*filter(None, sections), EVERYTHING]
        meant = nearest_key(topic, valid)
        hint = f"; did you mean {meant}?" if meant else ""
        raise ConfigError(f"--help must name one of {', '.join(valid)}, got {topic}{hint}")
    return {topic: section_rows(topic)}


def section_rows(section: str) -> Rows:
    """The keys of a section; of a group those of every option, with what differs between the options."""
    keys: dict[tuple[str, str], list[Variant]] = {}
    for option, owner in schema.GROUPS.get(section, {"": schema_sections()[section]}).items():
        values = flatten(dataclasses.asdict(compose([f"{section}={option}"] if option else [])))
        values["data.image_size"] = None  # composing has replaced the default by the size for the model
        for item in dataclasses.fields(owner):
            if item.metadata and is_typed(section, item):
                name = f"{section}.{item.name}" if section else item.name
                variant = Variant(option, owner, item, format_value(values.get(name, {})))
                keys.setdefault((name, item.metadata["text"]), []).append(variant)
    return [describe(v[0].owner, name, v[0].item, _describe_variants(section, v)) for (name, _), v in keys.items()]


@dataclass(frozen=True)
class Variant:
    """A key in one option of a group. default: as it is typed."""

    option: str
    owner: type
    item: dataclasses.Field[object]
    default: str


def _describe_variants(section: str, variants: list[Variant]) -> str:
    """The default values: `0.01; 0.001 with adamw; only with optimizer=sgd or rmsprop`."""
    options: dict[str, list[str]] = {}
    for variant in variants:
        options.setdefault(variant.default, []).append(variant.option)
    common, *others = options
    text = "; ".join([common, *(f"{default} with {', '.join(options[default])}" for default in others)])
    is_common = len(variants) == len(schema.GROUPS.get(section, variants))
    return text if is_common else f"{text}; only with {section}={' or '.join(v.option for v in variants)}"
