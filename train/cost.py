"""`make cost model=NAME`: the cost of a network block by block, and of its blocks without reductions or factorisation.

    make cost model=inception_v3
    make cost model=vgg16_inception model.width=0.5 data.image_size=32 classes=10

Nothing is trained and no weight gets a value. All figures are for one image and one forward pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from train.cli import arguments
from train.cli.fields import setting
from train.config import composition, schema
from train.config.schema import resolve_image_size
from train.runtime import setup

if TYPE_CHECKING:
    from train.models.ablations import BlockAblation
    from train.models.cost import BlockCost


@dataclass
class Cost:
    """The keys of `make cost`."""

    classes: int = setting(1000, "number of classes", ge=2)


def parse_arguments(argv: list[str]) -> tuple[schema.Model, tuple[int, int, int], int]:
    """Returns the model's config, the input shape and the number of classes.

    `classes=` belongs to this command; every other argument is a key of `make train`. Without `data.image_size` and
    `data.channels` the input is a colour image of the size that the network was published for.

    Raises: ValueError for an unknown key.
    """
    keys, overrides = arguments.parse_known(Cost, argv)
    config = composition.compose(list(map(str, overrides)))
    names = {override.key for override in overrides}
    setup.import_backend("tensorflow", Path(os.devnull))  # takes seconds: after the arguments have been checked
    from train.models import NATIVE_SIZE

    side = resolve_image_size(config) if "data.image_size" in names else NATIVE_SIZE[config.model.name]
    channels = config.data.channels if "data.channels" in names else 3
    return config.model, (side, side, channels), keys.classes


def print_cost(argv: list[str]) -> None:
    """Prints the cost of every block, and the block ablations if the network has multi-branch blocks."""
    model_config, shape, classes = parse_arguments(argv)
    from train import models
    from train.models import ablations, cost, weights

    model_options = schema.options(model_config)
    model_options.pop("weights")  # their values do not change the cost
    with weights.without_weights():
        model = models.build(model_config.name, shape, classes, **model_options)
        inference = models.inference_model(model)
    console = Console(highlight=False)
    title = f"{model_config.name}, {shape[0]} x {shape[1]} x {shape[2]}, {classes} classes"
    rows = cost.block_costs(inference)
    console.print(blocks_table(title, rows, cost.sum_costs(rows)))
    training = cost.total_cost(model)
    if training != cost.sum_costs(rows):
        console.print(f"with auxiliary heads: {training.parameters:,} parameters, {training.macs:,} MACs")
    if rows_of_ablations := ablations.block_ablations(inference):
        console.print(ablations_table(rows_of_ablations))


def blocks_table(title: str, rows: list[BlockCost], total: BlockCost) -> Table:
    """Makes a table with a row per block and their sum."""
    table = Table("block", "output", title=title, title_justify="left")
    for name in ("parameters", "multiply-accumulates", "activations"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_row_cells(row), end_section=row is rows[-1])
    table.add_row(*_row_cells(total))
    return table


def _row_cells(row: BlockCost) -> list[str]:
    shape = " x ".join(map(str, row.output_shape))
    return [row.block, shape, f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}"]


def ablations_table(ablations: list[BlockAblation]) -> Table:
    """Makes a table of each Inception block's cost, as built and without 1x1 reductions or factorisation."""
    title = "block ablations: millions of multiply-accumulates, ratio to the block as built"
    table = Table("block", title=title, title_justify="left")
    for name in ("as built", "no 1x1 reductions", "no factorisation", "neither"):
        table.add_column(name, justify="right")
    for row in ablations:
        variants = (row.macs_without_reduction, row.macs_without_factorisation, row.macs_without_both)
        table.add_row(row.block, f"{row.macs / 1e6:,.1f}", *(_format_ratio(macs, row.macs) for macs in variants))
    return table


def _format_ratio(value: int, baseline: int) -> str:
    return f"{value / 1e6:,.1f}  {value / baseline:5.2f}x"


if __name__ == "__main__":
    arguments.main(
        print_cost,
        Cost,
        other_keys="All other keys are those of make train: model=NAME, model.width, ...; see make train ARGS=--help.",
        only_prints=True,
    )
