"""The search space of a sweep: overrides in Hydra's grammar, parsed into axes.

model=vgg16,inception_v3   seed=range(0,3)   model=glob(vgg*)   batch_size=choice(16,32)
optimizer.learning_rate=tag(log,interval(1e-4,1e-1))   optimizer.momentum=interval(0.8,0.99)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import IntervalSweep, Override

from train.config.overrides import parse_overrides, sweep_values
from train.config.schema import GROUPS, ConfigError

CONFIG_GROUP_KEYS = (*GROUPS, "experiment")
Point = dict[str, object]  # a value for each axis, by key


@dataclass(frozen=True)
class Axis:
    """A key with its list of values or its range. words: the values as typed on the command line."""

    key: str
    values: tuple[object, ...] = ()
    words: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False

    def decode(self, sampled: object) -> object:
        """Returns the value of a sampled word; a number from a range is its own value."""
        return sampled if self.is_range else self.values[list(self.words).index(str(sampled))]

    @property
    def is_range(self) -> bool:
        return self.low is not None

    @property
    def is_config_group(self) -> bool:
        """Whether the axis selects files under conf/."""
        return self.key in CONFIG_GROUP_KEYS


def parse_axes(overrides: Iterable[str], loader: ConfigLoader | None) -> tuple[list[str], list[Axis]]:
    """Splits overrides into those common to all trials and the axes. loader: Hydra's config loader, for `glob`.

    Raises: ConfigError for an invalid range.
    """
    parsed = parse_overrides(overrides, loader)
    common = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    return common, [_parse_axis(override) for override in parsed if override.is_sweep_override()]


def _parse_axis(override: Override) -> Axis:
    key = override.get_key_element()
    value = override.value()
    if not isinstance(value, IntervalSweep):
        values = sweep_values(override)
        if not values:
            raise ConfigError(f"{key} has no values to sweep, got {override.input_line}; use e.g. {key}=a,b")
        return Axis(key, tuple(values), tuple(override.sweep_string_iterator()))
    low = value.start
    high = value.end
    log = "log" in value.tags
    if low is None or high is None or not low < high or (log and low <= 0):
        raise ConfigError(
            f"{key} must be a range from low to high{', above 0' if log else ''}, got {override.input_line}; "
            f"use e.g. {key}=interval(0.1,1)"
        )
    return Axis(key, low=low, high=high, log=log)


def grid_points(axes: Iterable[Axis]) -> Iterator[Point]:
    """Yields every combination of values, the last axis varying fastest. Raises: ConfigError for a range."""
    axes = list(axes)
    for axis in axes:
        if axis.is_range:
            raise ConfigError(
                f"{axis.key} is a range, which sweep.search=grid cannot enumerate; use {axis.key}=a,b,c, "
                "or sweep.search=random, tpe or asha"
            )
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def config_group_choices(axes: Iterable[Axis]) -> list[list[str]]:
    """Returns every combination of overrides of the config-group axes; a single empty one if there are none."""
    choices = [[f"{axis.key}={word}" for word in axis.words] for axis in axes if axis.is_config_group]
    return [list(overrides) for overrides in itertools.product(*choices)]


def boundary_points(axes: Iterable[Axis]) -> Iterator[Point]:
    """Yields points that cover every value and both ends of every range, for each combination of config groups."""
    axes = list(axes)
    candidates: dict[str, tuple[object, ...]] = {axis.key: axis.values or (axis.low, axis.high) for axis in axes}
    groups = [axis for axis in axes if axis.is_config_group]
    others = {key: values for key, values in candidates.items() if key not in {axis.key for axis in groups}}
    for choice in grid_points(groups):
        for number in range(max((len(values) for values in others.values()), default=1)):
            yield choice | {key: values[number % len(values)] for key, values in others.items()}
