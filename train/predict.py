"""`make predict run=<run folder> images=PATH...`: what a run's best network says of pictures.

    make predict run=runs/latest images=photo.jpg
    make predict run=runs/latest images='photos/*.png,more' top=3 output=jsonl
    make predict run=runs/latest images=photos attention=runs/attention.png

Every picture goes the way that test examples went. One that can't be read is a line on standard error; the others are
answered all the same, and the exit code is 1. With runtime=onnx the exported file answers, without TensorFlow.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train import command, runtime
from train.data.decode import View, decode, decode_resized, read_header
from train.disk import OutsideError, inside, read_inside
from train.formats.reading import FILES, read
from train.stored import NewerError, refuse_newer

RUNTIMES = ("keras", "onnx")
OUTPUTS = ("table", "jsonl")
BATCH = 32
AHEAD = 4 * BATCH  # pictures that are decoded while others are answered
SHOWN = 24  # pictures that attention is drawn for


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


@dataclass(frozen=True)
class Network:
    """predict: uint8 [N, H, W, C] -> probabilities [N, classes]. view: what it looks at in a picture.

    decode: a picture's bytes as `predict` wants them; where that leaves them in their own sizes, `batch` is 1.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[bytes], np.ndarray]
    view: View
    classes: list[str]
    max_bytes: int
    max_pixels: int
    batch: int = BATCH
    model: Any = None


def predict(words: list[str]) -> int:
    """1 where a picture could not be read. Raises: ValueError for what can't be run at all."""
    keys = checked(command.parse(Predict, words))
    paths = list(found(keys.images))
    network = load(Path(keys.run), keys.runtime, many=len(paths) > BATCH)
    tell = TELLERS[keys.output](paths, network.classes, min(keys.top, len(network.classes)))
    failed, kept = 0, list[tuple[np.ndarray, np.ndarray]]()
    for path, pixels, probabilities in answers(network, paths):
        if isinstance(pixels, Exception):
            failed += 1
            print(f"error: {printable(path)}: {pixels}", file=sys.stderr, flush=True)
            continue
        tell(path, probabilities)
        if keys.attention and len(kept) < SHOWN:
            kept.append((pixels, probabilities))
    if kept:
        draw(Path(keys.attention), network, kept)
    return int(failed > 0)


def checked(keys: Predict) -> Predict:
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


def found(images: str) -> Iterator[Path]:
    """The files that are meant, those of a folder in the order of their names.

    Raises: ValueError for a word that is no file, no folder and no pattern of any.
    """
    if not images:
        raise ValueError("images must be files, folders or patterns, got none; use images=PATH")
    for word in [images] if there(images) else images.split(","):
        if "://" in word:
            raise ValueError(f"images must be on this machine, got {word}; fetch it first")
        named = [word] if there(word) else sorted(glob.glob(word, recursive=True))  # noqa: PTH207 (absolute ones, too)
        matching = [Path(path) for path in named]
        files = [file for path in matching for file in (files_in(path) if path.is_dir() else [path])]
        if not files:
            raise ValueError(f"images must be files, folders or patterns, got {word}, where nothing is")
        yield from files


def there(name: str) -> bool:
    return os.path.exists(name)  # noqa: PTH110 (which raises for names that are too long)


def files_in(folder: Path) -> list[Path]:
    """All below a folder, hidden ones left out."""
    below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(folder / path for path in below if not any(part.startswith(".") for part in path.parts))


def load(run: Path, engine: str, *, many: bool) -> Network:
    """engine: one of RUNTIMES. many: whether it pays to compile. Raises: ValueError where there is no network."""
    card, config = card_of(run)
    side, _, channels = card["input"]["shape"]
    view = View(side, channels, tuple(config["background"]), config["crop_fraction"])
    limits = config["max_bytes"], config["max_pixels"]
    if engine == "onnx":
        answer = exported(run)
        if view.crop_fraction == 1:
            return Network(answer, partial(decode_resized, view=view), view, card["classes"], *limits)
        own = partial(
            decode, channels=channels, background=view.background, max_pixels=None
        )  # the file crops by itself
        return Network(answer, own, view, card["classes"], *limits, batch=1)
    inside(run, "best/model.keras")
    model = loaded(run / "best/model.keras")
    answer = model.predict_on_batch if many else model
    return Network(
        lambda images: softmax(np.asarray(answer(images))), partial(decode_resized, view=view), view, card["classes"],
        *limits, model=model,
    )  # fmt: skip


def loaded(path: Path) -> Any:
    """The Keras model. Raises: ValueError for a file that is damaged, or has code in it."""
    runtime.load("tensorflow", Path(os.devnull))  # without what it does not need, and without its chatter
    import keras
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)  # others want some of it, too
    try:
        model = keras.models.load_model(path)
    except Exception as fault:  # Keras has many
        raise ValueError(f"run must have weights that can be read, got {path} ({type(fault).__name__})") from fault
    model.jit_compile = False  # which would compile anew for every number of pictures
    return model


def card_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the network is, and the run's `data`. Raises: ValueError where there is no network."""
    try:
        refuse_newer(run, json.loads(read_inside(run, "run.json")))
        card = json.loads(read_inside(run, "best/model.json"))
        return card, yaml.safe_load(read_inside(run, "config.yaml"))["data"]
    except (NewerError, OutsideError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError(f"run must be the folder of a run that has weights, got {run}; use run=runs/latest") from None


def exported(run: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Raises: ValueError where there is no such export, or one of another network, or no ONNX Runtime."""
    path, again = inside(run, f"export/onnx/{FILES['onnx']}"), f"make export run={shlex.quote(str(run))} format=onnx"
    if not path.exists():
        raise ValueError(f"runtime=onnx must have the exported file, got no {path}; {again}")
    known = json.loads(read_inside(run, "export/onnx/summary.json"))["network"]
    if known != hashlib.sha256(read_inside(run, "best/model.json")).hexdigest():
        raise ValueError(f"runtime=onnx must have the run's best network, got an older one in {path}; {again}")
    try:
        return read("onnx", path)
    except ImportError:
        raise ValueError(f"runtime=onnx must have the extra export, got no onnxruntime; {again}") from None
    except Exception as fault:  # it has many
        raise ValueError(f"runtime=onnx must have a file that can be read, got {path}; {again}") from fault


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


# ----------------------------------------------------------------------------------------------------------- answers


def answers(network: Network, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray | Exception, np.ndarray]]:
    """Of every picture, in their order: its pixels, or why it can't be read, and its probabilities."""
    pictures = decoded(network, paths)
    while batch := list(islice(pictures, network.batch)):
        whole = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        said = iter(network.predict(np.stack(whole)) if whole else ())
        for path, pixels in batch:
            yield path, pixels, next(said) if isinstance(pixels, np.ndarray) else np.empty(0)


def decoded(network: Network, paths: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """In their order, by all cores; so many ahead at most."""
    ahead = AHEAD if network.batch > 1 else 1  # a picture in its own size may be large
    ahead = AHEAD if network.batch > 1 else 1  # a picture in its own size may be large
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[tuple[Path, Future]] = deque()
        for path in paths:
            waiting.append((path, pool.submit(picture, network, path)))
            if len(waiting) > ahead:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()


def picture(network: Network, path: Path) -> np.ndarray | Exception:
    """Pixels as the network wants them, or what is wrong."""
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        refuse_large(network, path.stat().st_size)
        return pixels_of(network, path.read_bytes())
    except (OSError, ValueError) as fault:
        return fault


def pixels_of(network: Network, data: bytes) -> np.ndarray:
    """Encoded bytes as the network wants them. Raises: ValueError for what is no picture, or one too large."""
    refuse_large(network, len(data))
    read_header(data, network.max_pixels)
    return network.decode(data)


def refuse_large(network: Network, size: int) -> None:
    if size > network.max_bytes:
        raise ValueError(f"{size:,} bytes are more than the limit of {network.max_bytes:,}")


# ------------------------------------------------------------------------------------------------------------- shown


def ranked(probabilities: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    """The most likely classes; among equal ones the lower index first."""
    return [
        (classes[number], float(probabilities[number])) for number in np.argsort(-probabilities, kind="stable")[:top]
    ]


def as_table(paths: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """A line for each picture, as soon as it is answered."""
    name, kind = max(len(printable(path)) for path in paths), max(map(len, classes))
    print(f"{'image':{name}}  " + "  ".join(f"{f'{place + 1}.':{kind + 7}}" for place in range(top)).rstrip())

    def tell(path: Path, probabilities: np.ndarray) -> None:
        found = "  ".join(f"{label:{kind}} {share:.4f}" for label, share in ranked(probabilities, classes, top))
        print(f"{printable(path):{name}}  {found}", flush=True)

    return tell


def as_jsonl(_: list[Path], classes: list[str], top: int) -> Callable[[Path, np.ndarray], None]:
    """An object for each picture: `image`, and `predictions` with `class` and `probability`."""

    def tell(path: Path, probabilities: np.ndarray) -> None:
        found = [{"class": name, "probability": share} for name, share in ranked(probabilities, classes, top)]
        print(json.dumps({"image": str(path), "predictions": found}), flush=True)

    return tell


def printable(path: Path) -> str:
    """A name in one line, whatever bytes it is made of."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


TELLERS = {"table": as_table, "jsonl": as_jsonl}


def draw(path: Path, network: Network, kept: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from train.disk import write_atomically
    from train.models.cam import grad_cam
    from train.pictures import gallery
    from train.pictures.style import png

    images, said = (np.stack(part) for part in zip(*kept, strict=True))
    numbers = said.argmax(axis=1)
    maps, layer = grad_cam(network.model, images, numbers)
    titles = [network.classes[number] for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(gallery.attention(images, maps, titles, layer)))
    print(f"attention: {path}", file=sys.stderr)


if __name__ == "__main__":
    command.run(predict, only_prints=True)
