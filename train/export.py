"""`make export run=<run folder> format=keras|saved_model|onnx|tflite|all`: a run's best network as a file for others.

    make export run=runs/latest format=all
    make export run=runs/latest format=tflite quantize=int8

One input, images of any size; out come probabilities. What is written is read back by its own runtime, and measured on
the whole test split before it is kept: export/FORMAT/ in the run's folder, with a model card.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from train import formats
from train.cli import arguments
from train.cli.progress import say
from train.config.schema import Config
from train.data.decode import resize
from train.evaluation import html
from train.evaluation.metrics import bootstrap_interval, log_softmax
from train.run import factory, stored_runs
from train.runtime import setup
from train.storage.atomic import write_atomically
from train.tracking import address, run_metadata, uploader
from train.tracking.run_dir import RunFolder, open_folder
from train.training import loop

log = logging.getLogger(__name__)

CALIBRATION = 256  # training images that int8 is calibrated with
BATCH = 64  # examples of one size that are answered together
BATCH_PIXELS = 16_000_000
TIMED_BATCH, TIMED_CALLS = 32, 7
WIDE = 200  # characters, of what is no terminal
MOST_CLASSES = 50  # named on the card


WORDS = (
    "data.root", "data.file", "data.manual_dir", "data.directory", "threads", "tracking.uri", "tracking.wait_seconds",
)  # fmt: skip


@dataclass
class Export:
    """`run`: the folder of a finished run. `format`: one of formats.FORMATS, or all. `quantize`: none, float16, int8.

    `export.max_accuracy_drop`: what a file may lose of the run's accuracy, from 0 to 1, or it is not kept. Other words
    say where the run's data lies now, where its record goes, and how many threads may work: WORDS.
    """

    run: str = "runs/latest"
    format: str = "keras"
    quantize: str = "none"
    max_accuracy_drop: float = field(default=0.01, metadata={"word": "export.max_accuracy_drop"})


@dataclass(frozen=True)
class Measured:
    """What the run's own network says of the test split, and the examples themselves.

    network: the complete one, in float32. accuracy: as the run computes. probabilities: of the network in float32, of
    images that the pipeline has resized, [N, classes]. truth: int [N].
    """

    network: Any
    dataset: Any
    classes: tuple[str, ...]
    truth: np.ndarray
    accuracy: float
    probabilities: np.ndarray


def export(words: list[str]) -> int:
    """1 where a file could not be written or was not kept. All of it is computed on the CPU, as in all four runtimes.

    Raises: ValueError for a run that has not finished, an unknown format, one that lacks its packages.
    """
    keys, others = arguments.parse_some(Export, words)
    chosen = formats.check(keys.format, keys.quantize)
    if not 0 <= keys.max_accuracy_drop <= 1:
        raise ValueError(f"export.max_accuracy_drop must be from 0 to 1, got {keys.max_accuracy_drop}; use e.g. 0.01")
    folder = open_folder(Path(keys.run))
    if folder.status() != "finished" or not folder.card():
        status = folder.status() or "not"
        raise ValueError(f"run must be finished, got {keys.run}, which is {status}; go on with it: make resume")
    config = config_of(folder, others)
    uri = address.of_run(folder, others)
    factory.check_files(config)
    config, notes = setup.prepare(config, folder.inside("train.log"))
    say(*notes)
    with run_metadata.log_file(folder):
        measured = measure(folder, config)
        rows = [told(folder, config, name, keys, measured) for name in chosen]
    show(rows)
    uploader.complete(folder, uri, config.tracking.wait_seconds)
    return int(any(row["refused"] for row in rows))


def config_of(folder: RunFolder, words: list[str]) -> Config:
    """The run's config, with its own data. Raises: ValueError for a word that would make it another run's."""
    for word in words:
        if word.partition("=")[0] not in WORDS:
            own = [item.metadata.get("word", item.name) for item in fields(Export)]
            raise ValueError(f"words must be key=value with a key of {', '.join((*own, *WORDS))}; got {word}")
    config, _ = stored_runs.config_of(
        folder, folder.card(), ["evaluate.views=one", "device=cpu", "backend=tensorflow", "jit=off", *words]
    )
    config.data = replace(config.data, fingerprint=folder.card()["data_fingerprint"])
    return config


def measure(folder: RunFolder, config: Config) -> Measured:
    """The run's network on its test split, as `make evaluate` does it, and once more in float32."""
    from train.models.deployment import complete, in_float32
    from train.training.step.tensorflow import Step

    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    classes = tuple(folder.card()["classes"])
    say(*dataset.notes, f"test: {len(dataset.test):,} examples of {dataset.name}, the run's own network")
    network, predict = factory.load_best(folder, config)
    with factory.naming_broken_examples():
        logits, truth = factory.answers(config, dataset.test, len(classes), predict, loop.Stops())
        exact = Step.predictor(in_float32(network), jit=False)
        reference, _ = factory.answers(config, dataset.test, len(classes), exact, loop.Stops())
    accuracy = float((logits.argmax(axis=1) == truth).mean())
    shippable = complete(network, config.data.crop_fraction)
    return Measured(shippable, dataset, classes, truth, accuracy, np.exp(log_softmax(reference)))


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


def told(folder: RunFolder, config: Config, name: str, keys: Export, measured: Measured) -> dict[str, Any]:
    """The summary of a format; what a converter breaks on is its own line, and the other formats are written."""
    label = name if keys.quantize == "none" else f"{name}-{keys.quantize}"
    say(f"{label}: writing, then reading it back")
    place = folder.inside(f"export/{label}")
    fresh = place.with_name(f".{label}")
    try:
        summary = one(folder, config, name, keys, measured, fresh)
    except Exception as fault:  # converters have many kinds
        log.exception("%s could not be exported", label)
        arguments.tell(f"{label}: {type(fault).__name__}: {fault}")
        summary = {"refused": "it could not be written"}
    for old in (place, fresh) if summary["refused"] else (place,):
        shutil.rmtree(old, ignore_errors=True)
    if not summary["refused"]:
        fresh.rename(place)
    return {"label": label, **summary}


def one(folder: RunFolder, config: Config, name: str, keys: Export, measured: Measured, place: Path) -> dict[str, Any]:
    """Writes a format into `place` and measures it; its summary, where `refused` says why it must not be kept."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    file, crop = place / formats.FILES[name], config.data.crop_fraction
    images = calibration(measured.dataset.train, crop)
    content = formats.Content(measured.network, measured.classes, config.data.background, keys.quantize, images)
    formats.FORMATS[name].write(content, file)
    summary = {
        "format": name,
        "quantize": keys.quantize,
        "file": file.name,
        "run_id": folder.run_id,
        "network": folder.best_sha256(),
        "time": time.time(),
        "bytes": size_of(file),
        "sha256": sha256_of(file),
        "processor": setup.processor("tensorflow", "cpu"),
        "threads": config.threads,
        **examined(formats.read(name, file, config.threads), measured, images),
    }
    summary["refused"] = refusal(summary, keys.max_accuracy_drop)
    write_atomically(place / "classes.txt", "\n".join(measured.classes) + "\n")
    write_atomically(place / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(place / "README.md", card(folder, summary, crop) + "\n")
    return summary


def refusal(summary: dict[str, Any], most: float) -> str:
    """Why a file must not be kept; empty for a good one. most: what it may lose of the accuracy."""
    if not math.isfinite(summary["largest_difference"]):
        return "some of its answers are no numbers"
    lost = summary["run_accuracy"] - summary["accuracy"]
    return f"it loses {lost:.4f} of the accuracy, more than {most:g}" if lost > most else ""


def examined(predict: Any, measured: Measured, images: np.ndarray) -> dict[str, Any]:
    """What its own runtime makes of it. largest_difference: of a probability, to the run's network in float32."""
    found = np.concatenate([predict(batch) for batch in whole_images(measured.dataset.test)])
    if found.shape != measured.probabilities.shape:
        raise ValueError(f"answers must be of shape {measured.probabilities.shape}, got {found.shape}")
    right = found.argmax(axis=1) == measured.truth
    batch = images[:TIMED_BATCH]
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(int(right.sum()), len(right)),
        "run_accuracy": measured.accuracy,
        "largest_difference": float(np.abs(found - measured.probabilities).max()),  # nan where one is
        "examples": len(right),
        "images_per_second": speed(predict, batch),
        "batch": len(batch),
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


def calibration(split: Any, crop_fraction: float) -> np.ndarray:
    """Training images, evenly over the split: uint8 [N, L, L, C], of which the graph's crop has the network's size."""
    chosen = np.linspace(0, len(split) - 1, min(CALIBRATION, len(split))).astype(int).tolist()
    side = round(split.view.image_size / crop_fraction)
    whole = (split.decode_whole(index, data) for index, data in zip(chosen, split.read(chosen), strict=True))
    return np.stack([resize(image, side) for image in whole])


def card(folder: RunFolder, summary: dict[str, Any], crop_fraction: float) -> str:
    """What it is, how good it is, how to load it. Source: Mitchell et al. 2019 (Model Cards for Model Reporting)."""
    best = folder.card()
    side, _, channels = best["input"]["shape"]
    return html.page(
        "card.md",
        export=summary,
        run=folder.read_json("summary.json", {}),
        data=folder.read_json("dataset.json", {}),
        best=best,
        side=side,
        channels=channels,
        crop_fraction=crop_fraction,
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
        verdict = f"not kept: {row['refused']}" if row["refused"] else ""
        if "accuracy" not in row:
            table.add_row(row["label"], "", "", "", "", "", verdict)
            continue
        table.add_row(
            row["label"], f"{row['accuracy']:.4f}", f"{row['accuracy'] - row['run_accuracy']:+.4f}",
            f"{row['largest_difference']:.1e}", f"{row['bytes'] / 2**20:.2f} MiB", f"{row['images_per_second']:.0f}",
            verdict,
        )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    console.print(table)


if __name__ == "__main__":
    arguments.run(export)
