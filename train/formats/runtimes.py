"""Loads an exported file in its own runtime: uint8 [N, H, W, C], any size, to float32 probabilities [N, classes].

This module imports nothing of the project, and only the runtime that is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

PredictFunction = Callable[[np.ndarray], np.ndarray]

FILE_NAMES = {"keras": "model.keras", "saved_model": "saved_model", "onnx": "model.onnx", "tflite": "model.tflite"}


def load_predictor(name: str, path: Path, threads: int | None = None) -> PredictFunction:
    """Loads a format. name: a key of PREDICTOR_LOADERS. threads: of ONNX Runtime and LiteRT; TensorFlow has its own."""
    return PREDICTOR_LOADERS[name](path, threads)


def load_keras(path: Path, _: int | None) -> PredictFunction:
    import keras

    model = keras.models.load_model(path)
    model.jit_compile = False  # it would compile again for every image size
    return lambda images: np.asarray(model.predict_on_batch(images))


def load_saved_model(path: Path, _: int | None) -> PredictFunction:
    """Uses the signature that TensorFlow Serving calls."""
    import tensorflow as tf

    model = tf.saved_model.load(str(path))
    serve = model.signatures["serving_default"]

    def predict(images: np.ndarray, *, _alive: object = model) -> np.ndarray:
        return serve(images=tf.constant(images))["probabilities"].numpy()

    return predict


def load_onnx(path: Path, threads: int | None) -> PredictFunction:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: ONNX Runtime chooses
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def load_tflite(path: Path, threads: int | None) -> PredictFunction:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
    [input_details] = interpreter.get_input_details()
    [output_details] = interpreter.get_output_details()
    shape: tuple[int, ...] = ()

    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal shape
        if images.shape != shape:
            interpreter.resize_tensor_input(input_details["index"], images.shape)
            interpreter.allocate_tensors()
            shape = images.shape
        interpreter.set_tensor(input_details["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(output_details["index"])

    return predict


PREDICTOR_LOADERS: dict[str, Callable[[Path, int | None], PredictFunction]] = {
    "keras": load_keras,
    "saved_model": load_saved_model,
    "onnx": load_onnx,
    "tflite": load_tflite,
}
