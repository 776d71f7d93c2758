"""Overhead of a sweep compared with the same runs started by hand, one after the other.

    python scripts/benchmarks/sweep.py --report bench_sweep.json        (20 trials: about 10 minutes)

Both alternate, a few trials at a time, with the same number of cores for every run. Measured is the time from starting
the command until it exits, for the sweep including its own MLflow run and its summary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model=vgg16_inception", "model.width=0.1", "epochs=2"]
COMMON = [
    "evaluate.test=false",
    "evaluate.report=false",
    "tracking.log_model=false",
]  # without these, the sweep would run its best trial once more


def run_seconds(arguments: list[str]) -> float:
    """Runs `python -m train` and returns how long it took, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "train", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds that the trials are divided into")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    by_hand = 0.0
    swept = 0.0
    per_round = arguments.trials // arguments.rounds
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as root:
        for number in range(arguments.rounds):
            first, last = number * per_round, (number + 1) * per_round
            for seed in range(first, last):
                paths = [f"run_dir={root}/by-hand-{seed}", f"tracking.uri=sqlite:///{root}/by-hand.db"]
                by_hand += run_seconds([*SMALL, *COMMON, f"seed={seed}", *paths])
            paths = [f"run_dir={root}/sweep-{number}", f"tracking.uri=sqlite:///{root}/sweep.db"]
            swept += run_seconds(["-m", *SMALL, *COMMON, f"seed=range({first},{last})", *paths, "sweep.parallel=1"])
            print(f"by hand {by_hand:.1f} s, swept {swept:.1f} s, ratio {swept / by_hand:.3f}", flush=True)
    results = {"trials": per_round * arguments.rounds, "by_hand_seconds": by_hand, "sweep_seconds": swept}
    if arguments.report:
        arguments.report.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
