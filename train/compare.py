"""`make compare experiment=NAME`: what differs between the runs of an experiment, and what it bought, over seeds.

Runs that differ in nothing but their seed are one row. Rows are compared on the same data only, by the accuracy of the
main output on a whole split: never by a loss, which may have auxiliary terms in it.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.config.schema import GROUPS, ROOT
from train.config.serialization import variant_config
from train.evaluation.html import format_compact, render_template, to_data_uri
from train.evaluation.statistics import Difference, Mean, mean_interval, paired_difference
from train.storage.atomic import write_atomically
from train.tracking.mlflow_query import RunRecord, list_runs
from train.tracking.uploader import default_uri

TEST_METRIC, VALIDATION_METRIC = "test/accuracy", "best/validation_accuracy"
# Figures of a row, by the word that sorts by them: names in MLflow.
COST_METRICS: dict[str, str] = {
    "parameters": "cost/parameters",
    "macs": "cost/macs",
    "images_per_second": "images_per_second",
    "memory": "cost/peak_memory_bytes",
}
MAX_NAMED_RUNS = 3  # runs that are named where some are left out


@dataclass
class Compare:
    """`experiment`: whose runs. `metric`: test or validation (auto: test, where there is any).

    `baseline`: words, separated by commas, that one row has; the others are told by their difference to it. `sort`:
    accuracy, name or one of FIGURES. `uri`: the MLflow store. `out`: where compare.html and compare.csv are written.
    All other words choose runs: model=vgg16 epochs=12.
    """

    experiment: str = "inception"
    metric: str = "auto"
    baseline: str = ""
    sort: str = "accuracy"
    uri: str = ""
    out: str = ""


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone. values: the metric by seed. figures: medians by name; nan: not known."""

    label: str
    params: dict[str, str]
    values: dict[int, float]
    costs: dict[str, float]
    accuracy: Mean
    difference: Difference | None = None
    on_pareto_front: bool = False  # nothing is more accurate for the same cost or less


@dataclass(frozen=True)
class DatasetComparison:
    """Rows on the same data."""

    data: str
    fingerprint: str
    rows: list[Row]
    baseline: Row | None


def compare(argv: list[str]) -> None:
    """Prints the tables, and where the page and the CSV are. Raises: ValueError for what can't be compared."""
    keys, chosen = parse_arguments(argv)
    uri = keys.uri or default_uri(ROOT)
    runs = [run for run in list_runs(uri, keys.experiment) if run.tags.get("kind") != "sweep"]
    if not runs:
        raise ValueError(
            f"experiment must have runs, got {keys.experiment} without any; use make train, or another one"
        )
    there = [run for run in runs if matches(run.params, chosen)]
    if not there:
        told = " ".join(f"{name}={value}" for name, value in chosen.items())
        raise ValueError(f"words must choose some of the {len(runs)} runs, got {told}, which none has")
    metric = resolve_metric(keys.metric, there)
    usable, notes = filter_runs(there, metric)
    fields = [
        compare_dataset(of_one, metric, keys)
        for of_one in group_by(usable, lambda run: run.tags.get("data_fingerprint", ""))
    ]
    if keys.baseline and not any(field.baseline for field in fields):
        told = "; ".join(row.label for field in fields for row in field.rows[:10])
        raise ValueError(f"baseline must be words that one row has, got {keys.baseline}, which none has: {told}")
    if len(fields) > 1:
        notes.append(f"there are {len(fields)} data sets: their runs are compared apart")
    out = Path(keys.out) if keys.out else ROOT / "runs" / keys.experiment
    print_tables(fields, notes, metric)
    for path in write_comparison(out, keys.experiment, fields, metric, notes):
        print(path)


def parse_arguments(argv: list[str]) -> tuple[Compare, dict[str, str]]:
    """This command's own words, and those that choose runs, by key."""
    own = [word for word in argv if word.partition("=")[0] in Compare.__dataclass_fields__]
    keys, chosen = arguments.parse(Compare, own), {}
    for word in argv:
        if "=" not in word:
            raise ValueError(f"words must be key=value, got {word}; use e.g. experiment=inception model=vgg16")
        if word not in own:
            name, value = split_override(word)
            chosen[name] = value
    if keys.metric not in ("auto", "test", "validation"):
        raise ValueError(f"metric must be auto, test or validation, got {keys.metric}; losses have auxiliary terms")
    if keys.sort not in ("accuracy", "name", *COST_METRICS):
        raise ValueError(f"sort must be one of accuracy, name, {', '.join(COST_METRICS)}, got {keys.sort}")
    return keys, chosen


def resolve_metric(choice: str, runs: list[RunRecord]) -> str:
    if choice == "auto":
        choice = "test" if any(TEST_METRIC in run.metrics for run in runs) else "validation"
    return {"test": TEST_METRIC, "validation": VALIDATION_METRIC}[choice]


def filter_runs(runs: list[RunRecord], metric: str) -> tuple[list[RunRecord], list[str]]:
    """The runs that can be compared, and what is to be said of the others.

    Raises: ValueError where there is none.
    """
    notes, usable = [], []
    reasons: dict[str, list[str]] = {}
    for run in runs:
        value = run.metrics.get(metric)
        if run.status != "FINISHED":
            reasons.setdefault(f"not finished ({run.status.lower()})", []).append(run.name)
        elif value is None:
            reasons.setdefault(f"without {metric}", []).append(run.name)
        elif not math.isfinite(value):
            reasons.setdefault(f"whose {metric} is no number", []).append(run.name)
        elif "seed" not in run.params:
            reasons.setdefault("without parameters in MLflow", []).append(run.name)
        else:
            usable.append(run)
    for reason, names in reasons.items():
        named = ", ".join(names[:MAX_NAMED_RUNS]) + (", ..." if len(names) > MAX_NAMED_RUNS else "")
        notes.append(f"left out: {len(names)} runs {reason}: {named}")
    if not usable:
        raise ValueError(f"runs must be finished and have {metric}, got none: {'; '.join(notes)}")
    return usable, notes


def group_by(runs: Iterable[RunRecord], key: Callable[[RunRecord], Any]) -> list[list[RunRecord]]:
    """Runs of the same key, in the order in which keys come."""
    found: dict[Any, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


def compare_dataset(runs: list[RunRecord], metric: str, keys: Compare) -> DatasetComparison:
    """The rows of one data set.

    Raises: ValueError for a baseline that is several of them.
    """
    groups = group_by(runs, lambda run: tuple(sorted(variant_config(run.params).items())))
    names = make_labels([variant_config(group[0].params) for group in groups])
    rows = [make_row(name, group, metric) for name, group in zip(names, groups, strict=True)]
    baseline = find_baseline(rows, keys.baseline)
    front = pareto_front([(row.costs["macs"], row.accuracy.mean) for row in rows])
    rows = [
        replace(row, on_pareto_front=best, difference=difference_to_baseline(row, baseline))
        for row, best in zip(rows, front, strict=True)
    ]
    order = {"accuracy": lambda row: -row.accuracy.mean, "name": lambda row: row.label}
    rows.sort(key=order.get(keys.sort, lambda row: (math.isnan(row.costs[keys.sort]), row.costs[keys.sort])))
    return DatasetComparison(
        runs[0].params.get("data.name", "?"), runs[0].tags.get("data_fingerprint", ""), rows, baseline
    )


def difference_to_baseline(row: Row, baseline: Row | None) -> Difference | None:
    return paired_difference(row.values, baseline.values) if baseline and row is not baseline else None


def make_row(label: str, runs: list[RunRecord], metric: str) -> Row:
    """Of the same seed the last run counts."""
    last = {int(run.params["seed"]): run for run in runs}
    known = {
        name: [run.metrics[key] for run in last.values() if key in run.metrics] for name, key in COST_METRICS.items()
    }
    figures = {name: statistics.median(found) if found else math.nan for name, found in known.items()}
    values = {seed: run.metrics[metric] for seed, run in last.items()}
    return Row(label, variant_config(runs[0].params), values, figures, mean_interval(list(values.values())))


def make_labels(params: list[dict[str, str]]) -> list[str]:
    """For each row the words that it does not have in common with all the others; the model's name without its key."""
    names = sorted({name for one in params for name in one}, key=lambda name: (not name.endswith(".name"), name))
    telling = [name for name in names if len({one.get(name) for one in params}) > 1]
    # A model's or optimizer's own keys tell nothing beside rows that do not have them.
    telling = [
        name for name in telling if name.endswith(".name") or len({one[name] for one in params if name in one}) > 1
    ]
    found = []
    for one in params:
        words = [(name.removesuffix(".name"), format_value(one[name])) for name in telling if name in one]
        words = words or [("model", one.get("model.name", "?"))]
        found.append(" ".join(value if name == "model" else f"{name}={value}" for name, value in words))
    return found


def format_value(value: str) -> str:
    """A parameter's value as one would type it: [a,b], true, null."""
    plain = {"True": "true", "False": "false", "None": "null"}
    return re.sub(r"[' ]", "", value) if value.startswith("[") else plain.get(value, value)


def matches(params: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether they have all these values, as they may be typed: 1 is 1.0."""
    return all(
        name in params and parse_number(format_value(params[name])) == parse_number(format_value(v))
        for name, v in wanted.items()
    )


def parse_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def find_baseline(rows: list[Row], selection: str) -> Row | None:
    """The row with all these words; none where there are no words, or no row on this data has them.

    Raises: ValueError where several have.
    """
    apart = re.split(r",(?![^\[]*\])", selection)  # lists have commas, too
    wanted = dict(map(split_override, apart)) if selection else {}
    found = [row for row in rows if wanted and matches(row.params, wanted)]
    if len(found) > 1:
        told = "; ".join(row.label for row in found[:10])
        raise ValueError(f"baseline must be words that one row has, got {selection}, which {len(found)} have: {told}")
    return found[0] if found else None


def split_override(override: str) -> tuple[str, str]:
    """Of `model=vgg16` the parameter `model.name` and its value."""
    name, _, value = override.partition("=")
    return f"{name}.name" if name in GROUPS else name, value


def pareto_front(points: list[tuple[float, float]]) -> list[bool]:
    """For each (cost, accuracy) whether it is on the Pareto front: nothing is better in one, no worse in the other.

    What has no known cost (nan) is not.
    """
    return [
        not math.isnan(cost) and not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        for cost, accuracy in points
    ]


# ----------------------------------------------------------------------------------------------------------- shown


HEADINGS = ("row", "seeds", "accuracy", "95 % interval", "to baseline", "p", "parameters", "MACs", "images/s", "memory")
COLUMNS_TO_DROP = ("memory", "p", "parameters", "95 % interval", "images/s")  # where a terminal is narrow
DEFAULT_WIDTH = 200  # characters, of what is no terminal
MIN_LABEL_WIDTH = 24


def print_tables(comparisons: list[DatasetComparison], notes: list[str], metric: str) -> None:
    """In the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=DEFAULT_WIDTH)
    for field in comparisons:
        rows = [dict(zip(HEADINGS, format_row(row, field), strict=True)) for row in field.rows]
        title = f"{field.data} {field.fingerprint[:8]}: {metric}, mean over seeds"
        table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
        table.add_column("row", overflow="fold", min_width=MIN_LABEL_WIDTH)
        shown = columns_that_fit(rows, console.width)
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row["row"], *(row[name] for name in shown))
        console.print(table)
    console.print("* nothing here is more accurate for as few multiply-accumulates", style="dim")
    for note in notes:
        console.print(note, markup=False)


def columns_that_fit(rows: list[dict[str, str]], width: int) -> list[str]:
    """The headings, without the row's own, that have something below them and room beside a label."""
    shown = [name for name in HEADINGS[1:] if any(row[name] for row in rows)]
    for name in COLUMNS_TO_DROP:
        needed = sum(2 + max(len(heading), *(len(row[heading]) for row in rows)) for heading in shown)
        if needed + MIN_LABEL_WIDTH <= width:
            break
        shown = [heading for heading in shown if heading != name]
    return shown


def format_row(row: Row, comparison: DatasetComparison) -> list[str]:
    """A row as texts."""
    mean, difference = row.accuracy, row.difference
    several = mean.n > 1
    told = "baseline" if row.label == (comparison.baseline.label if comparison.baseline else None) else ""
    if difference:
        told = f"{difference.mean:+.4f}" + (f" ± {difference.half_width:.4f}" if difference.n > 1 else "")
    figures = row.costs
    return [
        row.label + (" *" if row.on_pareto_front else ""),
        str(mean.n),
        f"{mean.mean:.4f}" + (f" ± {mean.deviation:.4f}" if several else ""),
        f"{mean.low:.4f} to {min(mean.high, 1):.4f}" if several else "one seed",
        told,
        f"{difference.p:.3f}" if difference and difference.n > 1 else "",
        format_known(figures["parameters"], format_compact),
        format_known(figures["macs"], format_compact),
        format_known(figures["images_per_second"], lambda value: f"{value:.0f}"),
        format_known(figures["memory"], lambda value: f"{value / 2**30:.2f} GiB"),
    ]


def format_known(value: float, formatter: Callable[[float], str]) -> str:
    return "" if math.isnan(value) else formatter(value)


CSV_COLUMNS = (
    "data", "data_fingerprint", "row", "n", "mean", "deviation", "low", "high", "difference", "difference_low",
    "difference_high", "p", *COST_METRICS, "best_buy", "seeds",
)  # fmt: skip


def to_csv(comparisons: list[DatasetComparison]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(CSV_COLUMNS)
    for field in comparisons:
        for row in field.rows:
            mean, d = row.accuracy, row.difference
            numbers = [mean.mean, mean.deviation, mean.low, mean.high]
            numbers += [d.mean, d.low, d.high, d.p] if d else [math.nan] * 4
            numbers += row.costs.values()
            plain = ["" if math.isnan(number) else f"{number:.10g}" for number in numbers]
            seeds = " ".join(f"{seed}:{value:.6g}" for seed, value in sorted(row.values.items()))
            lines.writerow([field.data, field.fingerprint, row.label, mean.n, *plain, int(row.on_pareto_front), seeds])
    return text.getvalue()


def write_comparison(
    output_dir: Path, experiment: str, comparisons: list[DatasetComparison], metric: str, notes: list[str]
) -> list[Path]:
    """compare.html and compare.csv."""
    from train.evaluation.plots import comparison as pictures
    from train.evaluation.plots.style import to_png

    output_dir.mkdir(parents=True, exist_ok=True)
    shown = [
        {
            "field": field,
            "cells": [format_row(row, field) for row in field.rows],
            "seeds": to_data_uri(to_png(pictures.plot_seeds(field.rows, metric))),
            "front": to_data_uri(to_png(pictures.plot_pareto_front(field.rows, metric))),
        }
        for field in comparisons
    ]
    content = {"experiment": experiment, "metric": metric, "notes": notes, "fields": shown, "headings": HEADINGS}
    write_atomically(output_dir / "compare.html", render_template("compare.html", **content))
    write_atomically(output_dir / "compare.csv", to_csv(comparisons))
    return [output_dir / "compare.html", output_dir / "compare.csv"]


if __name__ == "__main__":
    arguments.main(compare)
