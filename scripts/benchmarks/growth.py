"""Scaling of a run's cost with batch size, image size, width, classes and examples, and of `make compare` with runs.

    python scripts/benchmarks/growth.py --report scripts/results/growth.json --picture scripts/results/growth.png
    python scripts/benchmarks/growth.py --only batch_size,classes

Every point is the median of three complete `make train` (or `make compare`) with one key changed; the figures are from
the runs' summaries. A data set of N examples is a generated folder of small PNGs; runs in MLflow are written with
MLflow's client. Points that the report has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.evaluation.plots.style import BLUE, make_figure, to_png

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "model": "vgg16_inception", "model.width": 0.25, "batch_size": 32, "epochs": 1, "steps_per_epoch": 30,
    "evaluate.test": "false", "evaluate.report": "false", "tracking.log_model": "false", "tracking.wait_seconds": 0,
    "data.channels": 1,
}  # fmt: skip
SMALL_SET = {"model.width": 0.1, "data.validation_fraction": 0.01, "data.test_fraction": 0.01}
TIMES = 3
MEASURES = ("train_images_per_second", "data_wait_fraction", "peak_memory_bytes", "parameters", "macs")
PARAMETERS, METRICS = 70, 30  # number per run in MLflow, about as many as ours have


def measure_key(key: str, value: float, root: Path) -> dict[str, Any]:
    """Measures runs on digits with one key changed."""
    return median_run({key: value}, root)


def measure_classes(_: str, value: int, root: Path) -> dict[str, Any]:
    images = write_images(root, max(3 * value, 3000), value)
    overrides = {"data": "folder", "data.root": images, "data.image_size": 32, "data.on_leak": "warn"}
    return median_run(overrides, root)


def measure_examples(_: str, value: int, root: Path) -> dict[str, Any]:
    """Measures runs on `value` examples; an additional first run indexes the data set."""
    overrides = SMALL_SET | {"data": "folder", "data.root": write_images(root, value, 10), "data.image_size": 32}
    first = run_once(overrides, root)
    later = median_run(overrides, root)
    return later | {"prepared_seconds": first["seconds"] - later["seconds"]}


def measure_compare(_: str, value: int, root: Path) -> dict[str, Any]:
    """Measures `make compare` over `value` runs, five seeds of each variant."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("many")
    for number in range(value):
        run = client.create_run(experiment, tags={"run_id": f"run{number}", "data_fingerprint": "f" * 64})
        parameters = {f"key{n}": "value" for n in range(PARAMETERS)}
        parameters |= {"data.name": "digits", "model.name": "vgg16", "model.width": number // 5, "seed": number % 5}
        metrics = {f"metric{n}": 0.5 for n in range(METRICS)}
        metrics |= {"test/accuracy": number / value, "cost/parameters": 1e6, "cost/macs": 1e6 + number}
        client.log_batch(
            run.info.run_id,
            [Metric(name, number, 0, 0) for name, number in metrics.items()],
            [Param(name, str(text)) for name, text in parameters.items()],
        )
        client.set_terminated(run.info.run_id, "FINISHED")
    overrides = [f"uri={uri}", "experiment=many", f"out={root / 'out'}"]
    return {"seconds": statistics.median(command("train.compare", *overrides) for _ in range(TIMES))}


CURVES: dict[str, tuple[Callable[[str, Any, Path], dict[str, Any]], str, tuple]] = {
    "batch_size": (measure_key, "batch_size", (4, 16, 64, 256)),
    "image_size": (measure_key, "data.image_size", (32, 64, 128, 224)),
    "width": (measure_key, "model.width", (0.1, 0.25, 0.5, 1.0)),
    "classes": (measure_classes, "classes", (10, 100, 1000, 10_000)),
    "examples": (measure_examples, "examples", (1000, 10_000, 100_000, 1_000_000)),
    "runs": (measure_compare, "runs", (1, 10, 100, 1000)),
}
TITLES = {
    "batch_size": "images/s, batch_size", "image_size": "images/s, data.image_size", "width": "images/s, model.width",
    "classes": "images/s, classes", "examples": "images/s, examples", "runs": "seconds of make compare, runs",
}  # fmt: skip


def median_run(overrides: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns the medians of several runs."""
    runs = [run_once(overrides, root) for _ in range(TIMES)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def run_once(overrides: dict[str, Any], root: Path) -> dict[str, Any]:
    """Runs the training and returns figures from its summary, and its total duration."""
    run = Path(tempfile.mkdtemp(dir=root)) / "run"
    config = COMMON | overrides
    config |= {"run_dir": run, "tracking.uri": f"sqlite:///{root}/mlflow.db", "data.directory": root / "data"}
    seconds = command("train", *(f"{name}={value}" for name, value in config.items()))
    summary = json.loads((run / "summary.json").read_text())
    return {"seconds": seconds} | {name: summary[name] for name in MEASURES}


def command(module: str, *arguments: str) -> float:
    """Runs a module and returns how long it took, in seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} {' '.join(arguments)} failed with exit code {done.returncode}\n{done.stderr[-2000:]}"
        )
    return time.monotonic() - start


def write_images(root: Path, examples: int, classes: int) -> Path:
    """Writes distinct grey PNGs of 12 x 12 pixels into one folder per class."""
    images = root / "images"
    draw = np.random.default_rng(0)
    for number in range(classes):
        (images / f"class{number:05}").mkdir(parents=True)
    for number in range(examples):
        image = Image.fromarray(draw.integers(256, size=(12, 12), dtype=np.uint8))
        image.save(images / f"class{number % classes:05}" / f"{number:07}.png", compress_level=0)
    return images


def plot_curves(rows: list[dict[str, Any]]) -> bytes:
    """Plots images per second of training, or seconds of `make compare`, over the varied quantity."""
    figure, subplots = make_figure(9, 4.6, 2, 3)
    for name, axes in zip(CURVES, subplots.flat, strict=True):
        points = [row for row in rows if row["curve"] == name]
        measure = "seconds" if name == "runs" else "train_images_per_second"
        axes.plot([row["value"] for row in points], [row[measure] for row in points], "o-", color=BLUE)
        axes.set(xscale="log", ylim=(0, 1.08 * max(row[measure] for row in points)), title=TITLES[name])
        axes.set_xticks([row["value"] for row in points], [f"{row['value']:,}" for row in points])
        axes.minorticks_off()
    return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CURVES), help="curves, separated by commas")
    parser.add_argument("--most", type=int, help="skip points above this value")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    parser.add_argument("--picture", type=Path, help="draw the curves to this PNG file")
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in CURVES]:
        parser.error(f"--only must be one of {', '.join(CURVES)}; got {unknown[0]}")
    rows = json.loads(options.report.read_text()) if options.report and options.report.exists() else []
    for name in options.only.split(","):
        measure, key, values = CURVES[name]
        measured = {row["value"] for row in rows if row["curve"] == name}
        for value in values:
            if value in measured or (options.most and value > options.most):
                continue
            root = Path(tempfile.mkdtemp(prefix="growth-"))
            row = {"curve": name, "key": key, "value": value, **measure(key, value, root)}
            print(row, flush=True)
            rows = sorted([*rows, row], key=lambda row: (list(CURVES).index(row["curve"]), row["value"]))
            if options.report:
                options.report.write_text(json.dumps(rows, indent=1) + "\n")
            shutil.rmtree(root)
    if options.picture:
        options.picture.write_bytes(plot_curves(rows))


if __name__ == "__main__":
    main()
