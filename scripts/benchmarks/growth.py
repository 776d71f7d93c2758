"""How the cost of a run grows: with the batch, the image, the network, the classes, the data set, and with its record.

    python scripts/benchmarks/growth.py --report scripts/results/growth.json --picture scripts/results/growth.png
    python scripts/benchmarks/growth.py --only batch_size,classes

Every point is the median of three whole `make train` (or `make compare`) with one key changed; what a run says of
itself is taken down. A set of N examples is a folder of small PNGs that is written for it; runs in MLflow are written
with MLflow's client. Points that the report has are not measured again.
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
USUAL = {
    "model": "vgg16_inception", "model.width": 0.25, "batch_size": 32, "epochs": 1, "steps_per_epoch": 30,
    "evaluate.test": "false", "evaluate.report": "false", "tracking.log_model": "false", "tracking.wait_seconds": 0,
    "data.channels": 1,
}  # fmt: skip
SMALL_SET = {"model.width": 0.1, "data.validation_fraction": 0.01, "data.test_fraction": 0.01}
TIMES = 3
TAKEN = ("train_images_per_second", "data_wait_fraction", "peak_memory_bytes", "parameters", "macs")
PARAMETERS, METRICS = 70, 30  # of a run in MLflow, about as many as ours have


def grown(key: str, value: float, place: Path) -> dict[str, Any]:
    """A run on digits with one key changed."""
    return trained({key: value}, place)


def of_classes(_: str, value: int, place: Path) -> dict[str, Any]:
    return trained({"data": "folder", "data.root": folder(place, max(3 * value, 3000), value), "data.image_size": 32,
                    "data.on_leak": "warn"}, place)  # fmt: skip


def of_examples(_: str, value: int, place: Path) -> dict[str, Any]:
    """The first run of all prepares the set."""
    words = SMALL_SET | {"data": "folder", "data.root": folder(place, value, 10), "data.image_size": 32}
    first, again = once(words, place), trained(words, place)
    return again | {"prepared_seconds": first["seconds"] - again["seconds"]}


def of_runs(_: str, value: int, place: Path) -> dict[str, Any]:
    """`make compare` over so many runs, five seeds of each variant."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = f"sqlite:///{place / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("many")
    for number in range(value):
        run = client.create_run(experiment, tags={"run_id": f"run{number}", "data_fingerprint": "f" * 64})
        known = {f"key{n}": "value" for n in range(PARAMETERS)}
        known |= {"data.name": "digits", "model.name": "vgg16", "model.width": number // 5, "seed": number % 5}
        found = {f"metric{n}": 0.5 for n in range(METRICS)}
        found |= {"test/accuracy": number / value, "cost/parameters": 1e6, "cost/macs": 1e6 + number}
        client.log_batch(
            run.info.run_id,
            [Metric(name, figure, 0, 0) for name, figure in found.items()],
            [Param(name, str(text)) for name, text in known.items()],
        )
        client.set_terminated(run.info.run_id, "FINISHED")
    words = [f"uri={uri}", "experiment=many", f"out={place / 'out'}"]
    return {"seconds": statistics.median(command("train.compare", *words) for _ in range(TIMES))}


CURVES: dict[str, tuple[Callable[[str, Any, Path], dict[str, Any]], str, tuple]] = {
    "batch_size": (grown, "batch_size", (4, 16, 64, 256)),
    "image_size": (grown, "data.image_size", (32, 64, 128, 224)),
    "width": (grown, "model.width", (0.1, 0.25, 0.5, 1.0)),
    "classes": (of_classes, "classes", (10, 100, 1000, 10_000)),
    "examples": (of_examples, "examples", (1000, 10_000, 100_000, 1_000_000)),
    "runs": (of_runs, "runs", (1, 10, 100, 1000)),
}
TITLES = {
    "batch_size": "images/s, batch_size", "image_size": "images/s, data.image_size", "width": "images/s, model.width",
    "classes": "images/s, classes", "examples": "images/s, examples", "runs": "seconds of make compare, runs",
}  # fmt: skip


def trained(words: dict[str, Any], place: Path) -> dict[str, Any]:
    """The medians of some runs."""
    runs = [once(words, place) for _ in range(TIMES)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def once(words: dict[str, Any], place: Path) -> dict[str, Any]:
    """What a run says of itself, and how long it took as a whole."""
    run = Path(tempfile.mkdtemp(dir=place)) / "run"
    keys = USUAL | words
    keys |= {"run_dir": run, "tracking.uri": f"sqlite:///{place}/mlflow.db", "data.directory": place / "data"}
    seconds = command("train", *(f"{name}={value}" for name, value in keys.items()))
    found = json.loads((run / "summary.json").read_text())
    return {"seconds": seconds} | {name: found[name] for name in TAKEN}


def command(module: str, *words: str) -> float:
    """Seconds."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return time.monotonic() - begun


def folder(place: Path, examples: int, classes: int) -> Path:
    """Grey PNGs of 12 x 12 pixels, no two alike."""
    root, draw = place / "pictures", np.random.default_rng(0)
    for number in range(classes):
        (root / f"class{number:05}").mkdir(parents=True)
    for number in range(examples):
        image = Image.fromarray(draw.integers(256, size=(12, 12), dtype=np.uint8))
        image.save(root / f"class{number % classes:05}" / f"{number:07}.png", compress_level=0)
    return root


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Images per second of training, or seconds of `make compare`, against what grew."""
    made, places = make_figure(9, 4.6, 2, 3)
    for name, axes in zip(CURVES, places.flat, strict=True):
        points = [row for row in rows if row["curve"] == name]
        measure = "seconds" if name == "runs" else "train_images_per_second"
        axes.plot([row["value"] for row in points], [row[measure] for row in points], "o-", color=BLUE)
        axes.set(xscale="log", ylim=(0, 1.08 * max(row[measure] for row in points)), title=TITLES[name])
        axes.set_xticks([row["value"] for row in points], [f"{row['value']:,}" for row in points])
        axes.minorticks_off()
    return to_png(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CURVES), help="curves, separated by commas")
    parser.add_argument("--most", type=int, help="no point beyond this one")
    parser.add_argument("--report", type=Path, help="where the figures are written, as JSON")
    parser.add_argument("--picture", type=Path, help="where the curves are drawn, as PNG")
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in CURVES]:
        parser.error(f"--only must be of {', '.join(CURVES)}; got {unknown[0]}")
    rows = json.loads(options.report.read_text()) if options.report and options.report.exists() else []
    for name in options.only.split(","):
        measure, key, values = CURVES[name]
        known = {row["value"] for row in rows if row["curve"] == name}
        for value in values:
            if value in known or (options.most and value > options.most):
                continue
            place = Path(tempfile.mkdtemp(prefix="growth-"))
            row = {"curve": name, "key": key, "value": value, **measure(key, value, place)}
            print(row, flush=True)
            rows = sorted([*rows, row], key=lambda one: (list(CURVES).index(one["curve"]), one["value"]))
            if options.report:
                options.report.write_text(json.dumps(rows, indent=1) + "\n")
            shutil.rmtree(place)
    if options.picture:
        options.picture.write_bytes(picture(rows))


if __name__ == "__main__":
    main()
