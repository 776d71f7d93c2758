"""`make compare experiment=NAME`: compares the variants in an experiment by accuracy, over seeds, and by cost.

    make compare experiment=inception baseline=model=vgg16
    make compare experiment=inception epochs=6 sort=macs

Runs that differ only in their seed form one row. Rows are compared only on the same data, by the main output's accuracy
on a whole split, never by a loss, which may contain auxiliary terms.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.cli.arguments import Override, nearest_key
from train.cli.fields import fields_by_key, setting
from train.config.schema import GROUPS, ROOT
from train.config.serialization import variant_config
from train.evaluation.html import format_compact, render_template, to_data_uri
from train.evaluation.statistics import Difference, Mean, mean_accuracy, paired_difference
from train.storage.atomic import write_atomically
from train.tracking.mlflow_query import RunRecord, list_runs
from train.tracking.uploader import default_uri

TEST_METRIC, VALIDATION_METRIC = "test/accuracy", "best/validation_accuracy"
# Costs of a row: the value of `sort` -> the metric in MLflow.
COST_METRICS: dict[str, str] = {
    "parameters": "cost/parameters",
    "macs": "cost/macs",
    "images_per_second": "images_per_second",
    "memory": "cost/peak_memory_bytes",
}
MAX_NAMED_RUNS = 3  # of those left out for one reason


@dataclass
class Compare:
    """The keys of `make compare`."""

    experiment: str = setting("inception", "MLflow experiment")
    metric: str = setting(
        "auto", "split whose accuracy is compared; auto: test if any run has it", choices=("auto", "test", "validation")
    )
    baseline: str = setting("", "row that the others are compared with, as key=value pairs separated by commas")
    sort: str = setting("accuracy", "sort key of the rows", choices=("accuracy", "name", *COST_METRICS))
    uri: str = setting("", "MLflow store; none: mlflow.db beside the Makefile")
    out: str = setting("", "folder for compare.html and compare.csv; none: runs/EXPERIMENT")


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed. values: the metric by seed. costs: medians by name, nan where unknown."""

    label: str
    params: dict[str, str]
    values: dict[int, float]
    costs: dict[str, float]
    accuracy: Mean
    difference: Difference | None = None
    on_pareto_front: bool = False  # no row is more accurate at the same cost or less


@dataclass(frozen=True)
class DatasetComparison:
    """The rows of one data set."""

    data: str
    fingerprint: str
    rows: list[Row]
    baseline: Row | None


def compare(argv: list[str]) -> None:
    """Prints the tables and the paths of the HTML page and the CSV.

    Raises: ValueError if there is nothing to compare, or the arguments are wrong.
    """
    keys, filters = arguments.parse_known(Compare, argv)
    uri = keys.uri or default_uri(ROOT)
    runs = [run for run in list_runs(uri, keys.experiment) if run.tags.get("kind") != "sweep"]
    if not runs:
        raise ValueError(
            f"experiment {keys.experiment} has no runs; train one with make train, or name another experiment"
        )
    matching = [run for run in runs if matches(run.params, dict(map(to_parameter, filters)))]
    if not matching:
        criteria = " ".join(map(str, filters))
        raise ValueError(
            f"no run matches {criteria} (of {len(runs)} runs in experiment {keys.experiment})"
            + suggest_key(filters, runs)
        )
    metric = resolve_metric(keys.metric, matching)
    usable, notes = filter_runs(matching, metric)
    comparisons = [
        compare_dataset(group, metric, keys)
        for group in group_by(usable, lambda run: run.tags.get("data_fingerprint", ""))
    ]
    if keys.baseline and not any(comparison.baseline for comparison in comparisons):
        labels = "; ".join(row.label for comparison in comparisons for row in comparison.rows[:10])
        raise ValueError(f"no row matches baseline={keys.baseline}; the rows are: {labels}")
    if len(comparisons) > 1:
        notes.append(f"the runs use {len(comparisons)} different data sets; each is compared separately")
    out = Path(keys.out) if keys.out else ROOT / "runs" / keys.experiment
    print_tables(comparisons, notes, metric)
    for path in write_comparison(out, keys.experiment, comparisons, metric, notes):
        print(path)


def suggest_key(filters: list[Override], runs: list[RunRecord]) -> str:
    """Names the key that was meant by one that no run has; empty if there is none."""
    parameters = {name.removesuffix(".name") for run in runs for name in run.params}
    for override in filters:
        meant = nearest_key(override.key, parameters | {*fields_by_key(Compare)})
        if override.key not in parameters and meant:
            return f"; did you mean {meant}={override.value}?"
    return ""


def resolve_metric(choice: str, runs: list[RunRecord]) -> str:
    if choice == "auto":
        choice = "test" if any(TEST_METRIC in run.metrics for run in runs) else "validation"
    return {"test": TEST_METRIC, "validation": VALIDATION_METRIC}[choice]


def filter_runs(runs: list[RunRecord], metric: str) -> tuple[list[RunRecord], list[str]]:
    """Returns the runs that can be compared, and a note for each reason why others are left out.

    Raises: ValueError if no run is left.
    """
    usable = []
    notes = []
    reasons: dict[str, list[str]] = {}
    for run in runs:
        value = run.metrics.get(metric)
        if run.status != "FINISHED":
            reasons.setdefault(f"not finished ({run.status.lower()})", []).append(run.name)
        elif value is None:
            reasons.setdefault(f"without {metric}", []).append(run.name)
        elif not math.isfinite(value):
            reasons.setdefault(f"with non-finite {metric}", []).append(run.name)
        elif "seed" not in run.params:
            reasons.setdefault("without parameters in MLflow", []).append(run.name)
        else:
            usable.append(run)
    for reason, names in reasons.items():
        named = ", ".join(names[:MAX_NAMED_RUNS]) + (", ..." if len(names) > MAX_NAMED_RUNS else "")
        notes.append(f"excluded {len(names)} run{'s' if len(names) > 1 else ''} {reason}: {named}")
    if not usable:
        raise ValueError(f"no finished run has {metric}: {'; '.join(notes)}")
    return usable, notes


def group_by(runs: Iterable[RunRecord], key: Callable[[RunRecord], Hashable]) -> list[list[RunRecord]]:
    """Groups runs with the same key, in the order in which the keys first occur."""
    groups: dict[Hashable, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def compare_dataset(runs: list[RunRecord], metric: str, keys: Compare) -> DatasetComparison:
    """Makes the rows of one data set, sorted, with their differences to the baseline and the Pareto front.

    Raises: ValueError if several rows match the baseline.
    """
    groups = group_by(runs, lambda run: tuple(sorted(variant_config(run.params).items())))
    names = make_labels([variant_config(group[0].params) for group in groups])
    rows = [make_row(name, group, metric) for name, group in zip(names, groups, strict=True)]
    baseline = find_baseline(rows, keys.baseline)
    front = pareto_front([(row.costs["macs"], row.accuracy.mean) for row in rows])
    rows = [
        replace(row, on_pareto_front=on_front, difference=difference_to_baseline(row, baseline))
        for row, on_front in zip(rows, front, strict=True)
    ]
    order = {"accuracy": lambda row: -row.accuracy.mean, "name": lambda row: row.label}
    rows.sort(key=order.get(keys.sort, lambda row: (math.isnan(row.costs[keys.sort]), row.costs[keys.sort])))
    return DatasetComparison(
        runs[0].params.get("data.name", "?"), runs[0].tags.get("data_fingerprint", ""), rows, baseline
    )


def difference_to_baseline(row: Row, baseline: Row | None) -> Difference | None:
    return paired_difference(row.values, baseline.values) if baseline and row is not baseline else None


def make_row(label: str, runs: list[RunRecord], metric: str) -> Row:
    """Makes a row; of several runs with the same seed only the last counts."""
    last = {int(run.params["seed"]): run for run in runs}
    measured = {
        name: [run.metrics[key] for run in last.values() if key in run.metrics] for name, key in COST_METRICS.items()
    }
    costs = {name: statistics.median(values) if values else math.nan for name, values in measured.items()}
    values = {seed: run.metrics[metric] for seed, run in last.items()}
    return Row(label, variant_config(runs[0].params), values, costs, mean_accuracy(list(values.values())))


def make_labels(params: list[dict[str, str]]) -> list[str]:
    """Labels each row by the parameters in which the rows differ; the model's name stands without its key."""
    names = sorted({name for row in params for name in row}, key=lambda name: (not name.endswith(".name"), name))
    differing = [name for name in names if len({row.get(name) for row in params}) > 1]
    # A key that only some models or optimizers have distinguishes rows only if its value differs among those.
    differing = [
        name for name in differing if name.endswith(".name") or len({row[name] for row in params if name in row}) > 1
    ]
    labels = []
    for row in params:
        pairs = [(name.removesuffix(".name"), format_value(row[name])) for name in differing if name in row]
        pairs = pairs or [("model", row.get("model.name", "?"))]
        labels.append(" ".join(value if name == "model" else f"{name}={value}" for name, value in pairs))
    return labels


def format_value(value: str) -> str:
    """Formats a parameter's value as it is typed on the command line: [a,b], true, null."""
    plain = {"True": "true", "False": "false", "None": "null"}
    return re.sub(r"[' ]", "", value) if value.startswith("[") else plain.get(value, value)


def matches(params: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether the parameters have all the wanted values; numbers are compared as numbers, so that 1 equals 1.0."""
    return all(
        name in params and parse_number(format_value(params[name])) == parse_number(format_value(value))
        for name, value in wanted.items()
    )


def parse_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def find_baseline(rows: list[Row], selection: str) -> Row | None:
    """Finds the row that has all the selected values; None if nothing is selected, or no row of this data has them.

    Raises: ValueError if several rows match.
    """
    overrides = re.split(r",(?![^\[]*\])", selection)  # but not at the commas within lists
    wanted = dict(to_parameter(Override.parse(text)) for text in overrides) if selection else {}
    matching = [row for row in rows if wanted and matches(row.params, wanted)]
    if len(matching) > 1:
        labels = "; ".join(row.label for row in matching[:10])
        raise ValueError(f"baseline={selection} matches {len(matching)} rows: {labels}; add a key that only one has")
    return matching[0] if matching else None


def to_parameter(override: Override) -> tuple[str, str]:
    """A run's parameter in MLflow and its value; a group such as `model=vgg16` is the parameter `model.name`."""
    return f"{override.key}.name" if override.key in GROUPS else override.key, override.value


def pareto_front(points: list[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, accuracy) is on the Pareto front: no point is better in one and as good in the other.

    A point of unknown cost (nan) never is.
    """
    return [
        not math.isnan(cost) and not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
        for cost, accuracy in points
    ]


# ---------------------------------------------------------------------------------------------------------- output


HEADINGS = ("row", "seeds", "accuracy", "95 % interval", "to baseline", "p", "parameters", "MACs", "images/s", "memory")
COLUMNS_TO_DROP = ("memory", "p", "parameters", "95 % interval", "images/s")  # on a narrow terminal, in this order
DEFAULT_WIDTH = 200  # characters, where the output is not a terminal
MIN_LABEL_WIDTH = 24


def print_tables(comparisons: list[DatasetComparison], notes: list[str], metric: str) -> None:
    """Prints one table per data set, then the notes."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=DEFAULT_WIDTH)
    for comparison in comparisons:
        rows = [dict(zip(HEADINGS, format_row(row, comparison), strict=True)) for row in comparison.rows]
        title = f"{comparison.data} {comparison.fingerprint[:8]}: {metric}, mean over seeds"
        table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
        table.add_column("row", overflow="fold", min_width=MIN_LABEL_WIDTH)
        shown = columns_that_fit(rows, console.width)
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row["row"], *(row[name] for name in shown))
        console.print(table)
    console.print(
        "* Pareto front: no other row is more accurate at the same or a lower number of multiply-accumulates",
        style="dim",
    )
    for note in notes:
        console.print(note, markup=False)


def columns_that_fit(rows: list[dict[str, str]], width: int) -> list[str]:
    """Returns the headings, without the label's, of the columns that are not empty and fit beside it."""
    shown = [name for name in HEADINGS[1:] if any(row[name] for row in rows)]
    for name in COLUMNS_TO_DROP:
        needed = sum(2 + max(len(heading), *(len(row[heading]) for row in rows)) for heading in shown)
        if needed + MIN_LABEL_WIDTH <= width:
            break
        shown = [heading for heading in shown if heading != name]
    return shown


def format_row(row: Row, comparison: DatasetComparison) -> list[str]:
    """Formats a row's cells, in the order of HEADINGS."""
    mean = row.accuracy
    difference = row.difference
    several = mean.n > 1
    to_baseline = "baseline" if row.label == (comparison.baseline.label if comparison.baseline else None) else ""
    if difference:
        to_baseline = f"{difference.mean:+.4f}" + (f" ± {difference.half_width:.4f}" if difference.n > 1 else "")
    costs = row.costs
    return [
        row.label + (" *" if row.on_pareto_front else ""),
        str(mean.n),
        f"{mean.mean:.4f}" + (f" ± {mean.deviation:.4f}" if several else ""),
        f"{mean.low:.4f} to {mean.high:.4f}" if several else "one seed",
        to_baseline,
        f"{difference.p:.3f}" if difference and difference.n > 1 else "",
        format_known(costs["parameters"], format_compact),
        format_known(costs["macs"], format_compact),
        format_known(costs["images_per_second"], lambda value: f"{value:.0f}"),
        format_known(costs["memory"], lambda value: f"{value / 2**30:.2f} GiB"),
    ]


def format_known(value: float, formatter: Callable[[float], str]) -> str:
    return "" if math.isnan(value) else formatter(value)


CSV_COLUMNS = (
    "data", "data_fingerprint", "row", "n", "mean", "deviation", "low", "high", "difference", "difference_low",
    "difference_high", "p", *COST_METRICS, "on_pareto_front", "seeds",
)  # fmt: skip


def to_csv(comparisons: list[DatasetComparison]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for comparison in comparisons:
        for row in comparison.rows:
            mean = row.accuracy
            difference = row.difference
            numbers = [mean.mean, mean.deviation, mean.low, mean.high]
            numbers += (
                [difference.mean, difference.low, difference.high, difference.p] if difference else [math.nan] * 4
            )
            numbers += row.costs.values()
            cells = ["" if math.isnan(number) else f"{number:.10g}" for number in numbers]
            seeds = " ".join(f"{seed}:{value:.6g}" for seed, value in sorted(row.values.items()))
            identity = [comparison.data, comparison.fingerprint, row.label]
            writer.writerow([*identity, mean.n, *cells, int(row.on_pareto_front), seeds])
    return text.getvalue()


def write_comparison(
    output_dir: Path, experiment: str, comparisons: list[DatasetComparison], metric: str, notes: list[str]
) -> list[Path]:
    """Writes compare.html and compare.csv; returns their paths."""
    from train.evaluation.plots.comparison import plot_pareto_front, plot_seeds
    from train.evaluation.plots.style import to_png

    output_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        {
            "comparison": comparison,
            "cells": [format_row(row, comparison) for row in comparison.rows],
            "seeds": to_data_uri(to_png(plot_seeds(comparison.rows, metric))),
            "front": to_data_uri(to_png(plot_pareto_front(comparison.rows, metric))),
        }
        for comparison in comparisons
    ]
    page = render_template(
        "compare.html", experiment=experiment, metric=metric, notes=notes, sections=sections, headings=HEADINGS
    )
    write_atomically(output_dir / "compare.html", page)
    write_atomically(output_dir / "compare.csv", to_csv(comparisons))
    return [output_dir / "compare.html", output_dir / "compare.csv"]


if __name__ == "__main__":
    arguments.main(
        compare,
        Compare,
        other_keys="All other keys filter the runs by their config: model=vgg16 epochs=12; see make train ARGS=--help.",
    )
