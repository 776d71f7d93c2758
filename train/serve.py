"""`make serve run=<run folder>`: a run's best network behind MLflow's own model server, on 127.0.0.1.

    make serve run=runs/latest port=5001

POST /invocations takes {"inputs": [...]}: pictures as base64 of their files, or one array uint8 [N, H, W, C] in 0..255.
Every one goes the way that test examples went, and is answered with its class and the probabilities of all.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.cli import arguments
from train.data.decode import resize
from train.run import predictor
from train.tracking import mlflow_server

INPUTS_ERROR = "inputs must be base64 of image files, or one array [N, H, W, C] of whole numbers in 0..255"


@dataclass
class Serve:
    """`run`: the folder of a run. `port`: where the server listens on 127.0.0.1."""

    run: str = "runs/latest"
    port: int = 5001


def serve(argv: list[str]) -> None:
    """Becomes the server. Raises: ValueError for a run without weights, or a port that is taken."""
    keys = arguments.parse(Serve, argv)
    predictor.read_model_info(Path(keys.run))
    mlflow_server.exec_server(__spec__.name, Path(keys.run).resolve(), keys.port)


class ServedModel:
    """What MLflow's server asks, from several threads at once."""

    def __init__(self, run: Path):
        self.network = predictor.load_network(run, "keras", compiled=True)
        self.lock = threading.Lock()  # the network uses all cores for one request
        self.network.predict(np.zeros((1, *self.network.image_spec.shape), np.uint8))  # compiles

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """given: an array, a table with one column, or a dictionary with one entry, of numbers or of texts."""
        try:
            images = self.decode_images(inputs)
        except (ValueError, TypeError) as fault:
            raise mlflow_server.bad_request(str(fault)) from None
        found: list[np.ndarray] = []
        for start in range(0, len(images), predictor.BATCH_SIZE):
            with self.lock:
                found.extend(self.network.predict(images[start : start + predictor.BATCH_SIZE]))
        return [self.format_prediction(probabilities) for probabilities in found]

    def decode_images(self, inputs: Any) -> np.ndarray:
        """uint8 [N, S, S, C]. Raises: ValueError saying what is wrong."""
        if isinstance(inputs, dict) and len(inputs) == 1:
            inputs = next(iter(inputs.values()))
        values = np.asarray(inputs)
        if not values.size:
            raise ValueError(f"{INPUTS_ERROR}, got none")
        if values.dtype.kind in "OUS":
            if values.ndim > 2 or values.shape[1:] not in ((), (1,)):
                raise ValueError(f"{INPUTS_ERROR}, got texts of shape {list(values.shape)}; use one column")
            return np.stack([self.decode_image(number, text) for number, text in enumerate(values.ravel().tolist())])
        view = self.network.image_spec
        if values.ndim != 4 or values.shape[-1] != view.channels:
            raise ValueError(f"{INPUTS_ERROR}, C = {view.channels}, got one of shape {list(values.shape)}")
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise ValueError(f"{INPUTS_ERROR}, got {values.dtype} from {values.min()} to {values.max()}")
        if values[0, ..., 0].size > self.network.max_pixels:
            raise ValueError(f"{INPUTS_ERROR}, of at most {self.network.max_pixels:,} pixels, got {values.shape[1:3]}")
        return np.stack([resize(image, view.image_size, view.crop_fraction) for image in values.astype(np.uint8)])

    def decode_image(self, index: int, text: Any) -> np.ndarray:
        try:
            return predictor.decode_image(self.network, base64.b64decode(text, validate=True))
        except (ValueError, TypeError, binascii.Error) as fault:
            raise ValueError(f"{INPUTS_ERROR}, got number {index}: {fault}") from None

    def format_prediction(self, probabilities: np.ndarray) -> dict[str, Any]:
        [(name, share)] = predictor.top_classes(probabilities, self.network.classes, 1)
        every = dict(zip(self.network.classes, map(float, probabilities), strict=True))
        return {"class": name, "probability": share, "probabilities": every}


def _load_pyfunc(path: str) -> ServedModel:
    """MLflow calls it by this name. path: of a file that says which run."""
    return ServedModel(Path(json.loads(Path(path).read_text())["run"]))


if __name__ == "__main__":
    arguments.main(serve)
