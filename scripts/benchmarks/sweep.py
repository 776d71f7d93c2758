"""What a sweep costs beside the same runs started by hand, one after the other.

    python scripts/benchmarks/sweep.py --report bench_sweep.json        (20 trials: about 10 minutes)

Both ways take turns, a few trials at a time, with the same number of cores for every run; what counts is the time from
typing the words to the end, for the sweep its own record in MLflow and its last words included.
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
ALIKE = [
    "evaluate.test=false",
    "evaluate.report=false",
    "tracking.log_model=false",
]  # so that the sweep's best is no run of its own


def took(words: list[str]) -> float:
    """Seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "train", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="the trials are divided among so many turns")
    parser.add_argument("--report", type=Path, help="where the figures are written, as JSON")
    arguments = parser.parse_args()
    by_hand, swept, each = 0.0, 0.0, arguments.trials // arguments.rounds
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as place:
        for turn in range(arguments.rounds):
            for seed in range(turn * each, (turn + 1) * each):
                own = [f"run_dir={place}/by-hand-{seed}", f"tracking.uri=sqlite:///{place}/by-hand.db"]
                by_hand += took([*SMALL, *ALIKE, f"seed={seed}", *own])
            own = [f"run_dir={place}/sweep-{turn}", f"tracking.uri=sqlite:///{place}/sweep.db", "sweep.parallel=1"]
            swept += took(["-m", *SMALL, *ALIKE, f"seed=range({turn * each},{(turn + 1) * each})", *own])
            print(f"by hand {by_hand:.1f} s, swept {swept:.1f} s, ratio {swept / by_hand:.3f}", flush=True)
    found = {"trials": each * arguments.rounds, "by_hand_seconds": by_hand, "sweep_seconds": swept}
    if arguments.report:
        arguments.report.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
