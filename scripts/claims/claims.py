"""Tests ten claims of the Inception papers, each with an experiment that was specified before it was run.

    python scripts/claims/claims.py                          (all; runs that are in the table are not repeated)
    python scripts/claims/claims.py bottleneck auxiliary     (only these)
    python scripts/claims/claims.py --report                 (runs nothing: verdicts and plot from the table so far)
    python scripts/claims/claims.py --quick                  (two seeds and epochs: a smoke test without verdicts)

A claim is an experiment under conf/experiment/claims/, with its variants, settings, seeds and expectations. Every run
is a row of scripts/results/claims.csv, keyed by the hash of its command: claims share common runs, and a config key
that is added later does not invalidate them. Several runs follow each other in one process, which does not change
their bits (tests/scripts/test_claims.py).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from plot import plot_claims
from verdicts import MEASURES, Answer, Rows, Trial, answers, describe, verdict

from train.config.composition import compose, minimal_command
from train.config.schema import Claim, Config
from train.config.serialization import Redactor, flatten, to_dict
from train.evaluation.plots.style import to_png
from train.storage.atomic import write_atomically
from train.sweep.workers import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "conf/experiment/claims"
TABLE = ROOT / "scripts/results/claims.csv"
PLOT = ROOT / "scripts/results/claims.png"
RUNS = ROOT / "runs/claims"
QUICK = ["epochs=2", "steps_per_epoch=5", "model.width=0.05"]
PER_PROCESS = 16  # runs, a bound on the memory that TensorFlow keeps of each
COLUMNS = ("key", "command", "seed", *MEASURES, "weights_sha256", "machine", "code")
FIRST_LAYER = "train/gradient_norm/first_layer"
BRANCH_5X5 = "_Branch_2"


# ------------------------------------------------------------------------------------------------------------- claims


def claims(names: list[str], *, quick: bool = False) -> dict[str, Claim]:
    """Returns the named claims in order, or all of them. quick: reduced to two tiny runs on the embedded data.

    Raises: SystemExit for an unknown name.
    """
    known = sorted(path.stem for path in EXPERIMENTS.glob("[!_]*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: unknown claim {unknown[0]}; valid names: {', '.join(known)}")
    configs = {name: compose([f"experiment=claims/{name}"]) for name in names or known}
    by_name = {name: config.claim for name, config in configs.items()}
    if not quick:
        return by_name
    small = {"digits": ["data=digits", *QUICK]}
    return {name: replace(claim, seeds=2, settings=small) for name, claim in by_name.items()}


def trials_of(name: str, claim: Claim) -> list[Trial]:
    """Returns the trials of a claim seed by seed, so that an interruption leaves complete comparisons behind."""
    cells = [(setting, variant) for setting in claim.settings for variant in claim.variants]
    overrides = {
        (setting, variant): [f"experiment=claims/{name}", *claim.settings[setting], *claim.variants[variant]]
        for setting, variant in cells
    }
    configs = {cell: compose(overrides[cell]) for cell in cells}
    return [
        trial_of(name, *cell, overrides[cell], replace(configs[cell], seed=configs[cell].seed + number))
        for number in range(claim.seeds)
        for cell in cells
    ]


def trial_of(name: str, setting: str, variant: str, overrides: list[str], config: Config) -> Trial:
    command = minimal_command(flatten(to_dict(config, Redactor())))
    key = hashlib.sha256(command.encode()).hexdigest()[:16]
    return Trial(name, setting, variant, config.seed, (*overrides, f"seed={config.seed}"), key, command)


def read(table: Path) -> Rows:
    """Returns the rows of the table by key."""
    if not table.exists():
        return {}
    with table.open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


# --------------------------------------------------------------------------------------------------------------- runs


def run(trial: Trial) -> dict[str, Any]:
    """Runs one trial in a process of the pool and returns its row. Raises: RuntimeError naming the log of a failed one.

    If a signal stopped the run, the process exits with the run's exit code.
    """
    folder = RUNS / trial.key
    folder.mkdir(parents=True, exist_ok=True)
    with redirected_output(folder / "output.txt"):
        if not is_finished(folder):
            exit_code = train_or_resume([*trial.words, f"run_dir={folder}"])
            if exit_code > 128:
                os._exit(exit_code)
            if exit_code:
                name = f"{trial.claim}/{trial.variant} seed {trial.seed}"
                raise RuntimeError(f"{name} failed with exit code {exit_code}; see {folder}")
    return {"key": trial.key, "command": trial.command, "seed": trial.seed, **read_measures(folder)}


def train_or_resume(overrides: list[str]) -> int:
    """Does what `make train` does with these overrides, and resumes an interrupted run. Returns the exit code."""
    from train import resume
    from train.run import lifecycle
    from train.tracking.run_dir import open_run_dir

    config: Config = compose(overrides)
    folder = Path(str(config.run_dir))
    if (folder / "run.json").exists():
        return resume.resume_if_same_config(open_run_dir(folder), config, Redactor())
    return lifecycle.start_run(config, Redactor(), latest=False)


def is_finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


@contextmanager
def redirected_output(path: Path) -> Iterator[None]:
    """Redirects the output of this process and its libraries to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    original = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(original, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def read_measures(folder: Path) -> dict[str, Any]:
    """Reads the measures of a finished run from its folder."""
    summary = json.loads((folder / "summary.json").read_text())
    provenance = json.loads((folder / "provenance.json").read_text())
    cost = json.loads((folder / "cost.json").read_text())
    lines = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [values[FIRST_LAYER] for values in lines if FIRST_LAYER in values]
    return {
        "test_accuracy": summary["test"]["accuracy"],
        "test_loss": summary["test"]["loss"],
        "mean_validation_accuracy": statistics.fmean(
            values["validation/accuracy"] for values in lines if "validation/accuracy" in values
        ),
        "gradient_norm": statistics.fmean(norms),
        "parameters": summary["parameters"],
        "macs": summary["macs"],
        "branch_5x5_macs": sum(macs for name, macs in cost["layers"].items() if BRANCH_5X5 in name),
        "images_per_second": round(summary["train_images_per_second"], 1),
        "weights_sha256": summary["weights_sha256"][:16],
        "machine": provenance["processor"],
        "code": provenance["code"],
    }


def run_all(pending: list[Trial], table: Path, parallel: int) -> int:
    """Runs the trials and appends each row as soon as it is complete. Returns the number of failed trials."""
    failed = 0
    start = time.time()
    table.parent.mkdir(parents=True, exist_ok=True)
    for done, (trial, future) in enumerate(completed_trials(pending, parallel), start=1):
        try:
            row = future.result()
        except RuntimeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        append(table, row)
        minutes_left = (time.time() - start) / done * (len(pending) - done) / 60
        print(
            f"{done}/{len(pending)}  {trial.claim} {trial.setting} {trial.variant} seed {trial.seed}  "
            f"{row['test_accuracy']:.4f}  {minutes_left:.0f} minutes left",
            flush=True,
        )
    return failed


def completed_trials(pending: list[Trial], parallel: int) -> Iterator[tuple[Trial, Future]]:
    """Yields each trial once it has ended. The pool is replaced regularly: its own max_tasks_per_child may hang."""
    size = PER_PROCESS * parallel
    for start in range(0, len(pending), size):
        pool = ProcessPoolExecutor(parallel, get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),))
        try:
            waiting = {pool.submit(run, trial): trial for trial in pending[start : start + size]}
            yield from ((waiting[future], future) for future in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def append(table: Path, row: dict[str, Any]) -> None:
    """Appends a row to the table and syncs it to disk."""
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------- verdicts


def print_verdict(name: str, claim: Claim, rows: Rows) -> list[Answer]:
    results = answers(claim, trials_of(name, claim), rows)
    print(f"\n{name}: {claim.hypothesis}\n  {verdict(results)}")
    for answer in results:
        comparison, result, claimed = describe(answer)
        print(f"    {answer.setting:8} {comparison}: {result}, claimed: {claimed}: {answer.verdict}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="claims (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, written to a separate table")
    parser.add_argument("--report", action="store_true", help="print verdicts and draw the plot, run nothing")
    parser.add_argument(
        "--parallel", type=int, default=os.cpu_count() or 1, help="number of runs at a time, one per core"
    )
    options = parser.parse_args()
    table = RUNS / "quick.csv" if options.quick else TABLE
    selected = claims(options.names, quick=options.quick)
    failed = 0
    if not options.report:
        needed = {trial.key: trial for name, claim in selected.items() for trial in trials_of(name, claim)}
        pending = sorted((t for key, t in needed.items() if key not in read(table)), key=lambda trial: trial.seed)
        print(f"{len(needed)} runs, {len(needed) - len(pending)} of them already in {table.relative_to(ROOT)}")
        try:
            failed = run_all(pending, table, options.parallel)
        except (KeyboardInterrupt, BrokenProcessPool):
            print("stopped; run the same command to continue, including the interrupted run", file=sys.stderr)
            return 130
    rows = read(table)
    results = {name: print_verdict(name, claim, rows) for name, claim in selected.items()}
    if len(results) == len(claims([])) and not options.quick:
        figure = plot_claims([(name, verdict(found), found) for name, found in results.items()])
        write_atomically(PLOT, to_png(figure))
        print(f"\nplot: {PLOT.relative_to(ROOT)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
