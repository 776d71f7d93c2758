"""Overhead of the safeguards: complete runs with and without each one, alternating, compared by their medians.

    python scripts/benchmarks/safeguards.py --pairs 5 --report safeguards.json

Every run trains the default network on the default data for a few epochs, on the command line. `images/s` is the
median over the second half of the epochs: during the first half the uploader loads MLflow, which takes a few seconds of
a core once; `stall` is the share of the run's time in which training waited for a checkpoint. Since machines are noisy,
the report also has the range of the ratios of single pairs, and of consecutive runs with identical settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pty
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Metrics of every step: fifty times the default, to put load on the tracker.
COMMON = [
    "evaluate.test=false", "evaluate.report=false", "tracking.log_model=false", "tracking.wait_seconds=0",
    "tracking.every_steps=1",
]  # fmt: skip
USUAL = "tracking.every_steps=50"  # the default


@dataclass
class Comparison:
    """Two settings of the same run; the second lacks the safeguard, or the working tracker.

    terminal: whether the first run draws its progress in a terminal; the second never does.
    """

    name: str
    first: list[str]
    second: list[str]
    terminal: bool = False


COMPARISONS = [
    Comparison(
        "everything: on, off",
        ["tracking.uri={file}", "checkpoint.every_epochs=1", USUAL],
        ["tracking.uri={dead}", "checkpoint.every_epochs=1000", USUAL],
        terminal=True,
    ),
    Comparison("tracker: alive, dead", ["tracking.uri={alive}"], ["tracking.uri={dead}"]),
    Comparison("determinism: on, off", ["deterministic=true"], ["deterministic=false"]),
    Comparison("checkpoints: every epoch, at the end", ["checkpoint.every_epochs=1"], ["checkpoint.every_epochs=1000"]),
]


@contextmanager
def server(root: Path) -> Iterator[str]:
    """Runs a real MLflow server over SQLite on 127.0.0.1; yields its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "train.ui", f"port={port}", f"uri=sqlite:///{root / 'server/mlflow.db'}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{address}/health"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the MLflow server at {address} does not answer")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(overrides: list[str], folder: Path, *, terminal: bool = False) -> dict[str, float]:
    """Measures one run: images per second, and the share of its time spent waiting for checkpoints."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "train", *COMMON, *overrides, f"run_dir={folder}"]
    with pseudo_terminal() if terminal else nullcontext(subprocess.DEVNULL) as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=True)
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.jsonl").open() as journal:
        values = [json.loads(line)["values"] for line in journal]
    epochs = [line["images_per_second"] for line in values if "images_per_second" in line]
    subprocess.run(["pkill", "-f", f"train.tracking.uploader {folder}"], check=False)  # the uploader of this run
    return {
        "images_per_second": statistics.median(epochs[len(epochs) // 2 :]),
        "first_half": statistics.median(epochs[: len(epochs) // 2]),
        "stall": summary["checkpoint_stall_seconds"] / seconds,
        "seconds": seconds,
    }


@contextmanager
def pseudo_terminal() -> Iterator[int]:
    """Opens a pseudo-terminal whose output is read; yields its file descriptor."""
    reader, writer = pty.openpty()

    def read_all() -> None:
        with suppress(OSError):  # the last writer has closed it
            while os.read(reader, 65536):
                pass

    thread = threading.Thread(target=read_all)
    thread.start()
    try:
        yield writer
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)


def compare(
    comparison: Comparison, pairs: int, common: list[str], stores: dict[str, str], root: Path
) -> dict[str, Any]:
    """Runs the pairs; the order within a pair alternates."""
    results: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for pair in range(pairs):
        for side in ("first", "second") if pair % 2 == 0 else ("second", "first"):
            folder = root / f"{comparison.name.partition(':')[0]}-{pair}-{side}"
            overrides = [override.format(**stores) for override in getattr(comparison, side)]
            if not any(override.startswith("tracking.uri=") for override in overrides):
                overrides.append(f"tracking.uri={stores['file']}")
            terminal = comparison.terminal and side == "first"
            results[side].append(measure([*common, *overrides], folder, terminal=terminal))
    speeds = {side: [run["images_per_second"] for run in runs] for side, runs in results.items()}
    pair_ratios = [first / second for first, second in zip(speeds["first"], speeds["second"], strict=True)]
    seconds = {side: statistics.median(run["seconds"] for run in runs) for side, runs in results.items()}
    equal_ratios = [later / earlier for runs in speeds.values() for earlier, later in itertools.pairwise(runs)]
    return {
        "name": comparison.name,
        "pairs": pairs,
        "median_images_per_second": [statistics.median(speeds["first"]), statistics.median(speeds["second"])],
        "ratio": statistics.median(speeds["first"]) / statistics.median(speeds["second"]),
        "ratios_of_pairs": [min(pair_ratios), max(pair_ratios)],
        "ratios_of_equals": [min(equal_ratios), max(equal_ratios)],
        "ratio_of_run_times": seconds["first"] / seconds["second"],
        "stall": statistics.median(run["stall"] for run in results["first"]),
        "runs": results,
    }


def print_row(row: dict[str, Any]) -> None:
    first, second = row["median_images_per_second"]
    print(
        f"{row['name']:38} {first:6.1f} / {second:6.1f} images/s = {row['ratio']:.3f}   "
        f"pairs {row['ratios_of_pairs'][0]:.3f} to {row['ratios_of_pairs'][1]:.3f}   "
        f"equals {row['ratios_of_equals'][0]:.3f} to {row['ratios_of_equals'][1]:.3f}   "
        f"run time {row['ratio_of_run_times']:.3f}   stall {row['stall']:.2%}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", default="", help="prefix of the comparisons to run")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {options.pairs}")
    if options.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {options.epochs}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-") as root, server(Path(root)) as alive:
        stores = {
            "alive": alive,
            "dead": f"http://127.0.0.1:{free_port()}",
            "file": f"sqlite:///{Path(root) / 'mlflow.db'}",
        }
        for comparison in COMPARISONS:
            if comparison.name.startswith(options.only):
                rows.append(compare(comparison, options.pairs, [f"epochs={options.epochs}"], stores, Path(root)))
                print_row(rows[-1])
                if options.report:
                    options.report.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
