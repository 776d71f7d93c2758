"""Keras's own `train_step` inside a `jax.jit`.

On several devices, of one process or more, every batch is spread over them and all else is on each: XLA computes what
one device would, the statistics of batch normalisation too, and adds up gradients across devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.runtime.jax import mesh
from train.training.step import base
from train.training.step.layerwise_lr import layerwise_lr

Arrays = list[jax.Array]

SIGNAL_DELAY_STEPS = 2  # steps that may be under way on the devices when the host looks at what came of one


class Step(base.Step):
    """See the base; a step is a function from state to state, and Keras's variables hold the state between two."""

    COUNTER_DTYPE = "int32"  # of 64 bits JAX has none unless all numbers may be

    def __init__(self, model: keras.Model, inference: keras.Model, *args: Any, **kwargs: Any):
        super().__init__(model, inference, *args, **kwargs)
        self._all_finite = jax.jit(base.all_finite)
        self._monitor_variables = [
            self._step_count,
            self._first_non_finite,
            *([] if self._gradient_norms is None else [self._gradient_norms]),
        ]
        teacher = self._teacher
        self._teacher_variables = [*teacher.trainable_variables, *teacher.non_trainable_variables] if teacher else []
        self._mesh = mesh()
        if self._mesh:
            self._replicated = NamedSharding(self._mesh, PartitionSpec())
            self._batch_sharded = NamedSharding(self._mesh, PartitionSpec("batch"))
            self._local_device_count = len(self._mesh.local_devices)
            self._agreed_signals: deque[jax.Array] = deque(maxlen=SIGNAL_DELAY_STEPS + 1)
            self._replicate([*self._variables().values(), *self._monitor_variables, *self._teacher_variables])
            self.predict = self._make_distributed_predictor(inference, self._mesh)

    def _replicate(self, variables: list[keras.Variable]) -> None:
        """On every device."""
        for variable in variables:
            self._assign(variable, np.asarray(variable.value))

    def _assign(self, variable: keras.Variable, value: np.ndarray) -> None:
        if self._mesh is None:
            variable.assign(value)
        else:  # Keras would put it on one device
            value = np.asarray(value, variable.dtype)
            variable._value = jax.make_array_from_process_local_data(self._replicated, value, value.shape)

    def reset_metrics(self) -> None:
        super().reset_metrics()
        if self._mesh:
            self._replicate(self.model.metrics_variables)

    def agreed_signal(self) -> int:
        if self._mesh is None:
            return super().agreed_signal()
        return int(self._agreed_signals[0]) if len(self._agreed_signals) > SIGNAL_DELAY_STEPS else 0

    def _global_batch(self, local: np.ndarray) -> jax.Array:
        """Of what is spread over all devices, from the part that this process has."""
        return jax.make_array_from_process_local_data(self._batch_sharded, local)

    def _signal_per_device(self) -> jax.Array:
        """What all are to hear, once for each device."""
        return self._global_batch(np.full(self._local_device_count, self.local_signal(), "int32"))

    def _make_distributed_predictor(self, model: keras.Model, device_mesh: Mesh) -> Callable[[Any], np.ndarray]:
        """This process's images uint8 [n, H, W, C] of a batch -> the single output for those of all processes.

        Fewer than its share are filled up, and so is what comes of them.
        """
        (batch, *shape), dtype = self._input_specs[0][0], "uint8"
        share = batch // device_mesh.size * len(device_mesh.local_devices)

        def answer(learned: Arrays, others: Arrays, images: jax.Array, noted: jax.Array) -> tuple[jax.Array, jax.Array]:
            return model.stateless_call(learned, others, images, training=False)[0], jnp.max(noted)

        run = jax.jit(answer, out_shardings=self._replicated)

        def predict(images: Any) -> np.ndarray:
            filled = np.zeros((share, *shape), dtype)
            filled[: len(images)] = images
            held = variable_values(model.trainable_variables), variable_values(model.non_trainable_variables)
            found, said = run(*held, self._global_batch(filled), self._signal_per_device())
            self._agreed_signals.append(said)
            return np.array(found)

        return predict

    @staticmethod
    def make_predictor(model: keras.Model, jit: bool) -> Callable[[Any], np.ndarray]:  # noqa: ARG004 - always compiled
        run = jax.jit(lambda *given: model.stateless_call(*given, training=False)[0])
        largest = 0

        def predict(images: Any) -> np.ndarray:
            nonlocal largest
            images = np.asarray(images)
            largest, missing = max(largest, len(images)), max(0, largest - len(images))
            # The last batch of a split is filled up, so that nothing is compiled for its size.
            filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
            held = variable_values(model.trainable_variables), variable_values(model.non_trainable_variables)
            return np.array(run(*held, filled))[: len(images)]

        return predict

    def __call__(self, images: Any, labels: Any, *weights: Any) -> None:
        if self._traced_stage is None:
            self.begin_epoch(0)
        state, watch = (
            [variable_values(kind) for kind in self._state_variables()],
            variable_values(self._monitor_variables),
        )
        batch, held = (
            [np.asarray(given) for given in (images, labels, *weights)],
            [self.schedule.scale, *self._teacher_variables],
        )
        if self._mesh is None:
            found = self._train(state, watch, variable_values(held), *batch)
        else:
            *found, said = self._train(
                state, watch, variable_values(held), *map(self._global_batch, batch), noted=self._signal_per_device()
            )
            self._agreed_signals.append(said)
        for kind, new in zip((*self._state_variables(), self._monitor_variables), (*found[0], found[1]), strict=True):
            for variable, value in zip(kind, new, strict=True):
                variable._value = value  # `assign` would look at each of them anew, which takes as long as a small step

    def _state_variables(self) -> tuple[list[keras.Variable], ...]:
        """As Keras's `train_step` wants them."""
        model = self.model
        own = model.trainable_variables, model.non_trainable_variables
        return (*own, model.optimizer.variables, model.metrics_variables)

    def _trace(self, stage: int) -> Callable:
        if self._mesh is None:
            step = jax.jit(self._checked_step, donate_argnums=(0, 1))
        else:
            step = jax.jit(self._step_with_signal, donate_argnums=(0, 1), out_shardings=self._replicated)

        def train(*given: Any, **noted: Any) -> Any:
            with layerwise_lr(
                self._optimizer, self._freeze_schedule, stage
            ):  # matters when it is compiled, at the first call
                return step(*given, **noted)

        return train

    def _step_with_signal(self, *args: Any, noted: jax.Array) -> tuple[tuple[Arrays, ...], Arrays, jax.Array]:
        """The step, and the largest of what the processes noted."""
        return *self._checked_step(*args), jnp.max(noted)

    def _checked_step(
        self,
        state: list[Arrays],
        monitors: Arrays,
        extra_inputs: Arrays,
        images: jax.Array,
        labels: jax.Array,
        *weights: jax.Array,
    ) -> tuple[tuple[Arrays, ...], Arrays]:
        """Keras's own step, and beside it which step was the first with something not finite."""
        count, first_bad = monitors[0] + 1, monitors[1]
        factor, *self._teacher_values = extra_inputs  # for `_teach`, which the base calls
        optimizer = self.model.optimizer
        scale = _value_of(optimizer.dynamic_scale, optimizer.variables, state[2]) if self._uses_loss_scaling else 1.0
        truth, *weighing = (dict.fromkeys(self._output_names, given) for given in (labels, *weights))
        truth = self._with_teacher_logits(truth, images)
        with self._capture_gradients(factor, state[1]) as gradients:
            found, new = self.model.train_step(state, (images, truth, *weighing))
        everything = [*self.model.trainable_variables, *self.model.non_trainable_variables]
        moving = [_value_of(variable, everything, [*new[0], *new[1]]) for variable in self._moving_statistics]
        finite = [
            base.all_finite([found["loss"]]),  # the mean so far: one bad loss makes it bad
            # Of scaled gradients some are infinite by design: the step is skipped and the scale halved.
            jnp.array(True) if self._uses_loss_scaling else base.all_finite(gradients),
            base.all_finite(moving) if moving else jnp.array(True),
        ]
        fresh = jnp.logical_and(jnp.logical_not(jnp.stack(finite)), first_bad == 0)
        monitors = [count, jnp.where(fresh, count, first_bad)]
        if self._gradient_norms is not None:
            monitors.append(base.gradient_norms(gradients, self.model.trainable_variables) / scale)
        return new, monitors

    @contextmanager
    def _capture_gradients(self, lr_scale: jax.Array, non_trainable_values: Arrays) -> Iterator[Arrays]:
        """Collects the gradients of a step that is traced, and lets the optimizer move only what learns now.

        Keras's own `stateless_apply` moves everything that the optimizer was built with, and takes the learning rate's
        factor for a constant.
        """
        seen: Arrays = []
        model, inner, outer = self.model, self._optimizer, self.model.optimizer
        learning, rest = model.trainable_variables, model.non_trainable_variables

        def apply(optimizer_values: Arrays, gradients: Arrays, weights: Arrays) -> tuple[Arrays, Arrays]:
            known = [(learning, weights), (rest, non_trainable_values), (inner.variables, optimizer_values)]
            mapping = [pair for variables, found in known for pair in zip(variables, found, strict=True)]
            with keras.StatelessScope(state_mapping=[*mapping, (self.schedule.scale, lr_scale)]) as scope:
                inner.apply(gradients, learning)
            moved = ([scope.get_current_value(v) for v in variables] for variables in (learning, inner.variables))
            return next(moved), next(moved)

        own = outer.stateless_apply if self._uses_loss_scaling else apply

        def watch(optimizer_values: Arrays, gradients: Arrays, weights: Arrays) -> tuple[Arrays, Arrays]:
            seen.extend(gradients)
            return own(optimizer_values, gradients, weights)

        inner.stateless_apply = apply
        outer.stateless_apply = watch
        try:
            yield seen
        finally:
            for one in {id(each): each for each in (inner, outer)}.values():
                del one.stateless_apply

    def _teacher_logits(self, images: jax.Array) -> jax.Array:
        teacher = self._teacher
        learned = len(teacher.trainable_variables)
        by_kind = self._teacher_values
        return teacher.stateless_call(by_kind[:learned], by_kind[learned:], images, training=False)[0]

    def _weights_finite(self) -> bool:
        found = variable_values(self._updated_variables)
        # Every process has a copy of its own to look at, and need not wait for the others.
        return bool(self._all_finite([value.addressable_data(0) for value in found] if self._mesh else found))


def variable_values(variables: list[keras.Variable]) -> Arrays:
    return [variable.value for variable in variables]


def _value_of(variable: keras.Variable, variables: list[keras.Variable], values: Arrays) -> jax.Array:
    """The value of one of the variables."""
    return next(value for one, value in zip(variables, values, strict=True) if one is variable)
