"""`make evaluate run=<run folder>`: evaluates a run's best checkpoint on a whole split, or on other data.

    make evaluate run=runs/latest  # the test split of its own data
    make evaluate run=runs/latest split=validation evaluate.views=mirror
    make evaluate run=runs/latest data=folder data.root=photos split=all

The results are written to the run's folder under evaluation/, to its report and to MLflow.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.cli.fields import setting
from train.cli.progress import print_and_log
from train.config.schema import Config
from train.data.dataset import Dataset, Split
from train.evaluation import report, results
from train.evaluation.metrics import ClassificationResult
from train.run import factory, stored_runs
from train.storage.json_types import JsonObject
from train.tracking import address, uploader
from train.tracking.run_dir import open_run_dir
from train.training.signals import SignalHandler

SPLITS = ("train", "validation", "test", "all")


@dataclass
class Evaluate:
    """The keys of `make evaluate`."""

    run: str = setting("runs/latest", "folder of the run")
    split: str = setting("test", "split to evaluate, or all three together", choices=SPLITS)


def evaluate(argv: list[str]) -> None:
    """Evaluates a run; all other arguments override its config: its data, `evaluate.views`, `device`, ...

    Raises: ValueError if the run has no weights yet, or the data has classes that the network does not know.
    """
    keys, overrides = arguments.parse_known(Evaluate, argv)
    run_dir = open_run_dir(Path(keys.run))
    model_info = run_dir.model_info()
    if not model_info:
        raise ValueError(f"run {keys.run} has no saved weights yet; run make resume run={shlex.quote(keys.run)}")
    config, is_other_data = stored_runs.evaluation_config(run_dir, model_info, overrides)
    uri = address.run_uri(run_dir, overrides)
    factory.check_files(config)
    config, notes = factory.prepare_runtime(config, run_dir.inside("train.log"))
    print_and_log(*notes)
    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    split = merge_splits(dataset) if keys.split == "all" else dataset.splits[keys.split]
    output_dir = run_dir.inside(f"evaluation/{evaluation_name(config, keys.split, is_other_data)}")
    print_and_log(*dataset.notes, f"{output_dir.name}: {len(split):,} examples of {dataset.name}")
    model, predict = factory.load_best(run_dir, config)
    indices = class_indices(dataset.classes, model_info["classes"])
    logits, labels = factory.predict_split(config, split, len(dataset.classes), predict, SignalHandler())
    result = ClassificationResult(logits, indices[labels], model_info["classes"])
    metrics = results.write_results(output_dir, split, result)
    results.write_plots(output_dir, split, result, metrics, model)
    print_metrics(metrics)
    report.write_report(run_dir, run_dir.summary())
    uploader.upload_and_wait(run_dir, uri, config.tracking.wait_seconds)
    print(output_dir)


def evaluation_name(config: Config, split: str, is_other_data: bool) -> str:
    """Names an evaluation: the data if not the run's own, the split, the views if not one."""
    path = getattr(config.data, "root", None) or getattr(config.data, "file", None)
    data_name = Path(path).resolve().name if path else config.data.name
    views = config.evaluate.views
    return "-".join([*([data_name] if is_other_data else []), split, *([views] if views != "one" else [])])


def merge_splits(dataset: Dataset) -> Split:
    """Joins all splits into one, called `all`."""
    indices, labels = (
        np.concatenate([getattr(split, name) for split in dataset.splits.values()]) for name in ("indices", "labels")
    )
    return replace(dataset.test, name="all", indices=indices, labels=labels, cache_mode="none")


def class_indices(classes: tuple[str, ...], known_classes: list[str]) -> np.ndarray:
    """Maps each class of the data to its index in the network's output.

    Raises: ValueError for a class that the network was not trained on.
    """
    unknown = [name for name in classes if name not in known_classes]
    if unknown:
        raise ValueError(
            f"the run was not trained on {', '.join(unknown[:5])}; its classes are {', '.join(known_classes[:20])}; "
            "rename the data's classes to match"
        )
    return np.array([known_classes.index(name) for name in classes])


def print_metrics(metrics: JsonObject) -> None:
    """Prints the headline metrics."""
    table = Table(box=None, header_style="dim", pad_edge=False, show_header=False)
    low, high = metrics["accuracy_interval"]
    table.add_row("accuracy", f"{metrics['accuracy']:.4f}", f"95 % interval {low:.4f} to {high:.4f}")
    for name in uploader.EVALUATION_METRICS[1:]:
        value = metrics[name]
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.4f}", "")
    missing = [row["name"] for row in metrics["classes"] if not row["examples"]]
    Console(highlight=False).print(table)
    if missing:
        print_and_log(f"classes without examples are excluded from the means: {', '.join(missing[:10])}")


if __name__ == "__main__":
    arguments.main(
        evaluate,
        Evaluate,
        other_keys="All other keys override the run's config: data=NAME and data.KEY, evaluate.views, device, ...; see "
        "make train ARGS=--help.",
    )
