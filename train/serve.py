"""`make serve run=<run folder>`: serves a run's best network with MLflow's model server, on 127.0.0.1.

    make serve run=runs/latest port=5001

POST /invocations takes {"inputs": [...]}: base64-encoded image files, or one array uint8 [N, H, W, C] in 0..255.
Images are preprocessed as the test examples were; the response has each one's class and all probabilities.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.cli import arguments
from train.cli.fields import setting
from train.data.decode import resize
from train.run import predictor
from train.storage.json_types import JsonObject
from train.tracking import mlflow_server

INPUTS_ERROR = "inputs must be base64-encoded image files, or one array [N, H, W, C] of whole numbers in 0..255"


@dataclass
class Serve:
    """The keys of `make serve`."""

    run: str = setting("runs/latest", "folder of the run")
    port: int = setting(5001, "port on 127.0.0.1", ge=1, le=65535)


def serve(argv: list[str]) -> None:
    """Replaces this process with the server. Raises: ValueError for a run without weights, or a port in use."""
    keys = arguments.parse(Serve, argv)
    predictor.read_model_info(Path(keys.run))
    mlflow_server.exec_server(__spec__.name, Path(keys.run).resolve(), keys.port)


class ServedModel:
    """The pyfunc model that MLflow's server calls, from several threads at once."""

    def __init__(self, run: Path):
        self.network = predictor.load_network(run, "keras", compiled=True)
        self.lock = threading.Lock()  # the network uses all cores for one request
        self.network.predict(np.zeros((1, *self.network.image_spec.shape), np.uint8))  # compiles

    def predict(self, inputs: object, params: JsonObject | None = None) -> list[JsonObject]:  # noqa: ARG002
        """inputs: an array, a table with one column, or a dictionary with one entry, of numbers or of strings."""
        try:
            images = self.decode_images(inputs)
        except (ValueError, TypeError) as error:
            raise mlflow_server.bad_request(str(error)) from None
        predictions: list[np.ndarray] = []
        for start in range(0, len(images), predictor.BATCH_SIZE):
            with self.lock:
                predictions.extend(self.network.predict(images[start : start + predictor.BATCH_SIZE]))
        return [self.format_prediction(probabilities) for probabilities in predictions]

    def decode_images(self, inputs: object) -> np.ndarray:
        """Returns uint8 [N, S, S, C]. Raises: ValueError for inputs of another kind, shape or range."""
        if isinstance(inputs, dict) and len(inputs) == 1:
            inputs = next(iter(inputs.values()))
        values = np.asarray(inputs)
        if not values.size:
            raise ValueError(f"{INPUTS_ERROR}, got none")
        if values.dtype.kind in "OUS":
            if values.ndim > 2 or values.shape[1:] not in ((), (1,)):
                raise ValueError(f"{INPUTS_ERROR}, got strings of shape {list(values.shape)}; use one column")
            return np.stack([self.decode_image(index, text) for index, text in enumerate(values.ravel().tolist())])
        spec = self.network.image_spec
        if values.ndim != 4 or values.shape[-1] != spec.channels:
            raise ValueError(f"{INPUTS_ERROR} with C = {spec.channels}, got shape {list(values.shape)}")
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise ValueError(f"{INPUTS_ERROR}, got {values.dtype} from {values.min()} to {values.max()}")
        if values[0, ..., 0].size > self.network.max_pixels:
            raise ValueError(f"{INPUTS_ERROR} with at most {self.network.max_pixels:,} pixels, got {values.shape[1:3]}")
        return np.stack([resize(image, spec.image_size, spec.crop_fraction) for image in values.astype(np.uint8)])

    def decode_image(self, index: int, text: str | bytes) -> np.ndarray:
        try:
            return predictor.decode_image(self.network, base64.b64decode(text, validate=True))
        except (ValueError, TypeError, binascii.Error) as error:
            raise ValueError(f"{INPUTS_ERROR}; input {index} cannot be read: {error}") from None

    def format_prediction(self, probabilities: np.ndarray) -> JsonObject:
        [(name, probability)] = predictor.top_classes(probabilities, self.network.classes, 1)
        by_class = dict(zip(self.network.classes, map(float, probabilities), strict=True))
        return {"class": name, "probability": probability, "probabilities": by_class}


def _load_pyfunc(path: str) -> ServedModel:
    """Loads the model; MLflow calls this function by its name. path: a JSON file that names the run."""
    return ServedModel(Path(json.loads(Path(path).read_text())["run"]))


if __name__ == "__main__":
    arguments.main(serve, Serve)
