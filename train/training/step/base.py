"""The backend-independent part of a training step: EMA, metrics, divergence checks, and how its state is named."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import numpy as np
from keras import ops

from train.training.schedules import ScaledSchedule
from train.training.step.layerwise_lr import FreezeSchedule
from train.training.step.staged_optimizer import EMA_SLOT, StagedOptimizer
from train.training.tensors import Tensor

CHECKED_TENSORS = ("loss", "gradients", "batch normalisation statistics")
GRADIENT_NORMS = ("all", "first_layer")
MIN_LOSS_SCALE = 1.0  # mixed_float16 starts at 32,768 and halves at every skipped step


class Step(ABC):
    """Trains a compiled model with dict outputs, one batch per call; losses, metrics and loss scaling are Keras's.

    Metrics accumulate on the device and are read by `metrics()`, so that the host need not wait for every step.
    """

    COUNTER_DTYPE: str  # of step counters

    def __init__(
        self, model: keras.Model, inference: keras.Model, schedule: ScaledSchedule, batch_size: int, jit: bool,
        *, float_images: bool, example_weights: bool, measure_gradients: bool,
        freeze_schedule: FreezeSchedule | None, teacher: keras.Model | None,
    ):  # fmt: skip
        """`model`: compiled with `train.training.optimizers.build_optimizer`. `inference`: shares its variables.

        `float_images`: images are float32, not uint8. `example_weights`: batches have a weight for each example.
        `measure_gradients`: adds gradient norms to the metrics. `freeze_schedule`: None to train all layers all the
        time. `teacher`: images -> logits, which are appended to the labels of `main` (losses.DistillationLoss).
        """
        self.model = model
        self.schedule = schedule
        self._freeze_schedule = freeze_schedule
        self._teacher = teacher
        self._output_names = tuple(model.output)
        self._uses_loss_scaling = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        # Under mixed_float16 Keras wraps the optimizer, and the averages belong to the one inside.
        self._optimizer: StagedOptimizer = (
            model.optimizer.inner_optimizer if self._uses_loss_scaling else model.optimizer
        )
        self._trainable_variables = model.trainable_variables  # all that are trained in some stage
        model.optimizer.build(self._trainable_variables)
        self._step_count = self._make_variable((), "count")  # of the whole run, including skipped steps
        self._first_non_finite = self._make_variable((len(CHECKED_TENSORS),), "first_bad")  # 0: none
        self._gradient_norms = (
            self._make_variable((len(GRADIENT_NORMS),), "norms", "float32") if measure_gradients else None
        )
        self._moving_statistics = [v for v in model.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        labels = (batch_size, model.output["main"].shape[-1])
        self._input_specs = [
            ((batch_size, *model.input_shape[1:]), "float32" if float_images else "uint8"),
            (labels, "float32"),
        ]
        self._input_specs += [((batch_size,), "float32")] if example_weights else []
        self._make_metrics(labels)
        self._loss_metric: keras.metrics.Metric = next(metric for metric in model.metrics if metric.name == "loss")
        self._jit = jit
        self.local_signal: Callable[[], int] = lambda: 0  # sent to all processes; 0: none
        self._traced_stage: int | None = None
        updated = [*self._trainable_variables, *self._optimizer.variables]
        self._updated_variables = [v for v in updated if keras.backend.is_float_dtype(v.dtype)]
        self.predict = self.make_predictor(inference, jit)  # logits of the main output, float32 [N, classes]
        self._set_up(inference)

    @abstractmethod
    def _set_up(self, inference: keras.Model) -> None:
        """Prepares what is of the backend alone."""

    def _make_variable(self, shape: tuple[int, ...], name: str, dtype: str = "") -> keras.Variable:
        return keras.Variable(np.zeros(shape), dtype=dtype or self.COUNTER_DTYPE, trainable=False, name=name)

    @staticmethod
    @abstractmethod
    def make_predictor(model: keras.Model, jit: bool) -> Callable[[Tensor], np.ndarray]:
        """A function from images uint8 [N, H, W, C] to the single output of `model` as an array."""

    @abstractmethod
    def __call__(self, images: Tensor, labels: Tensor, *weights: Tensor) -> None:
        """images: uint8 (or float32) [N, H, W, C] in 0..255; labels: float32 [N, classes], used for every output.

        weights: one float32 [N] with `example_weights`; they apply to the loss, not to the metrics.
        """

    @abstractmethod
    def _trace(self) -> Callable[..., Tensor]:
        """Traces the training step of the optimizer's stage, for batches of `_input_specs`."""

    @abstractmethod
    def _weights_finite(self) -> bool:
        """Whether weights and optimizer state are finite."""

    @abstractmethod
    def _teacher_logits(self, images: Tensor) -> Tensor:
        """The teacher's logits, computed inside a traced step."""

    def begin_epoch(self, epoch: int) -> bool:
        """Freezes the layers of this epoch's stage; returns whether the step was retraced, so that it is slow once."""
        stage = self._freeze_schedule.stage_of(epoch) if self._freeze_schedule else 0
        if stage == self._traced_stage:
            return False
        if self._freeze_schedule:
            self._freeze_schedule.freeze(stage)
            rates = self._freeze_schedule.rates(stage)
            self._optimizer.begin_stage([(v, rates[v.path]) for v in self.model.trainable_variables])
        self._train = self._trace()
        self._traced_stage = stage
        return True

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Marks all layers as trainable while the model is saved, so that no file contains the freezing of a stage."""
        if self._freeze_schedule and self._traced_stage is not None:
            for layer in (layer for layers in self._freeze_schedule.layer_groups.values() for layer in layers):
                layer.trainable = True
        try:
            yield
        finally:
            if self._freeze_schedule and self._traced_stage is not None:
                self._freeze_schedule.freeze(self._traced_stage)

    def _make_metrics(self, labels: tuple[int, int]) -> None:
        """Creates the metrics' variables, which `load` needs. Creating them in a trace would cost a second trace."""
        empty = dict.fromkeys(self._output_names, ops.zeros(labels))
        targets = self._with_teacher_logits(empty, None)
        self.model.compute_loss(y=targets, y_pred=empty)
        self.model.compute_metrics(None, targets, empty, None)
        self.model.reset_metrics()

    def _with_teacher_logits(self, labels_by_output: dict[str, Tensor], images: Tensor | None) -> dict[str, Tensor]:
        """Appends the teacher's logits to the labels of `main`, or zeros where there are no images."""
        if self._teacher is None:
            return labels_by_output
        labels = labels_by_output["main"]
        logits = ops.zeros_like(labels) if images is None else ops.cast(self._teacher_logits(images), "float32")
        return {**labels_by_output, "main": ops.concatenate([labels, logits], axis=-1)}

    def non_finite(self) -> tuple[str, int] | None:
        """The first tensor that was NaN or infinite, and the step of the run; None if all were finite."""
        first = {
            name: int(step)
            for name, step in zip(CHECKED_TENSORS, np.asarray(self._first_non_finite), strict=True)
            if step
        }
        if first:
            return min(first.items(), key=lambda item: item[1])
        if self._uses_loss_scaling and float(self.model.optimizer.dynamic_scale) < MIN_LOSS_SCALE:
            return f"gradients (loss scale below {MIN_LOSS_SCALE:g})", int(self._step_count)
        if not self._weights_finite():  # finite gradients may overflow them; the next loss would be too late
            return "weights", int(self._step_count)
        return None

    def state(self) -> dict[str, np.ndarray]:
        """Copies every state tensor once, by name: of the model, its seed generators, the optimizer and the metrics.

        The optimizer's state includes averaged weights, accumulated gradients and the loss scale.
        """
        return {name: np.array(variable.value) for name, variable in self._variables().items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Restores the tensors that `state` returned.

        Raises: ValueError naming the first tensor that is missing, unknown, or of another shape or type.
        """
        variables = self._variables()
        for name in sorted({*variables, *state}):
            expected = _dtype_and_shape(variables[name]) if name in variables else "none"
            got = _dtype_and_shape(state[name]) if name in state else "none"
            if expected != got:
                raise ValueError(f"{name} must match the model and its optimizer ({expected}), got {got}")
        for name, variable in variables.items():
            self._assign(variable, state[name])
        self._assign(self._first_non_finite, np.zeros(len(CHECKED_TENSORS), self.COUNTER_DTYPE))

    def _assign(self, variable: keras.Variable, value: np.ndarray) -> None:
        variable.assign(value)

    def _variables(self) -> dict[str, keras.Variable]:
        """All state variables by name; numbered within their kind, since Keras gives some metrics the same path."""
        kinds = {
            "model": self.model.variables,
            "optimizer": self.model.optimizer.variables,
            "metrics": self.model.metrics_variables,
        }
        numbered = {
            f"{kind}/{number:04d}/{variable.path}": variable
            for kind, variables in kinds.items()
            for number, variable in enumerate(variables)
        }
        return numbered | {"count": self._step_count, "learning_rate_factor": self.schedule.scale}

    def metrics(self) -> dict[str, float]:
        """Means since the last `reset_metrics`: `total_loss`, which is minimised; `loss` and `accuracy` of the main
        head; `aux_loss` and `aux_accuracy` of the auxiliary head, or `aux_1_loss`, ... of several.

        With `measure_gradients` also the norms of the last step, `gradient_norm/...`.
        """
        results = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        total_loss = results.pop("loss")
        # Keras omits the output's name where there is only one.
        main = {name: results.pop(f"main_{name}", results.get(name, total_loss)) for name in ("loss", "accuracy")}
        results = {**main, "total_loss": total_loss, **results}
        if self._uses_loss_scaling:
            results["loss_scale"] = float(self.model.optimizer.dynamic_scale)
            results["skipped_steps"] = float(int(self._step_count) - int(self._optimizer.step_count))
        if self._gradient_norms is not None:
            norms = np.asarray(self._gradient_norms)
            results |= {f"gradient_norm/{name}": float(norm) for name, norm in zip(GRADIENT_NORMS, norms, strict=True)}
        return results

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def agreed_signal(self) -> int:
        """The largest `local_signal` of all processes of the run; the same in all of them after the same step."""
        return self.local_signal()

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.model.optimizer.learning_rate)

    def set_lr_scale(self, scale: float) -> None:
        """Multiplies all learning rates from now on by `scale`, which replaces the previous scale."""
        self._assign(self.schedule.scale, np.array(scale))

    def lr_scale(self) -> float:
        """The current factor of all learning rates."""
        return float(self.schedule.scale)

    @contextmanager
    def using_ema_weights(self) -> Iterator[None]:
        """Swaps in the averaged weights, if the optimizer has any; restores the weights from a copy, to the bit."""
        if not self._optimizer.use_ema:
            yield
            return
        weights = self._trainable_variables
        copies = [np.array(weight.value) for weight in weights]
        for weight in weights:
            self._assign(weight, np.array(self._optimizer.slot(EMA_SLOT, weight).value))
        try:
            yield
        finally:
            for weight, copy in zip(weights, copies, strict=True):
                self._assign(weight, copy)

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 of path, dtype, shape and bytes of all model variables, sorted by path."""
    digest = hashlib.sha256()
    for variable in sorted(model.variables, key=lambda v: v.path):
        value = np.asarray(variable)
        digest.update(f"{variable.path} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all tensors are finite: a sum is finite only if its terms are, and takes one pass without writing."""
    return ops.all(ops.stack([ops.isfinite(ops.sum(tensor)) for tensor in tensors if tensor is not None]))


def gradient_norms(gradients: list[Tensor], variables: list[keras.Variable]) -> Tensor:
    """Euclidean norms of all gradients together and of the first kernel's gradient, float32 [2]."""
    squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in gradients]
    first_kernel = next(number for number, variable in enumerate(variables) if variable.path.endswith("kernel"))
    return ops.sqrt(ops.stack([sum(squares), squares[first_kernel]]))


def _dtype_and_shape(value: keras.Variable | np.ndarray) -> str:
    return f"{value.dtype.name if hasattr(value.dtype, 'name') else value.dtype} {tuple(value.shape)}"
