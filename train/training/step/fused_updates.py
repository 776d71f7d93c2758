"""The optimizers on TensorFlow: the update of a weight in one kernel, which reads and writes everything once.

Keras's operations do so several times. Results equal Keras's up to the rounding of float32.
"""

from __future__ import annotations

import tensorflow as tf

from train.training.step.staged_optimizer import SGD, AdamW, RMSprop, StagedOptimizer


class FusedSGD(SGD):
    """Source: Sutskever et al. 2013, section 2."""

    def update_variable(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """With momentum, one kernel."""
        if not self.momentum:
            super().update_variable(gradient, variable, learning_rate)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=_handle(self.slot("momentum", variable)),
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=self.nesterov,
        )


class FusedAdamW(AdamW):
    """Source: Kingma & Ba 2015, algorithm 1."""

    def update_variable(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Without AMSGrad, one kernel."""
        if self.amsgrad:
            super().update_variable(gradient, variable, learning_rate)
            return
        step = tf.cast(self.iterations + 1, variable.dtype)
        beta_1 = tf.cast(self.beta_1, variable.dtype)
        beta_2 = tf.cast(self.beta_2, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=_handle(self.slot("momentum", variable)),
            v=_handle(self.slot("velocity", variable)),
            beta1_power=beta_1**step,
            beta2_power=beta_2**step,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.cast(self.epsilon, variable.dtype),
            grad=gradient,
        )


class FusedRMSprop(RMSprop):
    """Source: Szegedy et al. 2016, section 8."""

    def update_variable(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """With momentum, one kernel."""
        if self.centered or not self.momentum:
            super().update_variable(gradient, variable, learning_rate)
            return
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=_handle(self.slot("velocity", variable)),
            mom=_handle(self.slot("momentum", variable)),
            lr=tf.cast(learning_rate, variable.dtype),
            rho=tf.cast(self.rho, variable.dtype),
            momentum=tf.cast(self.momentum, variable.dtype),
            epsilon=tf.cast(self.epsilon, variable.dtype),
            grad=gradient,
        )


FUSED_OPTIMIZERS: dict[str, type[StagedOptimizer]] = {"sgd": FusedSGD, "adamw": FusedAdamW, "rmsprop": FusedRMSprop}


def _handle(variable: tf.Variable) -> tf.Tensor:
    """The resource of a Keras variable, which on TensorFlow has TensorFlow's interface, too."""
    return variable.handle
