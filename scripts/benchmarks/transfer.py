"""Benefit of fine-tuning: weights from Fashion-MNIST on digits and on sign language, with few and with all examples.

    python scripts/benchmarks/transfer.py --signs FOLDER --report scripts/results/transfer.json        (about an hour)
    python scripts/benchmarks/transfer.py --distill --report scripts/results/distill.json               (half an hour)

Every run is started by its command, one per core; the runs of a seed, from scratch and fine-tuned, see the same
examples in the same order. With --place the runs are kept, and existing ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.evaluation.statistics import mean_accuracy, paired_difference

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    "model.width=0.25", "data.channels=1", "data.image_size=32", "threads=1", "evaluate.report=false",
    "tracking.log_model=false", "tracking.wait_seconds=0",
]  # fmt: skip
STAGES = {"head": (1, 1.0), "upper": (3, 1.0), "all": (8, 1.0)}  # as in conf/experiment/fine_tune.yaml
# Examples per class, and the factor on the epochs: with few examples there are more epochs, so that all runs, from
# scratch and fine-tuned alike, have at least 600 steps.
EXAMPLES = {"10": 8, "50": 2, "null": 1}
SEEDS = 5
PRETRAINING = ["data=fashion_mnist", "augment=flip_crop", "batch_size=64", "epochs=6"]
STUDENT, TEACHER = "model.width=0.1", "model.width=0.5"
DISTILLED = ["data=fashion_mnist", "augment=flip_crop", "batch_size=64", "epochs=6", "steps_per_epoch=300"]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Runs the training in `folder` unless it has finished, and returns its summary."""
    paths = [f"run_dir={folder}", f"tracking.uri=sqlite:///{folder.parent / 'mlflow.db'}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("w") as output:  # a finished run is accepted, one of other overrides rejected
        command = [sys.executable, "-m", "train", *COMMON, *overrides, *paths]
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    print(folder.name, summary["test"]["accuracy"], flush=True)
    return summary


def run_parallel(jobs: dict[tuple, tuple]) -> dict[tuple, float]:
    """Runs the jobs, one per core, and returns their test accuracies."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(run, *job) for name, job in jobs.items()}
        return {name: future.result()["test"]["accuracy"] for name, future in futures.items()}


def transfer(root: Path, signs: Path) -> list[dict[str, Any]]:
    """Returns a row per data set and number of examples: fine-tuned minus from scratch, paired over seeds."""
    run(root / "pretrained", *PRETRAINING)
    weights = root / "pretrained/best/model.keras"
    data = {"digits": ["data=digits"], "sign_digits": ["data=folder", f"data.root={signs}"]}
    jobs = {
        (name, examples, way, seed): (
            root / f"{name}-{examples}-{way}-{seed}",
            *overrides,
            f"data.train_per_class={examples}",
            f"seed={seed}",
            "batch_size=16",
            f"epochs={factor * sum(epochs for epochs, _ in STAGES.values())}",
            *(fine_tuning(weights, factor) if way == "tuned" else ()),
        )
        for seed in range(SEEDS)
        for name, overrides in data.items()
        for examples, factor in EXAMPLES.items()
        for way in ("scratch", "tuned")
    }
    accuracies = run_parallel(jobs)
    return [
        {
            "data": name,
            "per_class": examples,
            **compare(accuracies, (name, examples, "tuned"), (name, examples, "scratch")),
        }
        for name in data
        for examples in EXAMPLES
    ]


def fine_tuning(weights: Path, factor: int) -> list[str]:
    """Returns the overrides of `experiment=fine_tune`, with the epochs of every stage multiplied by `factor`."""
    stages = ",".join(
        f"{{epochs:{factor * epochs},from_part:{part},learning_rate_factor:{rate_factor}}}"
        for part, (epochs, rate_factor) in STAGES.items()
    )
    return ["experiment=fine_tune", f"model.weights={weights}", f"fine_tune.stages=[{stages}]"]


def distill(root: Path, _: Path) -> list[dict[str, Any]]:
    """Compares a narrow network trained alone with the same network distilled from a wider one."""
    teacher = run(root / "teacher", TEACHER, *DISTILLED)
    ways = {"alone": [], "taught": [f"distill.teacher={root / 'teacher'}"]}
    jobs = {
        ("student", way, seed): (root / f"student-{way}-{seed}", STUDENT, *DISTILLED, *overrides, f"seed={seed}")
        for seed in range(SEEDS)
        for way, overrides in ways.items()
    }
    accuracies = run_parallel(jobs)
    teacher_row = {"teacher": teacher["test"]["accuracy"], "teacher_parameters": teacher["parameters"]}
    return [{**teacher_row, **compare(accuracies, ("student", "taught"), ("student", "alone"))}]


def compare(accuracies: dict[tuple, float], one: tuple, other: tuple) -> dict[str, Any]:
    """Returns the means over seeds of two groups, keyed by the last part of their names, and the difference."""
    by_seed = {
        group: {name[-1]: value for name, value in accuracies.items() if name[:-1] == group} for group in (one, other)
    }
    difference = paired_difference(by_seed[one], by_seed[other])
    assert difference
    means = {group[-1]: vars(mean_accuracy(list(by_seed[group].values()))) for group in (one, other)}
    return {**means, "difference": vars(difference)}


def run_folders(path: Path | None) -> Iterator[Path]:
    """Yields `path`, or else a temporary folder."""
    if path:
        yield path
    else:
        with tempfile.TemporaryDirectory(prefix="transfer-") as root:
            yield Path(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signs", type=Path, help="a folder with one folder of images per sign")
    parser.add_argument("--distill", action="store_true", help="measure distillation instead")
    parser.add_argument("--place", type=Path, help="keep the runs in this folder and reuse existing ones")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if not options.distill and not options.signs:
        parser.error("--signs is missing; use --signs FOLDER with one folder of images per sign, or --distill")
    for root in run_folders(options.place and options.place.resolve()):
        rows = (distill if options.distill else transfer)(root, options.signs)
    print(json.dumps(rows, indent=1))
    if options.report:
        options.report.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
