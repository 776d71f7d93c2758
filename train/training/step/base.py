"""A training step, as far as it is the same on every backend: what its state is called, and what is read from it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from train.training.step.layerwise_lr import FreezeSchedule

Tensor = Any

CHECKED_TENSORS = ("the loss", "the gradients", "the statistics of batch normalisation")
GRADIENT_NORMS = ("all", "first_layer")  # of gradients, where they are measured
MIN_LOSS_SCALE = 1.0  # mixed_float16 starts at 32,768 and halves at every skipped step


class Step(ABC):
    """Trains `model` on one batch per call; losses, weights, metrics and loss scaling stay Keras's.

    The model is compiled and has dict outputs. Metrics gather on the device and are read by `metrics()`, so that the
    host does not wait for the device at every step.
    """

    COUNTER_DTYPE: str  # dtype of what counts steps

    def __init__(
        self, model: keras.Model, inference: keras.Model, schedule: Any, batch_size: int, jit: bool,
        *, float_images: bool = False, example_weights: bool = False, measure_gradients: bool = False,
        freeze_schedule: FreezeSchedule | None = None, teacher: keras.Model | None = None,
    ):  # fmt: skip
        """`rate`: the learning rate schedule (optim.Rate); batches have `batch_size` examples.

        mixed: images come as float32. weighted: a weight per example comes with them. gradients: measure them, too.
        plan: None where all of the network learns all of the time. teacher: from images to logits; what it says stands
        behind the labels of `main` (losses.Taught).
        """
        self.model, self.schedule, self._freeze_schedule = model, schedule, freeze_schedule
        self._teacher: Any = teacher
        self._output_names = tuple(model.output)
        self._uses_loss_scaling = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        # Under mixed_float16 Keras wraps the optimizer, and the averages belong to the one inside.
        self._optimizer = model.optimizer.inner_optimizer if self._uses_loss_scaling else model.optimizer
        self._trainable_variables = model.trainable_variables  # all that learn in one stage or another
        model.optimizer.build(self._trainable_variables)
        self._step_count = self._make_variable((), "count")  # steps of the run, skipped ones too
        self._first_non_finite = self._make_variable((len(CHECKED_TENSORS),), "first_bad")  # 0: none
        self._gradient_norms = (
            self._make_variable((len(GRADIENT_NORMS),), "norms", "float32") if measure_gradients else None
        )  # of the last step
        self._moving_statistics = [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        labels = (batch_size, model.output["main"].shape[-1])
        self._input_specs = [
            ((batch_size, *model.input_shape[1:]), "float32" if float_images else "uint8"),
            (labels, "float32"),
        ]
        self._input_specs += [((batch_size,), "float32")] if example_weights else []
        self._make_metrics(labels)
        self._jit = jit
        self.local_signal: Callable[[], int] = lambda: 0  # what this process wants all to hear; 0: nothing
        self._traced_stage: int | None = None  # that is traced
        moved = [*self._trainable_variables, *self._optimizer.variables]
        self._updated_variables = [v for v in moved if keras.backend.is_float_dtype(v.dtype)]
        self.predict = self.make_predictor(inference, jit)  # logits of the main output, float32 [N, classes]

    def _make_variable(self, shape: tuple[int, ...], name: str, dtype: str = "") -> keras.Variable:
        return keras.Variable(np.zeros(shape), dtype=dtype or self.COUNTER_DTYPE, trainable=False, name=name)

    @staticmethod
    @abstractmethod
    def make_predictor(model: keras.Model, jit: bool) -> Callable[[Any], np.ndarray]:
        """Images uint8 [N, H, W, C] -> the single output of `model` as an array."""

    @abstractmethod
    def __call__(self, images: Tensor, labels: Tensor, *weights: Tensor) -> None:
        """images: uint8 (or float32) [N, H, W, C] in 0..255; labels: float32 [N, classes], used for every output.

        weights: one float32 [N] where the step is weighted; of the loss, not of the metrics.
        """

    @abstractmethod
    def _trace(self, stage: int) -> Callable:
        """The step of a stage, of batches as `_given` says."""

    @abstractmethod
    def _weights_finite(self) -> bool:
        """Whether all that learns is finite."""

    @abstractmethod
    def _teacher_logits(self, images: Tensor) -> Tensor:
        """The teacher's logits, within a step."""

    def begin_epoch(self, epoch: int) -> bool:
        """Freezes what does not learn in this epoch; whether the next step is slow, because its graph is new."""
        stage = self._freeze_schedule.stage_of(epoch) if self._freeze_schedule else 0
        if stage == self._traced_stage:
            return False
        if self._freeze_schedule:
            self._freeze_schedule.freeze(stage)
        self._train, self._traced_stage = self._trace(stage), stage
        return True

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Nothing is marked as frozen, as long as the network is written down for others."""
        if self._freeze_schedule and self._traced_stage is not None:
            for layer in (layer for layers in self._freeze_schedule.layer_groups.values() for layer in layers):
                layer.trainable = True
        try:
            yield
        finally:
            if self._freeze_schedule and self._traced_stage is not None:
                self._freeze_schedule.freeze(self._traced_stage)

    def _make_metrics(self, labels: tuple[int, int]) -> None:
        """Lets Keras make the metrics' variables, which `load` fills. Made in a trace they would take a second one."""
        empty = dict.fromkeys(self._output_names, ops.zeros(labels))
        truth = self._with_teacher_logits(empty, None)
        self.model.compute_loss(y=truth, y_pred=empty)
        self.model.compute_metrics(None, truth, empty, None)
        self.model.reset_metrics()

    def _with_teacher_logits(self, labels_by_output: dict[str, Tensor], images: Tensor | None) -> dict[str, Tensor]:
        """The labels by output, those of `main` with what a teacher says of the images behind them, or zeros."""
        if self._teacher is None:
            return labels_by_output
        labels = labels_by_output["main"]
        said = ops.zeros_like(labels) if images is None else ops.cast(self._teacher_logits(images), "float32")
        return {**labels_by_output, "main": ops.concatenate([labels, said], axis=-1)}

    def non_finite(self) -> tuple[str, int] | None:
        """What was not finite first, and in which step of the run; None as long as all is well."""
        first = {
            name: int(step)
            for name, step in zip(CHECKED_TENSORS, np.asarray(self._first_non_finite), strict=True)
            if step
        }
        if first:
            return min(first.items(), key=lambda item: item[1])
        if self._uses_loss_scaling and float(self.model.optimizer.dynamic_scale) < MIN_LOSS_SCALE:
            return f"the gradients (loss scale below {MIN_LOSS_SCALE:g})", int(self._step_count)
        if not self._weights_finite():  # an update may break what it is given whole: the next loss would tell
            return "the weights", int(self._step_count)
        return None

    def state(self) -> dict[str, np.ndarray]:
        """Copies of every state tensor by name, each once: the model's with its seeds, the optimizer's, the metrics'.

        The optimizer's have its averages, accumulated gradients and loss scale among them.
        """
        return {name: np.array(variable.value) for name, variable in self._variables().items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Puts back what `state` gave.

        Raises: ValueError naming the first tensor that is missing, unknown, or of another shape or type.
        """
        variables = self._variables()
        for name in sorted({*variables, *state}):
            has = _dtype_and_shape(variables[name]) if name in variables else "none"
            got = _dtype_and_shape(state[name]) if name in state else "none"
            if has != got:
                raise ValueError(f"{name} must be as the network and its optimizer have it ({has}), got {got}")
        for name, variable in variables.items():
            self._assign(variable, state[name])
        self._assign(self._first_non_finite, np.zeros(len(CHECKED_TENSORS), self.COUNTER_DTYPE))

    def _assign(self, variable: keras.Variable, value: np.ndarray) -> None:
        variable.assign(value)

    def _variables(self) -> dict[str, keras.Variable]:
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
        return found | {"count": self._step_count, "learning_rate_factor": self.schedule.scale}

    def metrics(self) -> dict[str, float]:
        """Means since the last `reset_metrics`: `total_loss`, which is minimised; `loss` and `accuracy` of the main
        head; `aux_loss` and `aux_accuracy` of the auxiliary head, or `aux_1_loss`, ... of several.

        Where gradients are measured also their norms in the last step, `gradient_norm/...`.
        """
        found = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        total_loss = found.pop("loss")
        # Keras leaves the output's name away where there is only one.
        own = {name: found.pop(f"main_{name}", found.get(name, total_loss)) for name in ("loss", "accuracy")}
        found = {**own, "total_loss": total_loss, **found}
        if self._uses_loss_scaling:
            found["loss_scale"] = float(self.model.optimizer.dynamic_scale)
            # The public counter is divided by the steps that are accumulated.
            found["skipped_steps"] = float(int(self._step_count) - int(self._optimizer._iterations))
        if self._gradient_norms is not None:
            norms = np.asarray(self._gradient_norms)
            found |= {f"gradient_norm/{name}": float(norm) for name, norm in zip(GRADIENT_NORMS, norms, strict=True)}
        return found

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def agreed_signal(self) -> int:
        """The largest of what the processes of the run noted (`notes`), the same in all after the same step."""
        return self.local_signal()

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.model.optimizer.learning_rate)

    def set_lr_scale(self, scale: float) -> None:
        """Multiplies all learning rates from now on by `factor`, in place of what was given before."""
        self._assign(self.schedule.scale, np.array(scale))

    def lr_scale(self) -> float:
        """What `slow_down` was given."""
        return float(self.schedule.scale)

    @contextmanager
    def using_ema_weights(self) -> Iterator[None]:
        """The averaged weights in the model's place, where the optimizer keeps some; put back by copy, to the bit."""
        if not self._optimizer.use_ema:
            yield
            return
        weights = self._trainable_variables
        kept = [np.array(weight.value) for weight in weights]
        for weight, average in zip(weights, self._optimizer._model_variables_moving_average, strict=True):
            self._assign(weight, np.array(average.value))
        try:
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                self._assign(weight, value)

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


def all_finite(tensors: list[Tensor]) -> Tensor:
    """A sum is finite only if all its parts are; summing reads a tensor once and writes nothing."""
    return ops.all(ops.stack([ops.isfinite(ops.sum(tensor)) for tensor in tensors if tensor is not None]))


def gradient_norms(gradients: list[Tensor], variables: list[keras.Variable]) -> Tensor:
    """float32 [2], Euclidean: of all gradients together, and of the first kernel's."""
    squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in gradients]
    first = next(number for number, variable in enumerate(variables) if variable.path.endswith("kernel"))
    return ops.sqrt(ops.stack([sum(squares), squares[first]]))


def _dtype_and_shape(value: Any) -> str:
    return f"{value.dtype.name if hasattr(value.dtype, 'name') else value.dtype} {tuple(value.shape)}"
