"""`make export run=<run folder> format=keras|saved_model|onnx|tflite|all`: a run's best network as a file for others.

    make export run=runs/latest format=all
    make export run=runs/latest format=tflite quantize=int8

One input, images of any size; out come probabilities. What is written is read back by its own runtime, and measured on
the whole test split before it is kept: export/FORMAT/ in the run's folder, with a model card.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from train import command, evaluate, formats, loop, report, run, runtime
from train.config import Config
from train.disk import write_atomically
from train.progress import say
from train.scores import bootstrap_interval
from train.tracking import sync, uploader
from train.tracking.folder import RunFolder, open_folder

CALIBRATION = 256  # training images that int8 is calibrated with
BATCH = 64  # examples of one size that are answered together
BATCH_PIXELS = 16_000_000
TIMED_BATCH, TIMED_CALLS = 32, 7
MOST_CLASSES = 50  # named on the card


@dataclass
class Export:
    """`run`: the folder of a finished run. `format`: one of formats.FORMATS, or all. `quantize`: none, float16, int8.

    `export.max_accuracy_drop`: what a file may lose of the run's accuracy, or it is not kept. All other words are keys
    of the run's config, as for `make evaluate`.
    """

    run: str = "runs/latest"
    format: str = "keras"
    quantize: str = "none"
    max_accuracy_drop: float = field(default=0.01, metadata={"word": "export.max_accuracy_drop"})


@dataclass(frozen=True)
class Measured:
    """What the run's own network says of the test split, and the examples themselves.

    network: the complete one, in float32. probabilities: its own, float32 [N, classes]. truth: int [N].
    """

    network: Any
    dataset: Any
    classes: tuple[str, ...]
    truth: np.ndarray
    accuracy: float
    probabilities: np.ndarray


def export(words: list[str]) -> int:
    """1 where a file was not kept because of its accuracy.

    Raises: ValueError for a run that has not finished, an unknown format, one that lacks its packages.
    """
    keys, others = command.parse_some(Export, words)
    chosen = formats.check(keys.format, keys.quantize)
    folder = open_folder(Path(keys.run))
    if folder.status() != "finished":
        raise ValueError(
            f"run must be finished, got {keys.run}, which is {folder.status() or 'not'}; go on with it: make resume"
        )
    config, _ = evaluate.config_of(folder, folder.card(), others)
    run.check_files(config)
    config, notes = runtime.prepare(config, folder.path / "train.log")
    say(*notes)
    measured = measure(folder, config)
    rows = [one(folder, config, name, keys, measured) for name in chosen]
    show(rows)
    uri = sync.stored_uri(folder)
    uploader.wait(uploader.start(folder, uri), folder, uri, config.tracking.wait_seconds)
    return int(any(row["refused"] for row in rows))


def measure(folder: RunFolder, config: Config) -> Measured:
    """The run's network on its test split, as `make evaluate` does it, and once more from whole images in float32."""
    from train.models.complete import complete

    dataset, _ = run.load_data(config, crops=False)
    run.check_fingerprint(config, dataset)
    classes = tuple(folder.card()["classes"])
    say(*dataset.notes, f"test: {len(dataset.test):,} examples of {dataset.name}, the run's own network")
    network, predict = run.load_best(folder, config)
    with run.naming_broken_examples():
        logits, truth = run.answers(config, dataset.test, len(classes), predict, loop.Stops())
    shippable = complete(network, config.data.crop_fraction)
    found = np.concatenate([shippable.predict_on_batch(images) for images in whole_images(dataset.test)])
    return Measured(shippable, dataset, classes, truth, float((logits.argmax(axis=1) == truth).mean()), found)


def whole_images(split: Any) -> Iterator[np.ndarray]:
    """All examples in their own sizes, as uint8 [n, H, W, C]: those that follow each other and are equal in size."""
    waiting: list[np.ndarray] = []
    for start in range(0, len(split), BATCH):
        indices = range(start, min(start + BATCH, len(split)))
        for index, data in zip(indices, split.read(indices), strict=True):
            image = split.decode_whole(index, data)
            full = len(waiting) == max(1, min(BATCH, BATCH_PIXELS // image[..., 0].size))
            if waiting and (full or waiting[0].shape != image.shape):
                yield np.stack(waiting)
                waiting = []
            waiting.append(image)
    yield np.stack(waiting)


def one(folder: RunFolder, config: Config, name: str, keys: Export, measured: Measured) -> dict[str, Any]:
    """Writes a format, measures it, and keeps it if it is good enough; its summary."""
    label = name if keys.quantize == "none" else f"{name}-{keys.quantize}"
    say(f"{label}: writing, then reading it back")
    place = folder.path / "export" / label
    fresh = place.with_name(f".{label}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    file = fresh / formats.FILES[name]
    images = calibration(measured.dataset.train)
    background = config.data.background
    content = formats.Content(measured.network, measured.classes, background, keys.quantize, images)
    formats.FORMATS[name].write(content, file)
    summary = {"format": name, "quantize": keys.quantize, "file": file.name, **examined(name, file, measured, images)}
    summary["refused"] = measured.accuracy - summary["accuracy"] > keys.max_accuracy_drop
    if summary["refused"]:
        shutil.rmtree(fresh)
        return summary
    summary |= {"run_id": folder.run_id, "time": time.time(), "bytes": size_of(file), "sha256": sha256_of(file)}
    write_atomically(fresh / "classes.txt", "\n".join(measured.classes) + "\n")
    write_atomically(fresh / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(fresh / "README.md", card(folder, summary))
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
    return summary


def examined(name: str, file: Path, measured: Measured, images: np.ndarray) -> dict[str, Any]:
    """What its own runtime makes of it. largest_difference: of a probability, to the run's network in float32."""
    predict = formats.read(name, file)
    found = np.concatenate([predict(batch) for batch in whole_images(measured.dataset.test)])
    if found.shape != measured.probabilities.shape or not np.isfinite(found).all():
        raise RuntimeError(f"{name} answers {found.shape}, with {np.isnan(found).sum()} that are no number")
    right = found.argmax(axis=1) == measured.truth
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(int(right.sum()), len(right)),
        "run_accuracy": measured.accuracy,
        "largest_difference": float(np.abs(found - measured.probabilities).max()),
        "examples": len(right),
        "images_per_second": speed(predict, images[:TIMED_BATCH]),
        "batch": len(images[:TIMED_BATCH]),
    }


def speed(predict: Any, images: np.ndarray) -> float:
    """Images per second, the median of some calls after a first one."""
    predict(images)
    seconds = []
    for _ in range(TIMED_CALLS):
        begun = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - begun)
    return len(images) / statistics.median(seconds)


def calibration(split: Any) -> np.ndarray:
    """Training images, evenly over the split, in the network's size: uint8 [N, S, S, C]."""
    chosen = np.linspace(0, len(split) - 1, min(CALIBRATION, len(split))).astype(int)
    return np.stack([split.example(int(index)) for index in chosen])


def card(folder: RunFolder, summary: dict[str, Any]) -> str:
    """What it is, how good it is, how to load it. Source: Mitchell et al. 2019 (Model Cards for Model Reporting)."""
    best = folder.card()
    side, _, channels = best["input"]["shape"]
    return report.page(
        "card.md",
        export=summary,
        run=folder.read_json("summary.json", {}),
        data=folder.read_json("dataset.json", {}),
        best=best,
        side=side,
        channels=channels,
        crop_fraction=yaml.safe_load((folder.path / "config.yaml").read_text())["data"]["crop_fraction"],
        packages=formats.PACKAGES[summary["format"]],
        lines=formats.lines_of(summary["format"], channels),
        most_classes=MOST_CLASSES,
    )


def size_of(path: Path) -> int:
    """Bytes of a file or of all in a folder."""
    return sum(one.stat().st_size for one in files_of(path))


def sha256_of(path: Path) -> str:
    """Of a file, or of all in a folder, in the order of their names."""
    found = hashlib.sha256()
    for one in files_of(path):
        found.update(one.read_bytes())
    return found.hexdigest()


def files_of(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def show(rows: list[dict[str, Any]]) -> None:
    """In the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("format", "accuracy", "to the run", "largest difference", "size", "images/s", ""):
        table.add_column(name, justify="left" if name in ("format", "") else "right")
    for row in rows:
        label = row["format"] if row["quantize"] == "none" else f"{row['format']} {row['quantize']}"
        drop = row["accuracy"] - row["run_accuracy"]
        size = "" if row["refused"] else f"{row['bytes'] / 2**20:.2f} MiB"
        verdict = "not kept: it loses too much" if row["refused"] else ""
        table.add_row(
            label, f"{row['accuracy']:.4f}", f"{drop:+.4f}", f"{row['largest_difference']:.1e}", size,
            f"{row['images_per_second']:.0f}", verdict,
        )  # fmt: skip
    Console(highlight=False).print(table)


if __name__ == "__main__":
    command.run(export)
