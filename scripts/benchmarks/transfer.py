"""What fine-tuning buys: Fashion-MNIST's weights on digits and on sign language, with few examples and with all.

    python scripts/benchmarks/transfer.py --signs FOLDER --report scripts/results/transfer.json        (about an hour)
    python scripts/benchmarks/transfer.py --distill --report scripts/results/distill.json               (half an hour)

Every run is started by the command that a person types, one on each core; from scratch and fine-tuned runs of a seed
see the same examples in the same order. What there is already is not run again: --place keeps the runs.
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

from train.evaluation.statistics import mean_interval, paired_difference

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    "model.width=0.25", "data.channels=1", "data.image_size=32", "threads=1", "evaluate.report=false",
    "tracking.log_model=false", "tracking.wait_seconds=0",
]  # fmt: skip
STAGES = {"head": (1, 1.0), "upper": (3, 1.0), "all": (8, 1.0)}  # as in conf/experiment/fine_tune.yaml
# Examples of every class, and how many times those epochs: few are seen more often, so that all runs have 600 steps
# and more, from scratch and fine-tuned alike.
EXAMPLES = {"10": 8, "50": 2, "null": 1}
SEEDS = 5
PRETRAINING = ["data=fashion_mnist", "augment=flip_crop", "batch_size=64", "epochs=6"]
STUDENT, TEACHER = "model.width=0.1", "model.width=0.5"
DISTILLED = ["data=fashion_mnist", "augment=flip_crop", "batch_size=64", "epochs=6", "steps_per_epoch=300"]


def run(place: Path, *words: str) -> dict[str, Any]:
    """The summary of a run with these words, which is made if it is not there."""
    own = [f"run_dir={place}", f"tracking.uri=sqlite:///{place.parent / 'mlflow.db'}"]
    place.mkdir(parents=True, exist_ok=True)
    with (place / "output.txt").open("w") as output:  # a run that is finished says so, one of other words is refused
        command = [sys.executable, "-m", "train", *COMMON, *words, *own]
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=True)
    found = json.loads((place / "summary.json").read_text())
    print(place.name, found["test"]["accuracy"], flush=True)
    return found


def side_by_side(jobs: dict[tuple, tuple]) -> dict[tuple, float]:
    """The test accuracy of each, one on each core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {name: pool.submit(run, *job) for name, job in jobs.items()}
        return {name: future.result()["test"]["accuracy"] for name, future in found.items()}


def transfer(place: Path, signs: Path) -> list[dict[str, Any]]:
    """A row for each data set and number of examples: fine-tuned minus from scratch, paired over seeds."""
    run(place / "pretrained", *PRETRAINING)
    weights = place / "pretrained/best/model.keras"
    data = {"digits": ["data=digits"], "sign_digits": ["data=folder", f"data.root={signs}"]}
    jobs = {
        (name, examples, way, seed): (
            place / f"{name}-{examples}-{way}-{seed}",
            *words,
            f"data.train_per_class={examples}",
            f"seed={seed}",
            "batch_size=16",
            f"epochs={times * sum(epochs for epochs, _ in STAGES.values())}",
            *(tuned(weights, times) if way == "tuned" else ()),
        )
        for seed in range(SEEDS)
        for name, words in data.items()
        for examples, times in EXAMPLES.items()
        for way in ("scratch", "tuned")
    }
    found = side_by_side(jobs)
    return [
        {"data": name, "per_class": examples, **compared(found, (name, examples, "tuned"), (name, examples, "scratch"))}
        for name in data
        for examples in EXAMPLES
    ]


def tuned(weights: Path, times: int) -> list[str]:
    """The words of `experiment=fine_tune` with stages this many times as long."""
    stages = ",".join(
        f"{{epochs:{times * epochs},from_part:{part},learning_rate_factor:{factor}}}"
        for part, (epochs, factor) in STAGES.items()
    )
    return ["experiment=fine_tune", f"model.weights={weights}", f"fine_tune.stages=[{stages}]"]


def distill(place: Path, _: Path) -> list[dict[str, Any]]:
    """A narrow network by itself, and taught by a wider one."""
    teacher = run(place / "teacher", TEACHER, *DISTILLED)
    ways = {"alone": [], "taught": [f"distill.teacher={place / 'teacher'}"]}
    jobs = {
        ("student", way, seed): (place / f"student-{way}-{seed}", STUDENT, *DISTILLED, *words, f"seed={seed}")
        for seed in range(SEEDS)
        for way, words in ways.items()
    }
    found = side_by_side(jobs)
    own = {"teacher": teacher["test"]["accuracy"], "teacher_parameters": teacher["parameters"]}
    return [{**own, **compared(found, ("student", "taught"), ("student", "alone"))}]


def compared(found: dict[tuple, float], one: tuple, other: tuple) -> dict[str, Any]:
    """Means over seeds by the last word, and the difference."""
    values = {which: {name[-1]: value for name, value in found.items() if name[:-1] == which} for which in (one, other)}
    difference = paired_difference(values[one], values[other])
    assert difference
    means = {which[-1]: vars(mean_interval(list(values[which].values()))) for which in (one, other)}
    return {**means, "difference": vars(difference)}


def places(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="transfer-") as place:
            yield Path(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signs", type=Path, help="a folder with a folder of pictures for every sign")
    parser.add_argument("--distill", action="store_true", help="a narrow network, taught by a wider one")
    parser.add_argument("--place", type=Path, help="where the runs lie, so that they need not be made again")
    parser.add_argument("--report", type=Path, help="where the figures are written, as JSON")
    options = parser.parse_args()
    if not options.distill and not options.signs:
        parser.error("--signs must be a folder of pictures, got none; or use --distill")
    for place in places(options.place and options.place.resolve()):
        rows = (distill if options.distill else transfer)(place, options.signs)
    print(json.dumps(rows, indent=1))
    if options.report:
        options.report.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
