"""The training step on JAX, a function without side effects inside a `jax.jit`.

On several devices, of one process or more, batches are sharded and all state is replicated: XLA computes what one
device would, including the batch normalisation statistics, and sums gradients across devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.runtime.jax import mesh
from train.training.step import base
from train.training.tensors import Tensor

Arrays = list[jax.Array]
ArraysByName = dict[str, jax.Array]  # by output, or metrics by name
State = list[Arrays]  # the four kinds of `Step._state_variables`

SIGNAL_DELAY_STEPS = 2  # steps that may still run on the devices when the host reads the signal of an earlier one


class Step(base.Step):
    """See the base class. A step is a pure function of the state, which Keras's variables hold between two steps."""

    COUNTER_DTYPE = "int32"  # JAX has 64-bit types only if they are enabled for all arrays

    def _set_up(self, inference: keras.Model) -> None:
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
        """Copies variables to every device."""
        for variable in variables:
            self._assign(variable, np.asarray(variable.value))

    def _assign(self, variable: keras.Variable, value: np.ndarray) -> None:
        if self._mesh is None:
            variable.assign(value)
        else:  # Keras would put it on one device
            value = np.asarray(value, variable.dtype)
            variable.assign(jax.make_array_from_process_local_data(self._replicated, value, value.shape))

    def reset_metrics(self) -> None:
        super().reset_metrics()
        if self._mesh:
            self._replicate(self.model.metrics_variables)

    def agreed_signal(self) -> int:
        if self._mesh is None:
            return super().agreed_signal()
        return int(self._agreed_signals[0]) if len(self._agreed_signals) > SIGNAL_DELAY_STEPS else 0

    def _global_batch(self, local: np.ndarray) -> jax.Array:
        """The array sharded over all devices, from this process's share of it."""
        return jax.make_array_from_process_local_data(self._batch_sharded, local)

    def _signal_per_device(self) -> jax.Array:
        """This process's signal, once for each of its devices."""
        return self._global_batch(np.full(self._local_device_count, self.local_signal(), "int32"))

    def _make_distributed_predictor(self, model: keras.Model, device_mesh: Mesh) -> Callable[[Tensor], np.ndarray]:
        """A function from this process's images uint8 [n, H, W, C] of a batch to the output for all processes' images.

        Fewer images than its share are padded, and so is the output.
        """
        batch_size, *image_shape = self._input_specs[0][0]
        local_batch_size = batch_size // device_mesh.size * len(device_mesh.local_devices)

        def forward(
            trainable: Arrays, non_trainable: Arrays, images: jax.Array, signals: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return model.stateless_call(trainable, non_trainable, images, training=False)[0], jnp.max(signals)

        run = jax.jit(forward, out_shardings=self._replicated)

        def predict(images: Tensor) -> np.ndarray:
            padded = np.zeros((local_batch_size, *image_shape), "uint8")
            padded[: len(images)] = images
            weights = variable_values(model.trainable_variables), variable_values(model.non_trainable_variables)
            outputs, signal = run(*weights, self._global_batch(padded), self._signal_per_device())
            self._agreed_signals.append(signal)
            return np.array(outputs)

        return predict

    @staticmethod
    def make_predictor(model: keras.Model, jit: bool) -> Callable[[Tensor], np.ndarray]:  # noqa: ARG004 - always compiled
        run = jax.jit(lambda *arguments: model.stateless_call(*arguments, training=False)[0])
        largest = 0

        def predict(images: Tensor) -> np.ndarray:
            nonlocal largest
            images = np.asarray(images)
            missing = max(0, largest - len(images))
            largest = max(largest, len(images))
            # The last batch of a split is padded, so that nothing is compiled for its size.
            padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
            weights = variable_values(model.trainable_variables), variable_values(model.non_trainable_variables)
            return np.array(run(*weights, padded))[: len(images)]

        return predict

    def __call__(self, images: Tensor, labels: Tensor, *weights: Tensor) -> None:
        if self._traced_stage is None:
            self.begin_epoch(0)
        state = [variable_values(variables) for variables in self._state_variables()]
        monitors = variable_values(self._monitor_variables)
        extra_inputs = variable_values([self.schedule.scale, *self._teacher_variables])
        batch = [np.asarray(array) for array in (images, labels, *weights)]
        if self._mesh is None:
            new_state, new_monitors = self._train(state, monitors, extra_inputs, *batch)
        else:
            new_state, new_monitors, signal = self._train(
                state, monitors, extra_inputs, *map(self._global_batch, batch), signals=self._signal_per_device()
            )
            self._agreed_signals.append(signal)
        kinds = (*self._state_variables(), self._monitor_variables)
        for variables, values in zip(kinds, (*new_state, new_monitors), strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable._value = value  # `assign` would check each value, which takes as long as a small step

    def _state_variables(self) -> tuple[list[keras.Variable], ...]:
        """The four kinds of variables, in the order of Keras's `train_step`."""
        model = self.model
        return (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )

    def _trace(self) -> Callable[..., Tensor]:
        if self._mesh is None:
            return jax.jit(self._checked_step, donate_argnums=(0, 1))
        return jax.jit(self._step_with_signal, donate_argnums=(0, 1), out_shardings=self._replicated)

    def _step_with_signal(self, *args: Tensor, signals: jax.Array) -> tuple[State, Arrays, jax.Array]:
        """The step, and the largest signal of all processes."""
        return *self._checked_step(*args), jnp.max(signals)

    def _checked_step(
        self,
        state: State,
        monitors: Arrays,
        extra_inputs: Arrays,
        images: jax.Array,
        labels: jax.Array,
        *weights: jax.Array,
    ) -> tuple[State, Arrays]:
        """The step; the monitors also record the first step with a non-finite tensor of each kind."""
        count = monitors[0] + 1
        first_non_finite = monitors[1]
        lr_scale, *self._teacher_values = extra_inputs  # the values are for `_teacher_logits`
        optimizer = self.model.optimizer
        loss_scale = 1.0
        if self._uses_loss_scaling:
            loss_scale = _value_of(optimizer.dynamic_scale, optimizer.variables, state[2])
        targets, *example_weights = (dict.fromkeys(self._output_names, array) for array in (labels, *weights))
        targets = self._with_teacher_logits(targets, images)
        results, gradients, new_state = self._update(state, lr_scale, images, targets, *example_weights)
        model_variables = [*self.model.trainable_variables, *self.model.non_trainable_variables]
        model_values = [*new_state[0], *new_state[1]]
        statistics = [_value_of(variable, model_variables, model_values) for variable in self._moving_statistics]
        finite = [
            base.all_finite([results["loss"]]),  # a mean over steps: it stays non-finite once one loss was
            # Scaled gradients may overflow by design: the step is then skipped and the scale halved.
            jnp.array(True) if self._uses_loss_scaling else base.all_finite(gradients),
            base.all_finite(statistics) if statistics else jnp.array(True),
        ]
        is_first = jnp.logical_and(jnp.logical_not(jnp.stack(finite)), first_non_finite == 0)
        monitors = [count, jnp.where(is_first, count, first_non_finite)]
        if self._gradient_norms is not None:
            monitors.append(base.gradient_norms(gradients, self.model.trainable_variables) / loss_scale)
        return new_state, monitors

    def _update(
        self,
        state: State,
        lr_scale: jax.Array,
        images: jax.Array,
        targets: ArraysByName,
        example_weights: ArraysByName | None = None,
    ) -> tuple[ArraysByName, Arrays, State]:
        """The operations of Keras's `train_step` in its order; returns metrics, gradients, and the new state."""
        trainable, non_trainable, optimizer_values, metrics = state
        loss_and_gradients = jax.value_and_grad(self.model.compute_loss_and_updates, has_aux=True)
        (_, (loss, outputs, new_non_trainable, metrics)), gradients = loss_and_gradients(
            trainable, non_trainable, metrics, images, targets, example_weights,
            training=True, optimizer_variables=optimizer_values,
        )  # fmt: skip
        frozen = zip(self.model.non_trainable_variables, non_trainable, strict=True)  # averages are of all weights
        with self._optimizer.reading([(self.schedule.scale, lr_scale), *frozen]):
            trainable, optimizer_values = self.model.optimizer.stateless_apply(optimizer_values, gradients, trainable)
        metric_variables = self.model.metrics_variables
        with keras.StatelessScope(state_mapping=zip(metric_variables, metrics, strict=True)) as scope:
            self._loss_metric.update_state(loss, sample_weight=images.shape[0])
            results = self.model.compute_metrics(images, targets, outputs, example_weights)
        metrics = [scope.get_current_value(variable) for variable in metric_variables]
        return results, gradients, [trainable, new_non_trainable, optimizer_values, metrics]

    def _teacher_logits(self, images: jax.Array) -> jax.Array:
        teacher = self._teacher
        assert teacher is not None
        values = self._teacher_values
        trainable_count = len(teacher.trainable_variables)
        return teacher.stateless_call(values[:trainable_count], values[trainable_count:], images, training=False)[0]

    def _weights_finite(self) -> bool:
        values = variable_values(self._updated_variables)
        if self._mesh:  # every process checks its own copy, and need not wait for the others
            values = [value.addressable_data(0) for value in values]
        return bool(self._all_finite(values))


def variable_values(variables: list[keras.Variable]) -> Arrays:
    return [variable.value for variable in variables]


def _value_of(variable: keras.Variable, variables: list[keras.Variable], values: Arrays) -> jax.Array:
    """The value that belongs to `variable`, one of `variables`."""
    return next(value for candidate, value in zip(variables, values, strict=True) if candidate is variable)
