"""The training loss, `main` plus `aux_weight` times each auxiliary loss, and the training metrics.

With a teacher the labels of `main` are [N, 2 x classes]: the true labels, followed by the teacher's logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import ops

from train.training.tensors import Tensor


def build_losses(
    outputs: Sequence[str], aux_weight: float, label_smoothing: float, distillation: tuple[float, float] | None = None
) -> tuple[dict[str, keras.losses.Loss], dict[str, float]]:
    """Builds the losses and their weights, by output name.

    Source: Szegedy et al. 2015, section 5 (auxiliary losses weighted 0.3); label smoothing: Szegedy et al. 2016,
    section 7. Every loss takes dense labels float32 [N, classes] and logits float32 [N, classes].

    distillation: with a teacher, weight and temperature of DistillationLoss.

    Raises: ValueError if there is no output `main`.
    """
    if "main" not in outputs:
        raise ValueError(f"outputs must contain main, got {', '.join(outputs)}; use the names that models.build gives")
    losses: dict[str, keras.losses.Loss] = {
        name: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing, name=name)
        for name in outputs
    }
    if distillation is not None:
        losses["main"] = DistillationLoss(losses["main"], *distillation)
    weights = {name: 1.0 if name == "main" else aux_weight for name in outputs}
    return losses, weights


class DistillationLoss(keras.losses.Loss):
    """`(1 - weight)` times the label loss plus `weight` times the divergence from a teacher, at `temperature`.

    Source: Hinton et al. 2015 (Distilling the Knowledge in a Neural Network), section 2, with its factor of the
    temperature squared, which keeps gradients as large as those of the labels.
    """

    def __init__(self, label_loss: keras.losses.Loss, weight: float, temperature: float):
        super().__init__(name="taught")
        self.label_loss, self.weight, self.temperature = label_loss, weight, temperature

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """y_true: float32 [N, 2 x classes]. y_pred: logits [N, classes]. Returns [N]."""
        labels, teacher = ops.split(y_true, 2, axis=-1)
        target = ops.log_softmax(teacher / self.temperature)
        divergence = ops.sum(ops.exp(target) * (target - ops.log_softmax(y_pred / self.temperature)), axis=-1)
        return (1 - self.weight) * self.label_loss.call(labels, y_pred) + self.weight * self.temperature**2 * divergence


class DistillationAccuracy(keras.metrics.CategoricalAccuracy):
    """Top-1 accuracy for labels that are followed by the teacher's logits."""

    # Keras overrides the method in the same way, without annotations.
    def update_state(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        labels, _ = ops.split(y_true, 2, axis=-1)
        return super().update_state(labels, y_pred, sample_weight)


def build_metrics(outputs: Sequence[str], *, distilled: bool = False) -> dict[str, list[keras.metrics.Metric]]:
    """Top-1 accuracy of every output, `<output>_accuracy`."""
    kinds = {
        name: DistillationAccuracy if distilled and name == "main" else keras.metrics.CategoricalAccuracy
        for name in outputs
    }
    return {name: [kind(name="accuracy")] for name, kind in kinds.items()}
