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


def parse_arguments(argv: list[str]) -> tuple[Any, tuple[int, int, int], int]:
    """The model's keys, the input shape and the number of classes that the words mean.

    `classes=` is this command's own word (1000); every other one is a key of `make train`. Without `data.image_size`
    and `data.channels` the network gets the colour images of the size that it was published for.

    Raises: ValueError for a word that nobody knows.
    """
    own = [word for word in argv if word.startswith(f"{CLASSES}=")]
    others = [word for word in argv if word not in own]
    config = composition.compose(others)
    names = {word.partition("=")[0] for word in others}
    classes = arguments.parse(Cost, own).classes
    setup.import_backend("tensorflow", Path(os.devnull))  # only now: a mistake is answered at once
    from train.models import NATIVE_SIZE

    side = resolve_image_size(config) if "data.image_size" in names else NATIVE_SIZE[config.model.name]
    channels = config.data.channels if "data.channels" in names else 3
    return config.model, (side, side, channels), classes


@dataclass
class Cost:
    """`classes`: how many the classifier tells apart."""

    classes: int = 1000


def print_cost(argv: list[str]) -> None:
    """Prints the tables."""
    model_keys, shape, classes = parse_arguments(argv)
    from train import models
    from train.models import cost, weights

    how = options(model_keys)
    how.pop("weights")  # which cost nothing
    with weights.without_weights():
        model = models.build(model_keys.name, shape, classes, **how)
        inference = models.inference_model(model)
    console = Console(highlight=False)
    title = f"{model_keys.name}, {shape[0]} x {shape[1]} x {shape[2]}, {classes} classes"
    rows = cost.block_costs(inference)
    console.print(blocks_table(title, rows, cost.sum_costs(rows)))
    training = cost.total_cost(model)
    if training != cost.sum_costs(rows):
        console.print(f"in training, with auxiliary heads: {training.parameters:,} parameters, {training.macs:,} MACs")
    if found := cost.block_ablations(inference):
        console.print(ablations_table(found))


def blocks_table(title: str, rows: list[Any], total: Any) -> Table:
    """One row per block, and their sum."""
    table = Table("block", "output", title=title, title_justify="left")
    for name in ("parameters", "multiply-accumulates", "activations"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_row_cells(row), end_section=row is rows[-1])
    table.add_row(*_row_cells(total))
    return table


def _row_cells(row: Any) -> list[str]:
    shape = " x ".join(map(str, row.output_shape))
    return [row.block, shape, f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}"]


def ablations_table(ablations: list[Any]) -> Table:
    """What each Inception block costs, and what it would cost without its 1x1 reductions and its factorisation."""
    title = "what a block would cost without its ideas: millions of multiply-accumulates, times its own"
    table = Table("block", title=title, title_justify="left")
    for name in ("as it is", "no 1x1 reductions", "no factorisation", "neither"):
        table.add_column(name, justify="right")
    for row in ablations:
        others = (row.macs_without_reduction, row.macs_without_factorisation, row.macs_without_both)
        table.add_row(row.block, f"{row.macs / 1e6:,.1f}", *(_format_ratio(other, row.macs) for other in others))
    return table


def _format_ratio(value: int, baseline: int) -> str:
    return f"{value / 1e6:,.1f}  {value / baseline:5.2f}x"


if __name__ == "__main__":
    arguments.main(print_cost, only_prints=True)
