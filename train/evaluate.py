"""`make evaluate run=<run folder>`: the best weights of a run on a whole split, or on other data.

    make evaluate run=runs/latest                                        (the test split of its own data)
    make evaluate run=runs/latest split=validation evaluate.views=mirror
    make evaluate run=runs/latest data=folder data.root=photos split=all

What comes of it stands in the run's folder under evaluation/, on its page, and in MLflow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.cli.progress import print_and_log
from train.config.schema import Config
from train.evaluation import report, results
from train.evaluation.metrics import ClassificationResult
from train.run import factory, stored_runs
from train.runtime import setup
from train.tracking import address, uploader
from train.tracking.run_dir import open_run_dir
from train.training import loop

SPLITS = ("train", "validation", "test", "all")


@dataclass
class Evaluate:
    """`run`: the folder of a run. `split`: train, validation, test, or all three together."""

    run: str = "runs/latest"
    split: str = "test"


def evaluate(argv: list[str]) -> None:
    """All other words are keys of the run's config: its data, `evaluate.views`, `device`, ...

    Raises: ValueError where the run has no weights yet, or the data has classes that it does not know.
    """
    keys, others = arguments.parse_known(Evaluate, argv)
    if keys.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {keys.split}")
    folder = open_run_dir(Path(keys.run))
    card = folder.model_info()
    if not card:
        raise ValueError(f"run must have kept weights, got {keys.run}, which has none yet; go on with it: make resume")
    config, elsewhere = stored_runs.evaluation_config(folder, card, others)
    uri = address.run_uri(folder, others)
    factory.check_files(config)
    config, notes = setup.prepare(config, folder.inside("train.log"))
    print_and_log(*notes)
    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    split = merge_splits(dataset) if keys.split == "all" else dataset.splits[keys.split]
    place = folder.inside(f"evaluation/{evaluation_name(config, keys.split, elsewhere)}")
    print_and_log(*dataset.notes, f"{place.name}: {len(split):,} examples of {dataset.name}")
    model, predict = factory.load_best(folder, config)
    numbers = class_indices(dataset.classes, card["classes"])
    with factory.surface_example_errors():
        logits, truth = factory.predict_split(config, split, len(dataset.classes), predict, loop.SignalHandler())
        outcome = ClassificationResult(logits, numbers[truth], card["classes"])
        found = results.write_results(place, split, outcome)
        results.write_plots(place, split, outcome, found, model)
    print_metrics(found)
    report.write_report(folder, folder.summary())
    uploader.upload_and_wait(folder, uri, config.tracking.wait_seconds)
    print(place)


def evaluation_name(config: Config, split: str, is_other_data: bool) -> str:
    """Of an evaluation: the split, which data if not the run's own, how many views if not one."""
    place = getattr(config.data, "root", None) or getattr(config.data, "file", None)
    other = Path(place).resolve().name if place else config.data.name
    views = config.evaluate.views
    return "-".join([*([other] if is_other_data else []), split, *([views] if views != "one" else [])])


def merge_splits(dataset: Any) -> Any:
    """All splits as one."""
    indices, labels = (
        np.concatenate([getattr(split, name) for split in dataset.splits.values()]) for name in ("indices", "labels")
    )
    return replace(dataset.test, name="all", indices=indices, labels=labels, cache_mode="none")


def class_indices(classes: tuple[str, ...], known_classes: list[str]) -> np.ndarray:
    """For each class of the data its number in the network's answers.

    Raises: ValueError for a class that the network was not trained on.
    """
    unknown = [name for name in classes if name not in known_classes]
    if unknown:
        raise ValueError(
            f"the data must have classes of the run, {', '.join(known_classes[:20])}, got {', '.join(unknown[:5])}; "
            "name the folders like these"
        )
    return np.array([known_classes.index(name) for name in classes])


def print_metrics(metrics: dict[str, Any]) -> None:
    """The numbers in the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False, show_header=False)
    low, high = metrics["accuracy_interval"]
    table.add_row("accuracy", f"{metrics['accuracy']:.4f}", f"95 % interval {low:.4f} to {high:.4f}")
    for name in report.HEADLINE_METRICS[1:]:
        value = metrics[name]
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.4f}", "")
    missing = [row["name"] for row in metrics["classes"] if not row["examples"]]
    Console(highlight=False).print(table)
    if missing:
        print_and_log(f"classes without an example, left out of the means: {', '.join(missing[:10])}")


if __name__ == "__main__":
    arguments.main(evaluate)
