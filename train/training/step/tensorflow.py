"""The training step on TensorFlow: Keras's own `train_step` inside a `tf.function`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from train.training.step import base
from train.training.step.fused_kernels import fused_kernels
from train.training.step.layerwise_lr import layerwise_lr


class Step(base.Step):
    """See the base class. The graph updates the variables in place."""

    COUNTER_DTYPE = "int64"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._all_finite = tf.function(
            lambda: base.all_finite([v.value for v in self._updated_variables]), autograph=False
        )

    @staticmethod
    def make_predictor(model: keras.Model, jit: bool) -> Callable[[tf.Tensor], np.ndarray]:
        # One graph for every batch size: the last batch of a split is smaller, and tracing a deep model takes seconds.
        signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)]
        run = tf.function(
            lambda images: model(images, training=False), input_signature=signature, jit_compile=jit, autograph=False
        )
        return lambda images: run(images).numpy()

    def __call__(self, images: tf.Tensor, labels: tf.Tensor, *weights: tf.Tensor) -> None:
        if self._traced_stage is None:
            self.begin_epoch(0)
        self._train(images, labels, *weights)

    def _trace(self, stage: int) -> Callable:
        # Autograph would find no Python control flow here, and looking for it takes as long as tracing.
        step = tf.function(self._checked_step, jit_compile=self._jit, autograph=False)
        with fused_kernels(self.model, self._optimizer), layerwise_lr(self._optimizer, self._freeze_schedule, stage):
            return step.get_concrete_function(*(tf.TensorSpec(*spec) for spec in self._input_specs))

    def _checked_step(self, images: tf.Tensor, labels: tf.Tensor, *weights: tf.Tensor) -> None:
        """Keras's own step; also records, on the device, the first step with a non-finite tensor of each kind."""
        self._step_count.assign_add(1)
        loss_scale = self.model.optimizer.dynamic_scale.value if self._uses_loss_scaling else 1.0
        with _capture_gradients(self.model.optimizer) as gradients:
            targets, *example_weights = (dict.fromkeys(self._output_names, tensor) for tensor in (labels, *weights))
            targets = self._with_teacher_logits(targets, images)
            results = self.model.train_step((images, targets, *example_weights))
        if self._gradient_norms is not None:
            self._gradient_norms.assign(base.gradient_norms(gradients, self.model.trainable_variables) / loss_scale)
        finite = [
            base.all_finite([results["loss"]]),  # a mean over steps: it stays non-finite once one loss was
            # Scaled gradients may overflow by design: the step is then skipped and the scale halved.
            tf.constant(True) if self._uses_loss_scaling else base.all_finite(gradients),
            base.all_finite([v.value for v in self._moving_statistics]),
        ]
        is_first = tf.logical_and(tf.logical_not(tf.stack(finite)), self._first_non_finite.value == 0)
        self._first_non_finite.assign(tf.where(is_first, self._step_count.value, self._first_non_finite.value))

    def _teacher_logits(self, images: tf.Tensor) -> tf.Tensor:
        return self._teacher(images, training=False)

    def _weights_finite(self) -> bool:
        return bool(self._all_finite())


@contextmanager
def _capture_gradients(optimizer: keras.optimizers.Optimizer) -> Iterator[list[tf.Tensor]]:
    """Collects the gradients that the optimizer receives while a step is traced."""
    captured: list[tf.Tensor] = []
    original = optimizer.apply

    def capture(grads: Any, trainable_variables: Any = None) -> None:
        captured.extend(grads)
        original(grads, trainable_variables)

    optimizer.apply = capture
    try:
        yield captured
    finally:
        del optimizer.apply
