"""The training step on TensorFlow, a `tf.function`."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from train.training.step import base
from train.training.step.fused_kernels import fused_kernels

Tensors = dict[str, tf.Tensor]  # by output, or metrics by name


class Step(base.Step):
    """See the base class. The graph updates the variables in place."""

    COUNTER_DTYPE = "int64"

    def _set_up(self, inference: keras.Model) -> None:  # noqa: ARG002 - the predictor of the base class will do
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

    def _trace(self) -> Callable[..., None]:
        # Autograph would find no Python control flow here, and looking for it takes as long as tracing.
        step = tf.function(self._checked_step, jit_compile=self._jit, autograph=False)
        with fused_kernels(self.model):
            return step.get_concrete_function(*(tf.TensorSpec(*spec) for spec in self._input_specs))

    def _checked_step(self, images: tf.Tensor, labels: tf.Tensor, *weights: tf.Tensor) -> None:
        """Trains; also records, on the device, the first step with a non-finite tensor of each kind."""
        self._step_count.assign_add(1)
        loss_scale = self.model.optimizer.dynamic_scale.value if self._uses_loss_scaling else 1.0
        targets, *example_weights = (dict.fromkeys(self._output_names, tensor) for tensor in (labels, *weights))
        targets = self._with_teacher_logits(targets, images)
        results, gradients = self._update(images, targets, *example_weights)
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

    def _update(
        self, images: tf.Tensor, targets: Tensors, example_weights: Tensors | None = None
    ) -> tuple[Tensors, list[tf.Tensor]]:
        """The operations of Keras's `train_step` in its order; returns the metrics, and the gradients of the loss."""
        model = self.model
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            loss = model.compute_loss(images, targets, outputs, example_weights, training=True)
            self._loss_metric.update_state(loss, sample_weight=tf.shape(images)[0])
            scaled_loss = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
        return model.compute_metrics(images, targets, outputs, example_weights), gradients

    def _teacher_logits(self, images: tf.Tensor) -> tf.Tensor:
        assert self._teacher is not None
        return self._teacher(images, training=False)

    def _weights_finite(self) -> bool:
        return bool(self._all_finite())
