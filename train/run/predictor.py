"""Inference with a run's best model: from encoded images to class probabilities."""

from __future__ import annotations

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
from typing import TYPE_CHECKING

import numpy as np
import yaml

from train.config.serialization import FormatVersionError, check_format_version
from train.data.decode import ImageSpec, decode, decode_and_resize, read_header
from train.formats.runtimes import FILE_NAMES, load_predictor
from train.runtime import setup
from train.storage.atomic import UnsafePathError, read_inside, resolve_inside
from train.storage.json_types import JsonObject
from train.tracking.run_dir import best_sha256

if TYPE_CHECKING:  # Keras is imported when a Keras model is loaded
    import keras

RUNTIMES = ("keras", "onnx")
BATCH_SIZE = 32
DECODE_AHEAD = 4 * BATCH_SIZE  # images decoded while others are classified


@dataclass(frozen=True)
class Network:
    """A model that is ready to classify images.

    predict: uint8 [N, H, W, C] -> probabilities [N, classes]. decode: encoded bytes -> the uint8 [H, W, C] that
    `predict` takes. `batch_size` is 1 where the model itself crops and resizes, since images then differ in size.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[bytes], np.ndarray]
    image_spec: ImageSpec
    classes: list[str]
    max_bytes: int
    max_pixels: int
    batch_size: int = BATCH_SIZE
    model: keras.Model | None = None


def load_network(run: Path, runtime_name: str, *, compiled: bool) -> Network:
    """Loads the best model of a run. runtime_name: one of RUNTIMES; compiled: worth it for many images only.

    Raises: ValueError for a run without weights, or without an up-to-date export for the runtime.
    """
    model_info, data_config = read_model_info(run)
    side, _, channels = model_info["input"]["shape"]
    classes = model_info["classes"]
    spec = ImageSpec(side, channels, tuple(data_config["background"]), data_config["crop_fraction"])
    resize = partial(decode_and_resize, spec=spec)
    limits = data_config["max_bytes"], data_config["max_pixels"]
    if runtime_name == "onnx":
        predict = load_onnx_export(run)
        if spec.crop_fraction == 1:
            return Network(predict, resize, spec, classes, *limits)
        # The exported graph crops by itself.
        decode_only = partial(decode, channels=channels, background=spec.background, max_pixels=None)
        return Network(predict, decode_only, spec, classes, *limits, batch_size=1)
    resolve_inside(run, "best/model.keras")
    model = load_keras_model(run / "best/model.keras")
    compute_logits = model.predict_on_batch if compiled else model
    return Network(
        lambda images: softmax(np.asarray(compute_logits(images))), resize, spec, classes, *limits, model=model
    )


def load_keras_model(path: Path) -> keras.Model:
    """Loads a .keras file. Raises: ValueError for one that is damaged, or contains code."""
    setup.import_backend("tensorflow", Path(os.devnull))  # without optional modules and log output
    import keras
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)  # leaves GPU memory to other processes
    try:
        model = keras.models.load_model(path)
    except Exception as error:  # Keras raises many kinds
        raise ValueError(f"cannot load the weights in {path} ({type(error).__name__}); restore the file") from error
    model.jit_compile = False  # it would recompile for every batch size
    return model


def read_model_info(run: Path) -> tuple[JsonObject, JsonObject]:
    """The contents of model.json, and the `data` section of the config. Raises: ValueError without a saved model."""
    try:
        check_format_version(run, json.loads(read_inside(run, "run.json")))
        model_info = json.loads(read_inside(run, "best/model.json"))
        return model_info, yaml.safe_load(read_inside(run, "config.yaml"))["data"]
    except (FormatVersionError, UnsafePathError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError(f"{run} is not a run folder with saved weights; use e.g. run=runs/latest") from None


def load_onnx_export(run: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the ONNX export of a run. Raises: ValueError if it, or ONNX Runtime, is missing, outdated or damaged."""
    path = resolve_inside(run, f"export/onnx/{FILE_NAMES['onnx']}")
    export_command = f"make export run={shlex.quote(str(run))} format=onnx"
    if not path.exists():
        raise ValueError(f"runtime=onnx needs {path}, which does not exist; run {export_command}")
    try:
        exported = json.loads(read_inside(run, "export/onnx/summary.json"))["network"]
    except UnsafePathError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"cannot read export/onnx/summary.json of {run}; run {export_command}") from None
    if exported != best_sha256(run):
        raise ValueError(f"{path} was exported from an older model than the run's best; run {export_command}")
    try:
        return load_predictor("onnx", path)
    except ImportError:
        raise ValueError(f"runtime=onnx needs onnxruntime, which is not installed; run {export_command}") from None
    except Exception as error:  # ONNX Runtime raises many kinds
        raise ValueError(f"cannot load {path}; run {export_command}") from error


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def predict_files(network: Network, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray | Exception, np.ndarray]]:
    """Yields, for every image in order: path, pixels or the error of reading it, and probabilities (empty then)."""
    images = decode_files(network, paths)
    while batch := list(islice(images, network.batch_size)):
        decoded = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        probabilities = iter(network.predict(np.stack(decoded)) if decoded else ())
        for path, pixels in batch:
            yield path, pixels, next(probabilities) if isinstance(pixels, np.ndarray) else np.empty(0)


def decode_files(network: Network, paths: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """Decodes files on all cores, in order, at most DECODE_AHEAD images in advance."""
    ahead = DECODE_AHEAD if network.batch_size > 1 else 1  # an image that is not resized may be large
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[tuple[Path, Future[np.ndarray | Exception]]] = deque()
        for path in paths:
            pending.append((path, pool.submit(read_image, network, path)))
            if len(pending) > ahead:
                first_path, future = pending.popleft()
                yield first_path, future.result()
        for pending_path, future in pending:
            yield pending_path, future.result()


def read_image(network: Network, path: Path) -> np.ndarray | Exception:
    """The decoded pixels, or the error of reading the file."""
    try:
        if not path.is_file():
            raise ValueError("not a file")
        check_size(network, path.stat().st_size)
        return decode_image(network, path.read_bytes())
    except (OSError, ValueError) as error:
        return error


def decode_image(network: Network, data: bytes) -> np.ndarray:
    """Decodes an image for the model. Raises: ValueError for bytes that are not an image, or too large a one."""
    check_size(network, len(data))
    read_header(data, network.max_pixels)
    return network.decode(data)


def check_size(network: Network, size: int) -> None:
    if size > network.max_bytes:
        raise ValueError(f"{size:,} bytes are more than the limit of {network.max_bytes:,}")


def top_classes(probabilities: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    """The most likely classes with their probabilities; of equally likely ones the lower index first."""
    return [
        (classes[number], float(probabilities[number])) for number in np.argsort(-probabilities, kind="stable")[:top]
    ]
