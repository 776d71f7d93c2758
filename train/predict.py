"""`make predict run=<run folder> images=PATH...`: what a run's best network says of pictures.

    make predict run=runs/latest images=photo.jpg
    make predict run=runs/latest images='photos/*.png,more' top=3 output=jsonl
    make predict run=runs/latest images=photos attention=runs/attention.png

Every picture goes the way that test examples went. One that can't be read is a line on standard error; the others are
answered all the same, and the exit code is 1. With runtime=onnx the exported file answers, without TensorFlow.
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
from train.run.predictor import BATCH_SIZE, RUNTIMES, Network, load_network, predict_files, top_classes

OUTPUTS = ("table", "jsonl")
MAX_ATTENTION_IMAGES = 24  # pictures that attention is drawn for


@dataclass
class Predict:
    """`run`: the folder of a run. `images`: files, folders and patterns, separated by commas; nothing is fetched.

    `top`: how many classes are told. `output`: table or jsonl. `runtime`: keras, or onnx for the exported file.
    `attention`: a PNG to draw where the evidence lies (Grad-CAM), for the first pictures.
    """

    run: str = "runs/latest"
    images: str = ""
    top: int = 5
    output: str = "table"
    runtime: str = "keras"
    attention: str = ""


def predict(argv: list[str]) -> int:
    """1 where a picture could not be read. Raises: ValueError for what can't be run at all."""
    keys = validate_arguments(arguments.parse(Predict, argv))
    paths = list(expand_paths(keys.images))
    network = load_network(Path(keys.run), keys.runtime, compiled=len(paths) > BATCH_SIZE)
    tell = OUTPUT_WRITERS[keys.output](paths, network.classes, min(keys.top, len(network.classes)))
    failed, kept = 0, list[tuple[np.ndarray, np.ndarray]]()
    for path, pixels, probabilities in predict_files(network, paths):
        if isinstance(pixels, Exception):
            failed += 1
            print(f"error: {printable_name(path)}: {pixels}", file=sys.stderr, flush=True)
            continue
        tell(path, probabilities)
        if keys.attention and len(kept) < MAX_ATTENTION_IMAGES:
            kept.append((pixels, probabilities))
    if kept:
        draw_attention(Path(keys.attention), network, kept)
    return int(failed > 0)


def validate_arguments(keys: Predict) -> Predict:
    for name, allowed in (("runtime", RUNTIMES), ("output", OUTPUTS)):
        if getattr(keys, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(keys, name)}")
    if keys.top < 1:
        raise ValueError(f"top must be at least 1, got {keys.top}")
    if keys.attention and keys.runtime != "keras":
        raise ValueError(f"attention must go with runtime=keras, got runtime={keys.runtime}")
    if keys.attention and not keys.attention.endswith(".png"):
        raise ValueError(f"attention must be a file to draw, got {keys.attention}; use e.g. attention=attention.png")
    return keys


# ------------------------------------------------------------------------------------------------------ what is there


def expand_paths(images: str) -> Iterator[Path]:
    """The files that are meant, those of a folder in the order of their names.

    Raises: ValueError for a word that is no file, no folder and no pattern of any.
    """
    if not images:
        raise ValueError("images must be files, folders or patterns, got none; use images=PATH")
    for word in [images] if exists(images) else images.split(","):
        if "://" in word:
            raise ValueError(f"images must be on this machine, got {word}; fetch it first")
        named = [word] if exists(word) else sorted(glob.glob(word, recursive=True))  # noqa: PTH207 (absolute ones, too)
        matching = [Path(path) for path in named]
        files = [file for path in matching for file in (list_files(path) if path.is_dir() else [path])]
        if not files:
            raise ValueError(f"images must be files, folders or patterns, got {word}, where nothing is")
        yield from files


def exists(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110 (which raises for names that are too long)


def list_files(folder: Path) -> list[Path]:
    """All below a folder, hidden ones left out."""
    below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(folder / path for path in below if not any(part.startswith(".") for part in path.parts))


# ----------------------------------------------------------------------------------------------------------- answers


# ------------------------------------------------------------------------------------------------------------- shown


def table_writer(paths: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """A line for each picture, as soon as it is answered."""
    name, kind = max(len(printable_name(path)) for path in paths), max(map(len, classes))
    print(f"{'image':{name}}  " + "  ".join(f"{f'{place + 1}.':{kind + 7}}" for place in range(top)).rstrip())

    def tell(path: Path, probabilities: np.ndarray) -> None:
        found = "  ".join(f"{label:{kind}} {share:.4f}" for label, share in top_classes(probabilities, classes, top))
        print(f"{printable_name(path):{name}}  {found}", flush=True)

    return tell


def jsonl_writer(_: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """An object for each picture: `image`, and `predictions` with `class` and `probability`."""

    def tell(path: Path, probabilities: np.ndarray) -> None:
        found = [{"class": name, "probability": share} for name, share in top_classes(probabilities, classes, top)]
        print(json.dumps({"image": str(path), "predictions": found}), flush=True)

    return tell


def printable_name(path: Path) -> str:
    """A name in one line, whatever bytes it is made of."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


OUTPUT_WRITERS = {"table": table_writer, "jsonl": jsonl_writer}


def draw_attention(path: Path, network: Network, examples: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from train.evaluation.plots import image_grids
    from train.evaluation.plots.style import to_png
    from train.models.grad_cam import grad_cam
    from train.storage.atomic import write_atomically

    images, said = (np.stack(part) for part in zip(*examples, strict=True))
    numbers = said.argmax(axis=1)
    maps, layer = grad_cam(network.model, images, numbers)
    titles = [network.classes[number] for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_png(image_grids.plot_grad_cam(images, maps, titles, layer)))
    print(f"attention: {path}", file=sys.stderr)


if __name__ == "__main__":
    arguments.main(predict, only_prints=True)
