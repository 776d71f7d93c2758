"""Keras's own `train_step` inside a `tf.function`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from train.step.kernels import faster
from train.step.layerwise import Plan, scaled


def predictor(model: keras.Model, jit: bool) -> Callable[[tf.Tensor], np.ndarray]:
    """Images uint8 [N, H, W, C] -> the single output of `model` as an array."""
    # One graph for every batch size: the last batch of a split is smaller, and tracing a deep network takes seconds.
    signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)]
    run = tf.function(
        lambda images: model(images, training=False), input_signature=signature, jit_compile=jit, autograph=False
    )
    return lambda images: run(images).numpy()


WATCHED = ("the loss", "the gradients", "the statistics of batch normalisation")
NORMS = ("all", "first_layer")  # of gradients, where they are measured
LEAST_LOSS_SCALE = 1.0  # mixed_float16 starts at 32,768 and halves at every skipped step


class Step:
    """Trains `model` on one batch per call; losses, weights, metrics and loss scaling stay Keras's.

    The model is compiled and has dict outputs. Metrics gather on the device and are read by `metrics()`, so that the
    host does not wait for the device at every step.
    """

    def __init__(
        self, model: keras.Model, inference: keras.Model, rate: Any, batch_size: int, jit: bool,
        *, mixed: bool = False, weighted: bool = False, gradients: bool = False, plan: Plan | None = None,
        teacher: keras.Model | None = None,
    ):  # fmt: skip
        """`rate`: the learning rate schedule (optim.Rate); batches have `batch_size` examples.

        mixed: images come as float32. weighted: a weight per example comes with them. gradients: measure them, too.
        plan: None where all of the network learns all of the time. teacher: from images to logits; what it says stands
        behind the labels of `main` (losses.Taught).
        """
        self.model, self.rate, self._plan, self._teacher = model, rate, plan, teacher
        self._outputs = tuple(model.output)
        self._scaling = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        # Under mixed_float16 Keras wraps the optimizer, and the averages belong to the one inside.
        self._optimizer = model.optimizer.inner_optimizer if self._scaling else model.optimizer
        self._learning = model.trainable_variables  # all that learn in one stage or another
        model.optimizer.build(self._learning)
        self._count = tf.Variable(0, dtype=tf.int64, trainable=False)  # steps of the run, skipped ones too
        self._first_bad = tf.Variable([0] * len(WATCHED), dtype=tf.int64, trainable=False)  # 0: none
        self._norms = tf.Variable([0.0] * len(NORMS), trainable=False) if gradients else None  # of the last step
        self._moving = [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        labels = tf.TensorSpec((batch_size, model.output["main"].shape[-1]), tf.float32)
        images = tf.TensorSpec((batch_size, *model.input_shape[1:]), tf.float32 if mixed else tf.uint8)
        weights = [tf.TensorSpec((batch_size,), tf.float32)] if weighted else []
        self._make_metrics(labels)
        self._given, self._jit = (images, labels, *weights), jit
        self._stage: int | None = None  # that is traced
        moved = [*self._learning, *self._optimizer.variables]
        watched = [v for v in moved if keras.backend.is_float_dtype(v.dtype)]
        self._whole = tf.function(lambda: _all_finite([v.value for v in watched]), autograph=False)
        self.predict = predictor(inference, jit)  # logits of the main output, float32 [N, classes]

    def __call__(self, images: tf.Tensor, labels: tf.Tensor, *weights: tf.Tensor) -> None:
        """images: uint8 (or float32) [N, H, W, C] in 0..255; labels: float32 [N, classes], used for every output.

        weights: one float32 [N] where the step is weighted; of the loss, not of the metrics.
        """
        if self._stage is None:
            self.begin_epoch(0)
        self._train(images, labels, *weights)

    def begin_epoch(self, epoch: int) -> bool:
        """Freezes what does not learn in this epoch; whether the next step is slow, because its graph is new."""
        stage = self._plan.stage_of(epoch) if self._plan else 0
        if stage == self._stage:
            return False
        if self._plan:
            self._plan.freeze(stage)
        self._train, self._stage = self._trace(stage), stage
        return True

    def _trace(self, stage: int) -> Callable:
        # Nothing here is Python that would have to be turned into a graph, and looking for it takes as long as tracing.
        step = tf.function(self._watched_step, jit_compile=self._jit, autograph=False)
        with faster(self.model, self._optimizer), scaled(self._optimizer, self._plan, stage):
            return step.get_concrete_function(*self._given)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Nothing is marked as frozen, as long as the network is written down for others."""
        if self._plan and self._stage is not None:
            for layer in (layer for layers in self._plan.layers.values() for layer in layers):
                layer.trainable = True
        try:
            yield
        finally:
            if self._plan and self._stage is not None:
                self._plan.freeze(self._stage)

    def _make_metrics(self, labels: tf.TensorSpec) -> None:
        """Lets Keras make the metrics' variables, which `load` fills. Made in a trace they would take a second one."""
        empty = dict.fromkeys(self._outputs, tf.zeros(labels.shape))
        truth = self._taught(empty, None)
        self.model.compute_loss(y=truth, y_pred=empty)
        self.model.compute_metrics(None, truth, empty, None)
        self.model.reset_metrics()

    def _watched_step(self, images: tf.Tensor, labels: tf.Tensor, *weights: tf.Tensor) -> None:
        """Keras's own step, and beside it, on the device, which step was the first with something not finite."""
        self._count.assign_add(1)
        scale = self.model.optimizer.dynamic_scale.value if self._scaling else 1.0
        with _gradients_of(self.model.optimizer) as gradients:
            truth, *weighing = (dict.fromkeys(self._outputs, values) for values in (labels, *weights))
            truth = self._taught(truth, images)
            found = self.model.train_step((images, truth, *weighing))
        if self._norms is not None:
            self._norms.assign(_norms(gradients, self.model.trainable_variables) / scale)
        finite = [
            _all_finite([found["loss"]]),  # the mean so far: one bad loss makes it bad
            # Of scaled gradients some are infinite by design: the step is skipped and the scale halved.
            tf.constant(True) if self._scaling else _all_finite(gradients),
            _all_finite([v.value for v in self._moving]),
        ]
        fresh = tf.logical_and(tf.logical_not(tf.stack(finite)), self._first_bad == 0)
        self._first_bad.assign(tf.where(fresh, self._count, self._first_bad))

    def _taught(self, truth: dict[str, tf.Tensor], images: tf.Tensor | None) -> dict[str, tf.Tensor]:
        """The labels by output, those of `main` with what a teacher says of the images behind them, or zeros."""
        if self._teacher is None:
            return truth
        labels = truth["main"]
        said = tf.zeros_like(labels) if images is None else tf.cast(self._teacher(images, training=False), tf.float32)
        return {**truth, "main": tf.concat([labels, said], axis=-1)}

    def fault(self) -> tuple[str, int] | None:
        """What was not finite first, and in which step of the run; None as long as all is well."""
        first = {name: int(step) for name, step in zip(WATCHED, self._first_bad.numpy(), strict=True) if step}
        if first:
            return min(first.items(), key=lambda item: item[1])
        if self._scaling and float(self.model.optimizer.dynamic_scale) < LEAST_LOSS_SCALE:
            return f"the gradients (loss scale below {LEAST_LOSS_SCALE:g})", int(self._count)
        if not self._whole():  # an update may break what it is given whole: the next loss would tell
            return "the weights", int(self._count)
        return None

    def state(self) -> dict[str, np.ndarray]:
        """Copies of every state tensor by name, each once: the model's with its seeds, the optimizer's, the metrics'.

        The optimizer's have its averages, accumulated gradients and loss scale among them.
        """
        return {name: variable.numpy() for name, variable in self._variables().items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Puts back what `state` gave.

        Raises: ValueError naming the first tensor that is missing, unknown, or of another shape or type.
        """
        variables = self._variables()
        for name in sorted({*variables, *state}):
            has = _form(variables[name]) if name in variables else "none"
            got = _form(state[name]) if name in state else "none"
            if has != got:
                raise ValueError(f"{name} must be as the network and its optimizer have it ({has}), got {got}")
        for name, variable in variables.items():
            variable.assign(state[name])
        self._first_bad.assign(tf.zeros_like(self._first_bad))

    def _variables(self) -> dict[str, Any]:
        """Numbered within their kind, since Keras gives some metrics the same path."""
        kinds = {
            "model": self.model.variables,
            "optimizer": self.model.optimizer.variables,
            "metrics": self.model.metrics_variables,
        }
        found = {
            f"{kind}/{number:04d}/{variable.path}": variable
            for kind, variables in kinds.items()
            for number, variable in enumerate(variables)
        }
        return found | {"count": self._count, "learning_rate_factor": self.rate.factor}

    def metrics(self) -> dict[str, float]:
        """Means since the last `reset_metrics`: `loss`, `main_loss`, `main_accuracy`, `aux_loss`, ...

        Where gradients are measured also their norms in the last step, `gradient_norm/...`.
        """
        found = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        if len(self._outputs) == 1:  # Keras leaves the output's name away where there is only one
            found = {"main_accuracy": found["accuracy"], "main_loss": found["loss"], "loss": found["loss"]}
        if self._scaling:
            found["loss_scale"] = float(self.model.optimizer.dynamic_scale)
            # The public counter is divided by the steps that are accumulated.
            found["skipped_steps"] = float(int(self._count) - int(self._optimizer._iterations))
        if self._norms is not None:
            found |= {f"gradient_norm/{name}": float(norm) for name, norm in zip(NORMS, self._norms, strict=True)}
        return found

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.model.optimizer.learning_rate)

    def slow_down(self, factor: float) -> None:
        """Multiplies all learning rates from now on by `factor`, in place of what was given before."""
        self.rate.factor.assign(factor)

    def factor(self) -> float:
        """What `slow_down` was given."""
        return float(self.rate.factor)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, where the optimizer keeps some; put back by copy, to the bit."""
        if not self._optimizer.use_ema:
            yield
            return
        weights = self._learning
        kept = [weight.numpy() for weight in weights]
        for weight, average in zip(weights, self._optimizer._model_variables_moving_average, strict=True):
            weight.assign(average)
        try:
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.assign(value)

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over all model variables sorted by path: path, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for variable in sorted(model.variables, key=lambda v: v.path):
        value = np.asarray(variable)
        digest.update(f"{variable.path} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


@contextmanager
def _gradients_of(optimizer: keras.optimizers.Optimizer) -> Iterator[list[tf.Tensor]]:
    """Collects what the optimizer is given while a step is traced."""
    seen: list[tf.Tensor] = []
    apply = optimizer.apply

    def watch(grads: Any, trainable_variables: Any = None) -> None:
        seen.extend(grads)
        apply(grads, trainable_variables)

    optimizer.apply = watch
    try:
        yield seen
    finally:
        del optimizer.apply


def _all_finite(tensors: list[tf.Tensor]) -> tf.Tensor:
    """A sum is finite only if all its parts are; summing reads a tensor once and writes nothing."""
    return tf.reduce_all([tf.math.is_finite(tf.reduce_sum(tensor)) for tensor in tensors if tensor is not None])


def _norms(gradients: list[Any], variables: list[Any]) -> tf.Tensor:
    """float32 [2], Euclidean: of all gradients together, and of the first kernel's."""
    squares = [tf.reduce_sum(tf.square(tf.cast(gradient, tf.float32))) for gradient in gradients]
    first = next(number for number, variable in enumerate(variables) if variable.path.endswith("kernel"))
    return tf.sqrt(tf.stack([tf.add_n(squares), squares[first]]))


def _form(value: Any) -> str:
    return f"{value.dtype.name if hasattr(value.dtype, 'name') else value.dtype} {tuple(value.shape)}"
