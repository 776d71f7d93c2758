"""`make cost model=NAME`: what a network costs block by block, and what its blocks would cost without their ideas.

Nothing is trained and no weight gets a value. All figures are for one image and one forward pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.config import composition
from train.config.schema import options, resolve_image_size
from train.runtime import setup

CLASSES = "classes"


def read(words: list[str]) -> tuple[Any, tuple[int, int, int], int]:
    """The model's keys, the input shape and the number of classes that the words mean.

    `classes=` is this command's own word (1000); every other one is a key of `make train`. Without `data.image_size`
    and `data.channels` the network gets the colour images of the size that it was published for.

    Raises: ValueError for a word that nobody knows.
    """
    own = [word for word in words if word.startswith(f"{CLASSES}=")]
    others = [word for word in words if word not in own]
    config = composition.compose(others)
    names = {word.partition("=")[0] for word in others}
    classes = arguments.parse(Cost, own).classes
    setup.load("tensorflow", Path(os.devnull))  # only now: a mistake is answered at once
    from train.models import NATIVE_SIZE

    side = resolve_image_size(config) if "data.image_size" in names else NATIVE_SIZE[config.model.name]
    channels = config.data.channels if "data.channels" in names else 3
    return config.model, (side, side, channels), classes


@dataclass
class Cost:
    """`classes`: how many the classifier tells apart."""

    classes: int = 1000


def show(words: list[str]) -> None:
    """Prints the tables."""
    model_keys, shape, classes = read(words)
    from train import models
    from train.models import cost, weights

    how = options(model_keys)
    how.pop("weights")  # which cost nothing
    with weights.symbolic():
        model = models.build(model_keys.name, shape, classes, **how)
        inference = models.inference(model)
    console = Console(highlight=False)
    title = f"{model_keys.name}, {shape[0]} x {shape[1]} x {shape[2]}, {classes} classes"
    rows = cost.cost(inference)
    console.print(blocks_table(title, rows, cost.total(rows)))
    training = cost.totals(model)
    if training != cost.total(rows):
        console.print(f"in training, with auxiliary heads: {training.parameters:,} parameters, {training.macs:,} MACs")
    if found := cost.alternatives(inference):
        console.print(alternatives_table(found))


def blocks_table(title: str, rows: list[Any], total: Any) -> Table:
    """One row per block, and their sum."""
    table = Table("block", "output", title=title, title_justify="left")
    for name in ("parameters", "multiply-accumulates", "activations"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row), end_section=row is rows[-1])
    table.add_row(*_cells(total))
    return table


def _cells(row: Any) -> list[str]:
    shape = " x ".join(map(str, row.output_shape))
    return [row.block, shape, f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}"]


def alternatives_table(found: list[Any]) -> Table:
    """What each Inception block costs, and what it would cost without its 1x1 reductions and its factorisation."""
    title = "what a block would cost without its ideas: millions of multiply-accumulates, times its own"
    table = Table("block", title=title, title_justify="left")
    for name in ("as it is", "no 1x1 reductions", "no factorisation", "neither"):
        table.add_column(name, justify="right")
    for row in found:
        others = (row.macs_without_reduction, row.macs_without_factorisation, row.macs_without_both)
        table.add_row(row.block, f"{row.macs / 1e6:,.1f}", *(_times(other, row.macs) for other in others))
    return table


def _times(other: int, own: int) -> str:
    return f"{other / 1e6:,.1f}  {other / own:5.2f}x"


if __name__ == "__main__":
    arguments.run(show, only_prints=True)
