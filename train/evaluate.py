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
from train.cli.progress import say
from train.config.schema import Config
from train.evaluation import report, results
from train.evaluation.metrics import Outcome
from train.run import factory, stored_runs
from train.runtime import setup
from train.tracking import address, uploader
from train.tracking.run_dir import open_folder
from train.training import loop

SPLITS = ("train", "validation", "test", "all")


@dataclass
class Evaluate:
    """`run`: the folder of a run. `split`: train, validation, test, or all three together."""

    run: str = "runs/latest"
    split: str = "test"


def evaluate(words: list[str]) -> None:
    """All other words are keys of the run's config: its data, `evaluate.views`, `device`, ...

    Raises: ValueError where the run has no weights yet, or the data has classes that it does not know.
    """
    keys, others = arguments.parse_some(Evaluate, words)
    if keys.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {keys.split}")
    folder = open_folder(Path(keys.run))
    card = folder.card()
    if not card:
        raise ValueError(f"run must have kept weights, got {keys.run}, which has none yet; go on with it: make resume")
    config, elsewhere = stored_runs.config_of(folder, card, others)
    uri = address.of_run(folder, others)
    factory.check_files(config)
    config, notes = setup.prepare(config, folder.inside("train.log"))
    say(*notes)
    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    split = whole(dataset) if keys.split == "all" else dataset.splits[keys.split]
    place = folder.inside(f"evaluation/{name_of(config, keys.split, elsewhere)}")
    say(*dataset.notes, f"{place.name}: {len(split):,} examples of {dataset.name}")
    model, predict = factory.load_best(folder, config)
    numbers = numbers_of(dataset.classes, card["classes"])
    with factory.naming_broken_examples():
        logits, truth = factory.answers(config, split, len(dataset.classes), predict, loop.Stops())
        outcome = Outcome(logits, numbers[truth], card["classes"])
        found = results.assess(place, split, outcome)
        results.draw(place, split, outcome, found, model)
    show(found)
    report.write(folder, folder.read_json("summary.json", {}))
    uploader.complete(folder, uri, config.tracking.wait_seconds)
    print(place)


def name_of(config: Config, split: str, elsewhere: bool) -> str:
    """Of an evaluation: the split, which data if not the run's own, how many views if not one."""
    place = getattr(config.data, "root", None) or getattr(config.data, "file", None)
    other = Path(place).resolve().name if place else config.data.name
    views = config.evaluate.views
    return "-".join([*([other] if elsewhere else []), split, *([views] if views != "one" else [])])


def whole(dataset: Any) -> Any:
    """All splits as one."""
    rows, labels = (
        np.concatenate([getattr(split, name) for split in dataset.splits.values()]) for name in ("rows", "labels")
    )
    return replace(dataset.test, name="all", rows=rows, labels=labels, pixels="none")


def numbers_of(classes: tuple[str, ...], known: list[str]) -> np.ndarray:
    """For each class of the data its number in the network's answers.

    Raises: ValueError for a class that the network was not trained on.
    """
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise ValueError(
            f"the data must have classes of the run, {', '.join(known[:20])}, got {', '.join(unknown[:5])}; "
            "name the folders like these"
        )
    return np.array([known.index(name) for name in classes])


def show(found: dict[str, Any]) -> None:
    """The numbers in the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False, show_header=False)
    low, high = found["accuracy_interval"]
    table.add_row("accuracy", f"{found['accuracy']:.4f}", f"95 % interval {low:.4f} to {high:.4f}")
    for name in report.HEADLINES[1:]:
        value = found[name]
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.4f}", "")
    missing = [row["name"] for row in found["classes"] if not row["examples"]]
    Console(highlight=False).print(table)
    if missing:
        say(f"classes without an example, left out of the means: {', '.join(missing[:10])}")


if __name__ == "__main__":
    arguments.run(evaluate)
