"""Ten claims of the Inception papers, each answered by an experiment that was written down before it was run.

    python scripts/claims/claims.py                          (all; what the table has already is not run again)
    python scripts/claims/claims.py bottleneck auxiliary     (those)
    python scripts/claims/claims.py --report                 (runs nothing: what the table says so far, and its picture)
    python scripts/claims/claims.py --quick                  (two seeds and epochs: tries everything, answers nothing)

A claim is an experiment under conf/experiment/claims/, with its variants, settings, seeds and what is expected. Every
run is a line of scripts/results/claims.csv, under the hash of its command: claims share what they have in common, and a
key that comes later makes no run anew. Several runs follow each other in a process, which changes none of their bits
(tests/scripts/test_claims.py).
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

from plot import picture
from verdicts import MEASURES, Answer, Rows, Trial, answers, told, verdict

from train.config.composition import compose, minimal_command
from train.config.schema import Claim, Config
from train.config.serialization import Redactor, flatten, to_dict
from train.evaluation.plots.style import to_png
from train.storage.atomic import write_atomically
from train.sweep.workers import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "conf/experiment/claims"
TABLE = ROOT / "scripts/results/claims.csv"
PICTURE = ROOT / "scripts/results/claims.png"
RUNS = ROOT / "runs/claims"
QUICK = ["epochs=2", "steps_per_epoch=5", "model.width=0.05"]
PER_PROCESS = 16  # runs, so that what TensorFlow keeps of each does not add up
COLUMNS = ("key", "command", "seed", *MEASURES, "weights_sha256", "machine", "code")
FIRST_LAYER = "train/gradient_norm/first_layer"
BRANCH_5X5 = "_Branch_2"


# ----------------------------------------------------------------------------------------------------- what there is


def claims(names: list[str], *, quick: bool = False) -> dict[str, Claim]:
    """By name, in the order of the names; all where none is given. quick: cut down to two tiny runs on embedded data.

    Raises: SystemExit for a name that nobody knows.
    """
    known = sorted(path.stem for path in EXPERIMENTS.glob("[!_]*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: claims must be some of {', '.join(known)}, got {unknown[0]}")
    configs = {name: compose([f"experiment=claims/{name}"]) for name in names or known}
    found = {name: config.claim for name, config in configs.items()}
    if not quick:
        return found
    small = {"digits": ["data=digits", *QUICK]}
    return {name: replace(claim, seeds=2, settings=small) for name, claim in found.items()}


def trials_of(name: str, claim: Claim) -> list[Trial]:
    """Seed by seed, so that whatever stops the work leaves whole comparisons behind."""
    places = [(setting, variant) for setting in claim.settings for variant in claim.variants]
    words = {
        (setting, variant): [f"experiment=claims/{name}", *claim.settings[setting], *claim.variants[variant]]
        for setting, variant in places
    }
    configs = {place: compose(words[place]) for place in places}
    return [
        trial_of(name, *place, words[place], replace(configs[place], seed=configs[place].seed + number))
        for number in range(claim.seeds)
        for place in places
    ]


def trial_of(name: str, setting: str, variant: str, words: list[str], config: Config) -> Trial:
    command = minimal_command(flatten(to_dict(config, Redactor())))
    key = hashlib.sha256(command.encode()).hexdigest()[:16]
    return Trial(name, setting, variant, config.seed, (*words, f"seed={config.seed}"), key, command)


def read(table: Path) -> Rows:
    """Lines by key."""
    if not table.exists():
        return {}
    with table.open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------ running them


def run(trial: Trial) -> dict[str, Any]:
    """In a process of the pool: one run after another. Raises: RuntimeError naming where to read why it failed.

    A run that a signal stopped ends its process too, as the signal asked.
    """
    from train.run import train_and_evaluate as story

    folder = RUNS / trial.key
    folder.mkdir(parents=True, exist_ok=True)
    with talking_to(folder / "output.txt"):
        if not finished(folder):
            code = story_of(story, [*trial.words, f"run_dir={folder}"])
            if code > 128:
                os._exit(code)
            if code:
                raise RuntimeError(f"{trial.claim}/{trial.variant} seed {trial.seed} ended with {code}: see {folder}")
    return {"key": trial.key, "command": trial.command, "seed": trial.seed, **measured(folder)}


def story_of(story: Any, words: list[str]) -> int:
    """What `make train` does with these words; a run that was interrupted goes on."""
    from train import resume
    from train.tracking.run_dir import open_run_dir

    config: Config = compose(words)
    folder = Path(str(config.run_dir))
    if (folder / "run.json").exists():
        return resume.resume_if_same_config(open_run_dir(folder), config, Redactor())
    return story.train(config, Redactor(), latest=False)


def finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


@contextmanager
def talking_to(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def measured(folder: Path) -> dict[str, Any]:
    """The figures of a finished run, from what it has left."""
    summary = json.loads((folder / "summary.json").read_text())
    ground, cost = (json.loads((folder / name).read_text()) for name in ("provenance.json", "cost.json"))
    lines = [json.loads(line)["values"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [
        values["train/gradient_norm/first_layer"] for values in lines if "train/gradient_norm/first_layer" in values
    ]
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
        "machine": ground["processor"],
        "code": ground["code"],
    }


def run_all(pending: list[Trial], table: Path, parallel: int) -> int:
    """Runs them, and writes a line for each as soon as it is over; how many failed."""
    failed, begun = 0, time.time()
    table.parent.mkdir(parents=True, exist_ok=True)
    for done, (trial, future) in enumerate(ended(pending, parallel), start=1):
        try:
            row = future.result()
        except RuntimeError as fault:
            failed += 1
            print(f"error: {fault}", file=sys.stderr, flush=True)
            continue
        append(table, row)
        left = (time.time() - begun) / done * (len(pending) - done) / 60
        print(
            f"{done}/{len(pending)}  {trial.claim} {trial.setting} {trial.variant} seed {trial.seed}  "
            f"{row['test_accuracy']:.4f}  {left:.0f} minutes left",
            flush=True,
        )
    return failed


def ended(pending: list[Trial], parallel: int) -> Iterator[tuple[Trial, Future]]:
    """Each as soon as it has ended. Processes are made anew after some runs: pools that do so themselves may hang."""
    size = PER_PROCESS * parallel
    for start in range(0, len(pending), size):
        pool = ProcessPoolExecutor(parallel, get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),))
        try:
            waiting = {pool.submit(run, trial): trial for trial in pending[start : start + size]}
            yield from ((waiting[future], future) for future in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def append(table: Path, row: dict[str, Any]) -> None:
    """One line, on disk before anything else is begun."""
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            lines.writeheader()
        lines.writerow(row)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------ what came of it


def tell(name: str, claim: Claim, rows: Rows) -> list[Answer]:
    trials = trials_of(name, claim)
    found = answers(claim, trials, rows)
    print(f"\n{name}: {claim.hypothesis}\n  {verdict(found)}")
    for one in found:
        what, came, claimed = told(one)
        print(f"    {one.setting:8} {what}: {came}, claimed: {claimed}: {one.verdict}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="claims; all where none is named")
    parser.add_argument("--quick", action="store_true", help="tiny runs into a table of their own")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core")
    options = parser.parse_args()
    table = RUNS / "quick.csv" if options.quick else TABLE
    chosen = claims(options.names, quick=options.quick)
    failed = 0
    if not options.report:
        wanted = {trial.key: trial for name, claim in chosen.items() for trial in trials_of(name, claim)}
        pending = sorted((t for key, t in wanted.items() if key not in read(table)), key=lambda trial: trial.seed)
        print(f"{len(wanted)} runs, {len(wanted) - len(pending)} of them in {table.relative_to(ROOT)} already")
        try:
            failed = run_all(pending, table, options.parallel)
        except (KeyboardInterrupt, BrokenProcessPool):
            print("stopped; the same command goes on, with the run that was interrupted too", file=sys.stderr)
            return 130
    rows = read(table)
    found = {name: tell(name, claim, rows) for name, claim in chosen.items()}
    if len(found) == len(claims([])) and not options.quick:
        write_atomically(PICTURE, to_png(picture([(name, verdict(each), each) for name, each in found.items()])))
        print(f"\npicture: {PICTURE.relative_to(ROOT)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
