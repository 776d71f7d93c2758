"""`make report run=<run folder>`: everything about a run on one page, a file that needs nothing else.

A run writes its own at its end; this writes it anew from the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.evaluation.report import write_report
from train.tracking.run_dir import open_run_dir


@dataclass
class Report:
    """`run`: the folder of a run."""

    run: str = "runs/latest"


def report(argv: list[str]) -> None:
    """Prints where the page is. Raises: ValueError if there is no such run, or nothing has been trained in it."""
    folder = open_run_dir(Path(arguments.parse(Report, argv).run))
    print(write_report(folder, folder.summary()))


if __name__ == "__main__":
    arguments.main(report)
