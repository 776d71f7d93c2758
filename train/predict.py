"""`make predict run=<run folder> images=PATH...`: classifies images with a run's best network.

    make predict run=runs/latest images=photo.jpg
    make predict run=runs/latest images='photos/*.png,more' top=3 output=jsonl
    make predict run=runs/latest images=photos attention=runs/attention.png

Images are preprocessed as the test examples were. One that cannot be read becomes a line on standard error and exit
code 1; the others are still classified. With runtime=onnx the exported file is used, without TensorFlow.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.cli import arguments
from train.cli.fields import setting
from train.run.predictor import BATCH_SIZE, RUNTIMES, Network, load_network, predict_files, top_classes

OUTPUTS = ("table", "jsonl")
MAX_ATTENTION_IMAGES = 24  # in the Grad-CAM plot


@dataclass
class Predict:
    """The keys of `make predict`."""

    run: str = setting("runs/latest", "folder of the run")
    images: str = setting("", "local files, folders and glob patterns, separated by commas; required")
    top: int = setting(5, "number of classes listed per image", ge=1)
    output: str = setting("table", "output format: a table, or one JSON object per line", choices=OUTPUTS)
    runtime: str = setting("keras", "run the Keras model, or the file of make export format=onnx", choices=RUNTIMES)
    attention: str = setting("", "PNG file for a Grad-CAM plot of the first images")


def predict(argv: list[str]) -> int:
    """Classifies the images; returns 1 if one could not be read.

    Raises: ValueError for wrong arguments, or a run without weights.
    """
    keys = validate_arguments(arguments.parse(Predict, argv))
    paths = list(expand_paths(keys.images))
    network = load_network(Path(keys.run), keys.runtime, compiled=len(paths) > BATCH_SIZE)
    write = OUTPUT_WRITERS[keys.output](paths, network.classes, min(keys.top, len(network.classes)))
    failed = 0
    explained: list[tuple[np.ndarray, np.ndarray]] = []  # pixels and probabilities of the images in the Grad-CAM plot
    for path, pixels, probabilities in predict_files(network, paths):
        if isinstance(pixels, Exception):
            failed += 1
            print(f"error: {printable_name(path)}: {pixels}", file=sys.stderr, flush=True)
            continue
        write(path, probabilities)
        if keys.attention and len(explained) < MAX_ATTENTION_IMAGES:
            explained.append((pixels, probabilities))
    if explained:
        draw_attention(Path(keys.attention), network, explained)
    return int(failed > 0)


def validate_arguments(keys: Predict) -> Predict:
    if keys.attention and keys.runtime != "keras":
        raise ValueError(f"attention needs runtime=keras, got runtime={keys.runtime}")
    if keys.attention and not keys.attention.endswith(".png"):
        raise ValueError(f"attention must end in .png, got {keys.attention}; use e.g. attention=attention.png")
    return keys


# -------------------------------------------------------------------------------------------------------------- input


def expand_paths(images: str) -> Iterator[Path]:
    """Yields the files that `images` names, those of a folder in the order of their names.

    Raises: ValueError for a name that matches no file and no folder.
    """
    if not images:
        raise ValueError("images is missing; use images=PATH with files, folders or patterns")
    for name in [images] if exists(images) else images.split(","):
        if "://" in name:
            raise ValueError(f"images must be local files, got {name}; download it first")
        names = [name] if exists(name) else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (absolute ones, too)
        files = [file for path in map(Path, names) for file in (list_files(path) if path.is_dir() else [path])]
        if not files:
            raise ValueError(f"no such file or folder: {name}; images takes files, folders and patterns")
        yield from files


def exists(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110 (which raises for names that are too long)


def list_files(folder: Path) -> list[Path]:
    """Lists all files below a folder, without hidden ones."""
    below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(folder / path for path in below if not any(part.startswith(".") for part in path.parts))


# ------------------------------------------------------------------------------------------------------------- output


def table_writer(paths: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """Prints a line for each image as soon as it is classified."""
    name_width = max(len(printable_name(path)) for path in paths)
    class_width = max(map(len, classes))
    ranks = "  ".join(f"{f'{rank}.':{class_width + 7}}" for rank in range(1, top + 1))
    print(f"{'image':{name_width}}  {ranks}".rstrip())

    def write(path: Path, probabilities: np.ndarray) -> None:
        predictions = top_classes(probabilities, classes, top)
        cells = "  ".join(f"{label:{class_width}} {probability:.4f}" for label, probability in predictions)
        print(f"{printable_name(path):{name_width}}  {cells}", flush=True)

    return write


def jsonl_writer(_: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """Prints a JSON object for each image: `image`, and `predictions` with `class` and `probability`."""

    def write(path: Path, probabilities: np.ndarray) -> None:
        predictions = [
            {"class": label, "probability": probability}
            for label, probability in top_classes(probabilities, classes, top)
        ]
        print(json.dumps({"image": str(path), "predictions": predictions}), flush=True)

    return write


def printable_name(path: Path) -> str:
    """Formats a path in one line, whatever bytes its name contains."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


OUTPUT_WRITERS = {"table": table_writer, "jsonl": jsonl_writer}


def draw_attention(path: Path, network: Network, examples: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import to_png
    from train.models.grad_cam import grad_cam
    from train.storage.atomic import write_atomically

    images, probabilities = (np.stack(arrays) for arrays in zip(*examples, strict=True))
    predicted = probabilities.argmax(axis=1)
    assert network.model is not None  # attention= is refused with another runtime
    maps, layer = grad_cam(network.model, images, predicted)
    titles = [network.classes[index] for index in predicted]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_png(image_grids.plot_grad_cam(images, maps, titles, layer)))
    print(f"attention: {path}", file=sys.stderr)


if __name__ == "__main__":
    arguments.main(predict, Predict, only_prints=True)
