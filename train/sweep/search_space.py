"""What differs between the trials of a sweep: words in Hydra's grammar into axes.

model=vgg16,inception_v3   seed=range(0,3)   model=glob(vgg*)   batch_size=choice(16,32)
optimizer.learning_rate=tag(log,interval(1e-4,1e-1))   optimizer.momentum=interval(0.8,0.99)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from train.config.schema import GROUPS, ConfigError

CONFIG_GROUP_KEYS = (*GROUPS, "experiment")


@dataclass(frozen=True)
class Axis:
    """A key with the values that it may have, or with a range of them. words: the values as one types them."""

    key: str
    values: tuple = ()
    words: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False

    def decode(self, sampled: Any) -> Any:
        """What a word of this axis means; a number of a range means itself."""
        return sampled if self.is_range else self.values[list(self.words).index(sampled)]

    @property
    def is_range(self) -> bool:
        return self.low is not None

    @property
    def is_config_group(self) -> bool:
        """Whether it decides which of conf/'s files are read."""
        return self.key in CONFIG_GROUP_KEYS


def parse_axes(overrides: Iterable[str], loader: Any) -> tuple[list[str], list[Axis]]:
    """What all trials have in common, and what differs. loader: Hydra's, for `glob`.

    Raises: ConfigError for a range that can't be one.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    common = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    return common, [_parse_axis(override) for override in parsed if override.is_sweep_override()]


def _parse_axis(override: Override) -> Axis:
    key, value = override.get_key_element(), override.value()
    if not isinstance(value, IntervalSweep):
        found = [Override._convert_value(element) for element in override.sweep_iterator()]
        if not found:
            raise ConfigError(f"{key} must have something to try, got {override.input_line}; use e.g. {key}=a,b")
        return Axis(key, tuple(found), tuple(override.sweep_string_iterator()))
    low, high, log = value.start, value.end, "log" in value.tags
    if low is None or high is None or not low < high or (log and low <= 0):
        raise ConfigError(
            f"{key} must be a range from low to high{', above 0' if log else ''}, got {override.input_line}; "
            f"use e.g. {key}=interval(0.1,1)"
        )
    return Axis(key, low=low, high=high, log=log)


def grid_points(axes: Iterable[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination, the last axis turning fastest. Raises: ConfigError for a range, which has no end of values."""
    axes = list(axes)
    for axis in axes:
        if axis.is_range:
            raise ConfigError(
                f"{axis.key} must be a list of values for sweep.search=grid, got a range; use {axis.key}=a,b,c, "
                "or sweep.search=random, tpe or asha"
            )
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def config_group_choices(axes: Iterable[Axis]) -> list[list[str]]:
    """Every combination of words for the axes that choose files; one without words where there are none."""
    lists = [[f"{axis.key}={word}" for word in axis.words] for axis in axes if axis.is_config_group]
    return [list(words) for words in itertools.product(*lists)]


def boundary_points(axes: Iterable[Axis]) -> Iterator[dict[str, Any]]:
    """Points that together have every value, and both ends of every range; with all choices of files."""
    axes = list(axes)
    found = {axis.key: axis.values or (axis.low, axis.high) for axis in axes}
    files = [axis for axis in axes if axis.is_config_group]
    others = {key: values for key, values in found.items() if key not in {axis.key for axis in files}}
    for chosen in grid_points(files):
        for number in range(max((len(values) for values in others.values()), default=1)):
            yield chosen | {key: values[number % len(values)] for key, values in others.items()}
