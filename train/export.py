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
from train.cli.progress import print_and_log
from train.config.schema import Config
from train.data.decode import resize
from train.evaluation import html
from train.evaluation.metrics import bootstrap_interval, log_softmax
from train.run import factory, stored_runs
from train.runtime import setup
from train.storage.atomic import write_atomically
from train.tracking import address, run_metadata, uploader
from train.tracking.run_dir import RunDir, open_run_dir
from train.training import loop

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 256  # training images that int8 is calibrated with
BATCH_SIZE = 64  # examples of one size that are answered together
MAX_BATCH_PIXELS = 16_000_000
TIMING_BATCH_SIZE, TIMING_CALLS = 32, 7
NON_TERMINAL_WIDTH = 200  # characters, of what is no terminal
MAX_LISTED_CLASSES = 50  # named on the card


ALLOWED_OVERRIDES = (
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
class ReferenceResult:
    """What the run's own network says of the test split, and the examples themselves.

    network: the complete one, in float32. accuracy: as the run computes. probabilities: of the network in float32, of
    images that the pipeline has resized, [N, classes]. truth: int [N].
    """

    network: Any
    dataset: Any
    classes: tuple[str, ...]
    labels: np.ndarray
    accuracy: float
    probabilities: np.ndarray


def export(argv: list[str]) -> int:
    """1 where a file could not be written or was not kept. All of it is computed on the CPU, as in all four runtimes.

    Raises: ValueError for a run that has not finished, an unknown format, one that lacks its packages.
    """
    keys, others = arguments.parse_known(Export, argv)
    chosen = formats.resolve_formats(keys.format, keys.quantize)
    if not 0 <= keys.max_accuracy_drop <= 1:
        raise ValueError(f"export.max_accuracy_drop must be from 0 to 1, got {keys.max_accuracy_drop}; use e.g. 0.01")
    folder = open_run_dir(Path(keys.run))
    if folder.status() != "finished" or not folder.model_info():
        status = folder.status() or "not"
        raise ValueError(f"run must be finished, got {keys.run}, which is {status}; go on with it: make resume")
    config = load_config(folder, others)
    uri = address.run_uri(folder, others)
    factory.check_files(config)
    config, notes = setup.prepare(config, folder.inside("train.log"))
    print_and_log(*notes)
    with run_metadata.log_to_file(folder):
        measured = measure_reference(folder, config)
        rows = [export_format(folder, config, name, keys, measured) for name in chosen]
    print_results(rows)
    uploader.upload_and_wait(folder, uri, config.tracking.wait_seconds)
    return int(any(row["refused"] for row in rows))


def load_config(folder: RunDir, overrides: list[str]) -> Config:
    """The run's config, with its own data. Raises: ValueError for a word that would make it another run's."""
    for word in overrides:
        if word.partition("=")[0] not in ALLOWED_OVERRIDES:
            own = [item.metadata.get("word", item.name) for item in fields(Export)]
            raise ValueError(
                f"words must be key=value with a key of {', '.join((*own, *ALLOWED_OVERRIDES))}; got {word}"
            )
    config, _ = stored_runs.evaluation_config(
        folder, folder.model_info(), ["evaluate.views=one", "device=cpu", "backend=tensorflow", "jit=off", *overrides]
    )
    config.data = replace(config.data, fingerprint=folder.model_info()["data_fingerprint"])
    return config


def measure_reference(folder: RunDir, config: Config) -> ReferenceResult:
    """The run's network on its test split, as `make evaluate` does it, and once more in float32."""
    from train.models.deployment import deployment_model, to_float32
    from train.training.step.tensorflow import Step

    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    classes = tuple(folder.model_info()["classes"])
    print_and_log(*dataset.notes, f"test: {len(dataset.test):,} examples of {dataset.name}, the run's own network")
    network, predict = factory.load_best(folder, config)
    with factory.surface_example_errors():
        logits, truth = factory.predict_split(config, dataset.test, len(classes), predict, loop.SignalHandler())
        exact = Step.make_predictor(to_float32(network), jit=False)
        reference, _ = factory.predict_split(config, dataset.test, len(classes), exact, loop.SignalHandler())
    accuracy = float((logits.argmax(axis=1) == truth).mean())
    shippable = deployment_model(network, config.data.crop_fraction)
    return ReferenceResult(shippable, dataset, classes, truth, accuracy, np.exp(log_softmax(reference)))


def full_size_batches(split: Any) -> Iterator[np.ndarray]:
    """All examples in their own sizes, as uint8 [n, H, W, C]: those that follow each other and are equal in size."""
    waiting: list[np.ndarray] = []
    for start in range(0, len(split), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(split)))
        for index, data in zip(indices, split.read(indices), strict=True):
            image = split.decode_full(index, data)
            full = len(waiting) == max(1, min(BATCH_SIZE, MAX_BATCH_PIXELS // image[..., 0].size))
            if waiting and (full or waiting[0].shape != image.shape):
                yield np.stack(waiting)
                waiting = []
            waiting.append(image)
    yield np.stack(waiting)


def export_format(
    folder: RunDir, config: Config, name: str, keys: Export, reference: ReferenceResult
) -> dict[str, Any]:
    """The summary of a format; what a converter breaks on is its own line, and the other formats are written."""
    label = name if keys.quantize == "none" else f"{name}-{keys.quantize}"
    print_and_log(f"{label}: writing, then reading it back")
    place = folder.inside(f"export/{label}")
    fresh = place.with_name(f".{label}")
    try:
        summary = write_and_measure(folder, config, name, keys, reference, fresh)
    except Exception as fault:  # converters have many kinds
        log.exception("%s could not be exported", label)
        arguments.print_error(f"{label}: {type(fault).__name__}: {fault}")
        summary = {"refused": "it could not be written"}
    for old in (place, fresh) if summary["refused"] else (place,):
        shutil.rmtree(old, ignore_errors=True)
    if not summary["refused"]:
        fresh.rename(place)
    return {"label": label, **summary}


def write_and_measure(
    folder: RunDir, config: Config, name: str, keys: Export, reference: ReferenceResult, directory: Path
) -> dict[str, Any]:
    """Writes a format into `place` and measures it; its summary, where `refused` says why it must not be kept."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    file, crop = directory / formats.FILE_NAMES[name], config.data.crop_fraction
    images = sample_calibration_images(reference.dataset.train, crop)
    content = formats.ExportBundle(reference.network, reference.classes, config.data.background, keys.quantize, images)
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
        "processor": setup.processor_name("tensorflow", "cpu"),
        "threads": config.threads,
        **measure_export(formats.load_predictor(name, file, config.threads), reference, images),
    }
    summary["refused"] = rejection_reason(summary, keys.max_accuracy_drop)
    write_atomically(directory / "classes.txt", "\n".join(reference.classes) + "\n")
    write_atomically(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(directory / "README.md", render_model_card(folder, summary, crop) + "\n")
    return summary


def rejection_reason(summary: dict[str, Any], max_accuracy_drop: float) -> str:
    """Why a file must not be kept; empty for a good one. most: what it may lose of the accuracy."""
    if not math.isfinite(summary["largest_difference"]):
        return "some of its answers are no numbers"
    lost = summary["run_accuracy"] - summary["accuracy"]
    return f"it loses {lost:.4f} of the accuracy, more than {max_accuracy_drop:g}" if lost > max_accuracy_drop else ""


def measure_export(predict: Any, reference: ReferenceResult, calibration_images: np.ndarray) -> dict[str, Any]:
    """What its own runtime makes of it. largest_difference: of a probability, to the run's network in float32."""
    found = np.concatenate([predict(batch) for batch in full_size_batches(reference.dataset.test)])
    if found.shape != reference.probabilities.shape:
        raise ValueError(f"answers must be of shape {reference.probabilities.shape}, got {found.shape}")
    right = found.argmax(axis=1) == reference.labels
    batch = calibration_images[:TIMING_BATCH_SIZE]
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap_interval(int(right.sum()), len(right)),
        "run_accuracy": reference.accuracy,
        "largest_difference": float(np.abs(found - reference.probabilities).max()),  # nan where one is
        "examples": len(right),
        "images_per_second": measure_throughput(predict, batch),
        "batch": len(batch),
    }


def measure_throughput(predict: Any, images: np.ndarray) -> float:
    """Images per second, the median of some calls after a first one."""
    predict(images)
    seconds = []
    for _ in range(TIMING_CALLS):
        begun = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - begun)
    return len(images) / statistics.median(seconds)


def sample_calibration_images(split: Any, crop_fraction: float) -> np.ndarray:
    """Training images, evenly over the split: uint8 [N, L, L, C], of which the graph's crop has the network's size."""
    chosen = np.linspace(0, len(split) - 1, min(CALIBRATION_IMAGES, len(split))).astype(int).tolist()
    side = round(split.image_spec.image_size / crop_fraction)
    whole = (split.decode_full(index, data) for index, data in zip(chosen, split.read(chosen), strict=True))
    return np.stack([resize(image, side) for image in whole])


def render_model_card(folder: RunDir, summary: dict[str, Any], crop_fraction: float) -> str:
    """What it is, how good it is, how to load it. Source: Mitchell et al. 2019 (Model Cards for Model Reporting)."""
    best = folder.model_info()
    side, _, channels = best["input"]["shape"]
    return html.render_template(
        "card.md",
        export=summary,
        run=folder.summary(),
        data=folder.read_json("dataset.json", {}),
        best=best,
        side=side,
        channels=channels,
        crop_fraction=crop_fraction,
        packages=formats.RUNTIME_PACKAGES[summary["format"]],
        lines=formats.usage_snippet(summary["format"], channels),
        most_classes=MAX_LISTED_CLASSES,
    )


def size_of(path: Path) -> int:
    """Bytes of a file or of all in a folder."""
    return sum(one.stat().st_size for one in list_files(path))


def sha256_of(path: Path) -> str:
    """Of a file, or of all in a folder, in the order of their names."""
    found = hashlib.sha256()
    for one in list_files(path):
        found.update(one.read_bytes())
    return found.hexdigest()


def list_files(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def print_results(rows: list[dict[str, Any]]) -> None:
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
        console = Console(highlight=False, width=NON_TERMINAL_WIDTH)
    console.print(table)


if __name__ == "__main__":
    arguments.main(export)
