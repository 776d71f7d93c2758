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

INPUTS = "inputs must be base64 of image files, or one array [N, H, W, C] of whole numbers in 0..255"


@dataclass
class Serve:
    """`run`: the folder of a run. `port`: where the server listens on 127.0.0.1."""

    run: str = "runs/latest"
    port: int = 5001


def serve(words: list[str]) -> None:
    """Becomes the server. Raises: ValueError for a run without weights, or a port that is taken."""
    keys = arguments.parse(Serve, words)
    predictor.card_of(Path(keys.run))
    mlflow_server.become(__spec__.name, Path(keys.run).resolve(), keys.port)


class Served:
    """What MLflow's server asks, from several threads at once."""

    def __init__(self, run: Path):
        self.network = predictor.load(run, "keras", many=True)
        self.lock = threading.Lock()  # the network uses all cores for one request
        self.network.predict(np.zeros((1, *self.network.view.shape), np.uint8))  # compiles

    def predict(self, given: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """given: an array, a table with one column, or a dictionary with one entry, of numbers or of texts."""
        try:
            images = self.images(given)
        except (ValueError, TypeError) as fault:
            raise mlflow_server.bad_request(str(fault)) from None
        found: list[np.ndarray] = []
        for start in range(0, len(images), predictor.BATCH):
            with self.lock:
                found.extend(self.network.predict(images[start : start + predictor.BATCH]))
        return [self.answer(probabilities) for probabilities in found]

    def images(self, given: Any) -> np.ndarray:
        """uint8 [N, S, S, C]. Raises: ValueError saying what is wrong."""
        if isinstance(given, dict) and len(given) == 1:
            given = next(iter(given.values()))
        values = np.asarray(given)
        if not values.size:
            raise ValueError(f"{INPUTS}, got none")
        if values.dtype.kind in "OUS":
            if values.ndim > 2 or values.shape[1:] not in ((), (1,)):
                raise ValueError(f"{INPUTS}, got texts of shape {list(values.shape)}; use one column")
            return np.stack([self.picture(number, text) for number, text in enumerate(values.ravel().tolist())])
        view = self.network.view
        if values.ndim != 4 or values.shape[-1] != view.channels:
            raise ValueError(f"{INPUTS}, C = {view.channels}, got one of shape {list(values.shape)}")
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise ValueError(f"{INPUTS}, got {values.dtype} from {values.min()} to {values.max()}")
        if values[0, ..., 0].size > self.network.max_pixels:
            raise ValueError(f"{INPUTS}, of at most {self.network.max_pixels:,} pixels, got {values.shape[1:3]}")
        return np.stack([resize(image, view.image_size, view.crop_fraction) for image in values.astype(np.uint8)])

    def picture(self, number: int, text: Any) -> np.ndarray:
        try:
            return predictor.pixels_of(self.network, base64.b64decode(text, validate=True))
        except (ValueError, TypeError, binascii.Error) as fault:
            raise ValueError(f"{INPUTS}, got number {number}: {fault}") from None

    def answer(self, probabilities: np.ndarray) -> dict[str, Any]:
        [(name, share)] = predictor.ranked(probabilities, self.network.classes, 1)
        every = dict(zip(self.network.classes, map(float, probabilities), strict=True))
        return {"class": name, "probability": share, "probabilities": every}


def _load_pyfunc(path: str) -> Served:
    """MLflow calls it by this name. path: of a file that says which run."""
    return Served(Path(json.loads(Path(path).read_text())["run"]))


if __name__ == "__main__":
    arguments.run(serve)
