"""`make export run=<run folder> format=keras|saved_model|onnx|tflite|all`: exports a run's best network.

    make export run=runs/latest format=all
    make export run=runs/latest format=tflite quantize=int8

The exported model maps images of any size to probabilities. Each file is read back by its own runtime and measured on
the whole test split; if it passes, it is kept in export/FORMAT/ in the run's folder, with a model card.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from train import formats
from train.cli import arguments
from train.cli.arguments import Override
from train.cli.fields import fields_by_key, setting
from train.cli.progress import print_and_log
from train.config.schema import Config
from train.config.serialization import flatten
from train.data.dataset import Dataset, Split
from train.data.decode import resize
from train.evaluation import html
from train.evaluation.metrics import log_softmax
from train.evaluation.statistics import accuracy_interval
from train.formats.runtimes import PredictFunction
from train.run import factory, stored_runs
from train.runtime import setup
from train.storage.atomic import write_atomically
from train.storage.checksummed import file_sha256
from train.storage.json_types import JsonObject
from train.tracking import address, run_metadata, uploader
from train.tracking.run_dir import RunDir, open_run_dir
from train.training.signals import SignalHandler

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 256  # training images for the int8 calibration
BATCH_SIZE = 64  # images of equal size in a batch, at most
MAX_BATCH_PIXELS = 16_000_000
TIMING_BATCH_SIZE = 32
TIMING_CALLS = 7
NON_TERMINAL_WIDTH = 200  # characters, where the output is not a terminal
MAX_LISTED_CLASSES = 50  # on the model card


ALLOWED_OVERRIDES = (
    "data.root", "data.file", "data.manual_dir", "data.directory", "threads", "tracking.uri", "tracking.wait_seconds",
)  # fmt: skip
FIXED_OVERRIDES = tuple(
    map(
        Override.parse,
        (
            "evaluate.views=one", "device=cpu", "devices=1", "distributed.processes=1", "distributed.index=0",
            "backend=tensorflow", "jit=off",
        ),
    )
)  # fmt: skip


@dataclass
class Export:
    """The keys of `make export`."""

    run: str = setting("runs/latest", "folder of a finished run")
    format: str = setting("keras", "format of the file", choices=(*formats.FORMATS, "all"))
    quantize: str = setting("none", "quantization of the weights", choices=formats.QUANTIZATIONS)
    max_accuracy_drop: float = setting(
        0.01,
        "maximum drop in accuracy; an export that loses more is rejected",
        ge=0,
        le=1,
        word="export.max_accuracy_drop",
    )


@dataclass(frozen=True)
class ReferenceResult:
    """What the run's own network predicts on the test split, for comparison with the exported files.

    network: the deployment model, in float32. labels: int [N]. accuracy: in the run's own precision. probabilities:
    [N, classes], of the network in float32 on images that the pipeline has resized.
    """

    network: keras.Model
    dataset: Dataset
    classes: tuple[str, ...]
    labels: np.ndarray
    accuracy: float
    probabilities: np.ndarray


def export(argv: list[str]) -> int:
    """Exports the chosen formats; returns 1 if one could not be written or was not kept. Everything runs on the CPU.

    Raises: ValueError for a run that has not finished, an unknown format, or one whose packages are missing.
    """
    keys, overrides = arguments.parse_known(Export, argv)
    format_names = formats.resolve_formats(keys.format, keys.quantize)
    arguments.check_keys(overrides, [*fields_by_key(Export), *ALLOWED_OVERRIDES])
    run_dir = open_run_dir(Path(keys.run))
    if run_dir.status() != "finished" or not run_dir.model_info():
        raise ValueError(
            f"run {keys.run} is not finished (status: {run_dir.status() or 'none'}); "
            f"run make resume run={shlex.quote(keys.run)}"
        )
    config = load_config(run_dir, overrides)
    uri = address.run_uri(run_dir, overrides)
    factory.check_files(config)
    config, notes = factory.prepare_runtime(config, run_dir.inside("train.log"))
    print_and_log(*notes)
    with run_metadata.log_to_file(run_dir):
        reference = measure_reference(run_dir, config)
        rows = [export_format(run_dir, config, name, keys, reference) for name in format_names]
    print_results(rows)
    uploader.upload_and_wait(run_dir, uri, config.tracking.wait_seconds)
    return int(any(row["refused"] for row in rows))


def load_config(run_dir: RunDir, overrides: list[Override]) -> Config:
    """Loads the run's config, with its own data."""
    stored_keys = flatten(run_dir.config())  # an older run lacks the newer ones
    fixed = [override for override in FIXED_OVERRIDES if override.key in stored_keys]
    config, _ = stored_runs.evaluation_config(run_dir, run_dir.model_info(), [*fixed, *overrides])
    config.data = replace(config.data, fingerprint=run_dir.model_info()["data_fingerprint"])
    return config


def measure_reference(run_dir: RunDir, config: Config) -> ReferenceResult:
    """Evaluates the run's network on its test split, as `make evaluate` does, and once more in float32."""
    from train.models.deployment import deployment_model, to_float32
    from train.training.step.tensorflow import Step

    dataset, _ = factory.load_data(config, crops=False)
    factory.check_fingerprint(config, dataset)
    classes = tuple(run_dir.model_info()["classes"])
    print_and_log(
        *dataset.notes, f"reference: the run's model on {len(dataset.test):,} test examples of {dataset.name}"
    )
    network, predict = factory.load_best(run_dir, config)
    logits, labels = factory.predict_split(config, dataset.test, len(classes), predict, SignalHandler())
    predict_float32 = Step.make_predictor(to_float32(network), jit=False)
    float32_logits, _ = factory.predict_split(config, dataset.test, len(classes), predict_float32, SignalHandler())
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    deployed = deployment_model(network, config.data.crop_fraction)
    return ReferenceResult(deployed, dataset, classes, labels, accuracy, np.exp(log_softmax(float32_logits)))


def full_size_batches(split: Split) -> Iterator[np.ndarray]:
    """Yields all examples at full size, uint8 [n, H, W, C]; consecutive ones of equal size share a batch."""
    batch: list[np.ndarray] = []
    for start in range(0, len(split), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(split)))
        for index, data in zip(indices, split.read(indices), strict=True):
            image = split.decode_full(index, data)
            full = len(batch) == max(1, min(BATCH_SIZE, MAX_BATCH_PIXELS // image[..., 0].size))
            if batch and (full or batch[0].shape != image.shape):
                yield np.stack(batch)
                batch = []
            batch.append(image)
    yield np.stack(batch)


def export_format(run_dir: RunDir, config: Config, name: str, keys: Export, reference: ReferenceResult) -> JsonObject:
    """Exports one format and returns its summary; a converter's error is printed and stops no other format."""
    label = name if keys.quantize == "none" else f"{name}-{keys.quantize}"
    print_and_log(f"{label}: exporting and measuring")
    final_dir = run_dir.inside(f"export/{label}")
    temporary_dir = final_dir.with_name(f".{label}")
    try:
        summary = write_and_measure(run_dir, config, name, keys, reference, temporary_dir)
    except Exception as error:  # converters raise many kinds
        log.exception("exporting %s failed", label)
        arguments.print_error(f"{label}: {type(error).__name__}: {error}")
        summary = {"refused": "the export failed"}
    for outdated in (final_dir, temporary_dir) if summary["refused"] else (final_dir,):
        shutil.rmtree(outdated, ignore_errors=True)
    if not summary["refused"]:
        temporary_dir.rename(final_dir)
    return {"label": label, **summary}


def write_and_measure(
    run_dir: RunDir, config: Config, name: str, keys: Export, reference: ReferenceResult, directory: Path
) -> JsonObject:
    """Writes a format into `directory` and measures it; `refused` in its summary says why it must not be kept."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    file = directory / formats.FILE_NAMES[name]
    crop = config.data.crop_fraction
    images = sample_calibration_images(reference.dataset.train, crop)
    bundle = formats.ExportBundle(reference.network, reference.classes, config.data.background, keys.quantize, images)
    formats.FORMATS[name].write(bundle, file)
    summary = {
        "format": name,
        "quantize": keys.quantize,
        "file": file.name,
        "run_id": run_dir.run_id,
        "network": run_dir.best_sha256(),
        "time": time.time(),
        "bytes": size_of(file),
        "sha256": file_sha256(*list_files(file)),
        "processor": setup.processor_name("tensorflow", "cpu"),
        "threads": config.threads,
        **measure_export(formats.load_predictor(name, file, config.threads), reference, images),
    }
    summary["refused"] = rejection_reason(summary, keys.max_accuracy_drop)
    write_atomically(directory / "classes.txt", "\n".join(reference.classes) + "\n")
    write_atomically(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(directory / "README.md", render_model_card(run_dir, summary, crop) + "\n")
    return summary


def rejection_reason(summary: JsonObject, max_accuracy_drop: float) -> str:
    """Says why a file must not be kept; empty for a good one."""
    if not math.isfinite(summary["largest_difference"]):
        return "output contains NaN or infinity"
    drop = summary["run_accuracy"] - summary["accuracy"]
    return f"accuracy drops by {drop:.4f}, more than {max_accuracy_drop:g}" if drop > max_accuracy_drop else ""


def measure_export(predict: PredictFunction, reference: ReferenceResult, calibration_images: np.ndarray) -> JsonObject:
    """Measures an exported file in its own runtime.

    `largest_difference` is that of a probability to the run's network in float32.
    """
    probabilities = np.concatenate([predict(batch) for batch in full_size_batches(reference.dataset.test)])
    if probabilities.shape != reference.probabilities.shape:
        raise ValueError(f"the output has shape {probabilities.shape} instead of {reference.probabilities.shape}")
    correct = probabilities.argmax(axis=1) == reference.labels
    batch = calibration_images[:TIMING_BATCH_SIZE]
    return {
        "accuracy": float(correct.mean()),
        "accuracy_interval": accuracy_interval(int(correct.sum()), len(correct)),
        "run_accuracy": reference.accuracy,
        "largest_difference": float(np.abs(probabilities - reference.probabilities).max()),  # nan if any is
        "examples": len(correct),
        "images_per_second": measure_throughput(predict, batch),
        "batch": len(batch),
    }


def measure_throughput(predict: PredictFunction, images: np.ndarray) -> float:
    """Returns images per second: the median of TIMING_CALLS calls after a warm-up."""
    predict(images)
    seconds = []
    for _ in range(TIMING_CALLS):
        start = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds)


def sample_calibration_images(split: Split, crop_fraction: float) -> np.ndarray:
    """Takes training images evenly over the split: uint8 [N, L, L, C]; their crop has the network's input size."""
    indices = np.linspace(0, len(split) - 1, min(CALIBRATION_IMAGES, len(split))).astype(int).tolist()
    side = round(split.image_spec.image_size / crop_fraction)
    full_size = (split.decode_full(index, data) for index, data in zip(indices, split.read(indices), strict=True))
    return np.stack([resize(image, side, crop_fraction=1) for image in full_size])


def render_model_card(run_dir: RunDir, summary: JsonObject, crop_fraction: float) -> str:
    """Writes the model card: use, input and output, results. Source: Mitchell et al. 2019 (Model Cards)."""
    best = run_dir.model_info()
    side, _, channels = best["input"]["shape"]
    return html.render_template(
        "card.md",
        export=summary,
        run=run_dir.summary(),
        data=run_dir.read_json("dataset.json", {}),
        best=best,
        side=side,
        channels=channels,
        crop_fraction=crop_fraction,
        packages=formats.RUNTIME_PACKAGES[summary["format"]],
        usage=formats.usage_snippet(summary["format"], channels),
        max_classes=MAX_LISTED_CLASSES,
    )


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in list_files(path))


def list_files(path: Path) -> list[Path]:
    """Returns the file itself, or all files in a folder in the order of their names."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def print_results(rows: list[JsonObject]) -> None:
    """Prints a table with a row per format."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("format", "accuracy", "change", "largest difference", "size", "images/s", ""):
        table.add_column(name, justify="left" if name in ("format", "") else "right")
    for row in rows:
        verdict = f"rejected: {row['refused']}" if row["refused"] else ""
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
    arguments.main(
        export, Export, other_keys=f"Keys of the run that can be overridden: {', '.join(ALLOWED_OVERRIDES)}."
    )
