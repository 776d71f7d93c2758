"""Keras's own `train_step` inside a `tf.function`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf


def predictor(model: keras.Model, jit: bool) -> Callable[[tf.Tensor], np.ndarray]:
    """Images uint8 [N, H, W, C] -> the single output of `model` as an array."""
    # One graph for every batch size: the last batch of a split is smaller, and tracing a deep network takes seconds.
    signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)]
    run = tf.function(lambda images: model(images, training=False), input_signature=signature, jit_compile=jit)
    return lambda images: run(images).numpy()


class Step:
    """Trains `model` on one batch per call; losses, weights, metrics and loss scaling stay Keras's.

    The model is compiled and has dict outputs. Metrics gather on the device and are read by `metrics()`, so that the
    host does not wait for the device at every step.
    """

    def __init__(self, model: keras.Model, inference: keras.Model, jit: bool):
        self.model = model
        self._outputs = tuple(model.output)
        # Under mixed_float16 Keras wraps the optimizer, and the averages belong to the one inside.
        self._optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        model.optimizer.build(model.trainable_variables)
        self._train = tf.function(model.train_step, jit_compile=jit)
        self.predict = predictor(inference, jit)  # logits of the main output, float32 [N, classes]

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """images: uint8 [N, H, W, C]; labels: float32 [N, classes], used for every output."""
        self._train((images, dict.fromkeys(self._outputs, labels)))

    def metrics(self) -> dict[str, float]:
        """Means since the last `reset_metrics`: `loss`, `main_loss`, `main_accuracy`, `aux_loss`, ..."""
        found = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        if len(self._outputs) == 1:  # Keras leaves the output's name away where there is only one
            found = {"main_accuracy": found["accuracy"], "main_loss": found["loss"], "loss": found["loss"]}
        return found

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.model.optimizer.learning_rate)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where the optimizer keeps some; put back by copy, to the bit."""
        if not self._optimizer.use_ema:
            yield
            return
        weights = self.model.trainable_variables
        kept = [weight.numpy() for weight in weights]
        for weight, average in zip(weights, self._optimizer._model_variables_moving_average, strict=True):
            weight.assign(average)
        try:
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.assign(value)

    def weights_sha256(self) -> str:
        """SHA-256 over all model variables sorted by path: path, dtype, shape, bytes."""
        digest = hashlib.sha256()
        for variable in sorted(self.model.variables, key=lambda v: v.path):
            value = np.asarray(variable)
            digest.update(f"{variable.path} {value.dtype} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()
