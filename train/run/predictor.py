"""A run's best network, loaded to classify images: from encoded bytes to probabilities."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
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

from train.config.serialization import FormatVersionError, check_format_version
from train.data.decode import ImageSpec, decode, decode_and_resize, read_header
from train.formats.runtimes import FILE_NAMES, load_predictor
from train.runtime import setup
from train.storage.atomic import UnsafePathError, read_inside, resolve_inside

RUNTIMES = ("keras", "onnx")
BATCH_SIZE = 32
DECODE_AHEAD = 4 * BATCH_SIZE  # pictures that are decoded while others are answered


@dataclass(frozen=True)
class Network:
    """predict: uint8 [N, H, W, C] -> probabilities [N, classes]. view: what it looks at in a picture.

    decode: a picture's bytes as `predict` wants them; where that leaves them in their own sizes, `batch` is 1.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[bytes], np.ndarray]
    image_spec: ImageSpec
    classes: list[str]
    max_bytes: int
    max_pixels: int
    batch_size: int = BATCH_SIZE
    model: Any = None


def load_network(run: Path, runtime_name: str, *, compiled: bool) -> Network:
    """engine: one of RUNTIMES. many: whether it pays to compile. Raises: ValueError where there is no network."""
    card, config = read_model_info(run)
    side, _, channels = card["input"]["shape"]
    view = ImageSpec(side, channels, tuple(config["background"]), config["crop_fraction"])
    limits = config["max_bytes"], config["max_pixels"]
    if runtime_name == "onnx":
        answer = load_onnx_export(run)
        if view.crop_fraction == 1:
            return Network(answer, partial(decode_and_resize, spec=view), view, card["classes"], *limits)
        own = partial(
            decode, channels=channels, background=view.background, max_pixels=None
        )  # the file crops by itself
        return Network(answer, own, view, card["classes"], *limits, batch_size=1)
    resolve_inside(run, "best/model.keras")
    model = load_keras_model(run / "best/model.keras")
    answer = model.predict_on_batch if compiled else model
    return Network(
        lambda images: softmax(np.asarray(answer(images))), partial(decode_and_resize, spec=view), view,
        card["classes"], *limits, model=model,
    )  # fmt: skip


def load_keras_model(path: Path) -> Any:
    """The Keras model. Raises: ValueError for a file that is damaged, or has code in it."""
    setup.import_backend("tensorflow", Path(os.devnull))  # without what it does not need, and without its chatter
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


def read_model_info(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the network is, and the run's `data`. Raises: ValueError where there is no network."""
    try:
        check_format_version(run, json.loads(read_inside(run, "run.json")))
        card = json.loads(read_inside(run, "best/model.json"))
        return card, yaml.safe_load(read_inside(run, "config.yaml"))["data"]
    except (FormatVersionError, UnsafePathError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError(f"run must be the folder of a run that has weights, got {run}; use run=runs/latest") from None


def load_onnx_export(run: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Raises: ValueError where there is no such export, or one of another network, or no ONNX Runtime."""
    path, again = (
        resolve_inside(run, f"export/onnx/{FILE_NAMES['onnx']}"),
        f"make export run={shlex.quote(str(run))} format=onnx",
    )
    if not path.exists():
        raise ValueError(f"runtime=onnx must have the exported file, got no {path}; {again}")
    known = json.loads(read_inside(run, "export/onnx/summary.json"))["network"]
    if known != hashlib.sha256(read_inside(run, "best/model.json")).hexdigest():
        raise ValueError(f"runtime=onnx must have the run's best network, got an older one in {path}; {again}")
    try:
        return load_predictor("onnx", path)
    except ImportError:
        raise ValueError(f"runtime=onnx must have the extra export, got no onnxruntime; {again}") from None
    except Exception as fault:  # it has many
        raise ValueError(f"runtime=onnx must have a file that can be read, got {path}; {again}") from fault


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def predict_files(network: Network, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray | Exception, np.ndarray]]:
    """Of every picture, in their order: its pixels, or why it can't be read, and its probabilities."""
    pictures = decode_files(network, paths)
    while batch := list(islice(pictures, network.batch_size)):
        whole = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        said = iter(network.predict(np.stack(whole)) if whole else ())
        for path, pixels in batch:
            yield path, pixels, next(said) if isinstance(pixels, np.ndarray) else np.empty(0)


def decode_files(network: Network, paths: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """In their order, by all cores; so many ahead at most."""
    ahead = DECODE_AHEAD if network.batch_size > 1 else 1  # a picture in its own size may be large
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[tuple[Path, Future]] = deque()
        for path in paths:
            waiting.append((path, pool.submit(read_image, network, path)))
            if len(waiting) > ahead:
                name, future = waiting.popleft()
                yield name, future.result()
        for name, future in waiting:
            yield name, future.result()


def read_image(network: Network, path: Path) -> np.ndarray | Exception:
    """Pixels as the network wants them, or what is wrong."""
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        check_size(network, path.stat().st_size)
        return decode_image(network, path.read_bytes())
    except (OSError, ValueError) as fault:
        return fault


def decode_image(network: Network, data: bytes) -> np.ndarray:
    """Encoded bytes as the network wants them. Raises: ValueError for what is no picture, or one too large."""
    check_size(network, len(data))
    read_header(data, network.max_pixels)
    return network.decode(data)


def check_size(network: Network, size: int) -> None:
    if size > network.max_bytes:
        raise ValueError(f"{size:,} bytes are more than the limit of {network.max_bytes:,}")


def top_classes(probabilities: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    """The most likely classes; among equal ones the lower index first."""
    return [
        (classes[number], float(probabilities[number])) for number in np.argsort(-probabilities, kind="stable")[:top]
    ]
