"""`make report run=<run folder>`: writes a run's report, one self-contained HTML page.

    make report run=runs/latest

A run writes its report when it ends; this command rewrites it from the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.cli.fields import setting
from train.evaluation.report import write_report
from train.tracking.run_dir import open_run_dir


@dataclass
class Report:
    """The keys of `make report`."""

    run: str = setting("runs/latest", "folder of the run")


def report(argv: list[str]) -> None:
    """Writes the report and prints its path. Raises: ValueError if there is no such run, or it has no epoch yet."""
    run_dir = open_run_dir(Path(arguments.parse(Report, argv).run))
    print(write_report(run_dir, run_dir.summary()))


if __name__ == "__main__":
    arguments.main(report, Report)
