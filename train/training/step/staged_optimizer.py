"""Keras's optimizers with fine-tuning stages: layer-wise learning rates, and weight decay at these rates.

They override public methods of Keras alone; names, order and values of their variables stay Keras's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import keras
from keras import ops

from train.training.step.layerwise_lr import LayerRate
from train.training.tensors import Tensor

NO_DECAY = ("bias", "beta", "gamma")
EMA_SLOT = "average"  # Keras's name


@dataclass
class OptimizerState:
    """What an optimizer here remembers; an object, since Keras adds every variable in an attribute to its own.

    rates: the variables that are trained in this stage, in their order, by identity. decayed: identities. slots: by
    name and identity. traced_values: see `StagedOptimizer.reading`.
    """

    rates: dict[int, tuple[keras.Variable, LayerRate]] = field(default_factory=dict)
    decayed: set[int] = field(default_factory=set)
    slots: dict[tuple[str, int], keras.Variable] = field(default_factory=dict)
    traced_values: Sequence[tuple[keras.Variable, Tensor]] = ()


class StagedOptimizer(keras.optimizers.Optimizer):
    """To be inherited before one of Keras's optimizers, whose `update_step` computes the update.

    Weight decay is decoupled (Loshchilov & Hutter 2019) and spares biases and batch normalisation.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, **options: object):
        super().__init__(schedule, **options)
        self.exclude_from_weight_decay(var_names=[""])  # every variable: `update_step` does it, at the variable's rate
        self.state = OptimizerState()

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates Keras's variables; all `variables` are trained until a stage begins."""
        super().build(variables)
        self.state.decayed = {
            identity(variable) for variable in variables if not any(part in variable.name for part in NO_DECAY)
        }
        self.begin_stage([(variable, LayerRate()) for variable in variables])

    def begin_stage(self, rates: list[tuple[keras.Variable, LayerRate]]) -> None:
        """From now on these variables are trained, and no others, at these rates. Steps traced before are not changed.

        Source of the rates: Howard & Ruder 2018 (Universal Language Model Fine-tuning), section 3.2.
        """
        self.state.rates = {identity(variable): (variable, rate) for variable, rate in rates}

    def add_optimizer_variables(
        self, trainable_variables: list[keras.Variable], name: str | list[str], initializer: object = "zeros"
    ) -> list[keras.Variable] | tuple[list[keras.Variable], ...]:
        """Keras's, and remembers the new variables by name for `slot`."""
        created = super().add_optimizer_variables(trainable_variables, name, initializer)
        named = [(name, created)] if isinstance(name, str) else zip(name, created, strict=True)
        for slot, variables in named:
            owners = map(identity, trainable_variables)
            self.state.slots |= {(slot, owner): variable for owner, variable in zip(owners, variables, strict=True)}
        return created

    def slot(self, name: str, variable: keras.Variable) -> keras.Variable:
        """The optimizer's variable of this name, e.g. `momentum`, that belongs to a variable of the model."""
        return self.state.slots[name, identity(variable)]

    @property
    def step_count(self) -> keras.Variable:
        """The number of steps; `iterations` counts updates, which accumulated gradients make only every n-th step."""
        return next(variable for variable in self.variables if variable.name == "iteration")

    def update_step(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        """Decays and updates a variable at its own rate. Keras calls it, on TensorFlow with TensorFlow's variable."""
        _, rate = self.state.rates[identity(variable)]
        if self.weight_decay and identity(variable) in self.state.decayed:
            # With a rate of its own, as in Keras: TensorFlow rounds the product in another way if others use the rate.
            decay = variable * ops.cast(self.weight_decay, variable.dtype)
            self.assign_sub(variable, decay * ops.cast(rate.scale(self.learning_rate), variable.dtype))
        learning_rate = rate.scale(learning_rate)
        if rate.first_update:
            learning_rate = learning_rate * self.late_start_correction(rate.first_update)
        self.update_variable(gradient, variable, learning_rate)

    def update_variable(self, gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        """The update without weight decay; Keras's, unless a subclass has a faster one."""
        super().update_step(gradient, variable, learning_rate)

    def late_start_correction(self, first_update: int) -> Tensor:  # noqa: ARG002 - used by subclasses
        """The factor of the learning rate of a variable that is not trained before the update of this number."""
        return 1.0

    @contextmanager
    def reading(self, values: Sequence[tuple[keras.Variable, Tensor]]) -> Iterator[None]:
        """Inside the block `stateless_apply` reads these variables, which it does not update, as these values.

        Without it, a compiled step would contain their present values as constants.
        """
        self.state.traced_values = values
        try:
            yield
        finally:
            self.state.traced_values = ()

    def stateless_apply(
        self, optimizer_variables: list[Tensor], grads: list[Tensor], trainable_variables: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As Keras's, but gradients and variables are those of the stage, not all that the optimizer was built with."""
        trained = [variable for variable, _ in self.state.rates.values()]
        mapping = [
            *zip(trained, trainable_variables, strict=True),
            *zip(self.variables, optimizer_variables, strict=True),
            *self.state.traced_values,
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.apply(grads, trained)
        new_weights = [scope.get_current_value(variable) for variable in trained]
        return new_weights, [scope.get_current_value(variable) for variable in self.variables]


class SGD(StagedOptimizer, keras.optimizers.SGD):
    """SGD with momentum. Source: Sutskever et al. 2013 for Nesterov's momentum."""


class AdamW(StagedOptimizer, keras.optimizers.AdamW):
    """AdamW. Source: Loshchilov & Hutter 2019."""

    def late_start_correction(self, first_update: int) -> Tensor:
        """The ratio of the bias correction for moments that start at `first_update` to the one that Keras applies.

        Source: Kingma & Ba 2015, section 3.
        """
        updates = ops.cast(self.iterations + 1, "float32")
        return self._bias_correction(updates - first_update) / self._bias_correction(updates)

    def _bias_correction(self, updates: Tensor) -> Tensor:
        return ops.sqrt(1 - self.beta_2**updates) / (1 - self.beta_1**updates)


class RMSprop(StagedOptimizer, keras.optimizers.RMSprop):
    """RMSprop. Source: Szegedy et al. 2016, section 8."""


def identity(variable: Tensor) -> int:
    """The same for a variable of Keras and the variable of TensorFlow inside, which Keras passes to `update_step`."""
    is_wrapped = keras.backend.backend() == "tensorflow" and isinstance(variable, keras.Variable)
    return id(variable.value if is_wrapped else variable)
