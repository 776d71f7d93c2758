"""The training loss: `main` plus `aux_weight` times each auxiliary loss, and the metrics beside it."""

from __future__ import annotations

from collections.abc import Sequence

import keras


def build(outputs: Sequence[str], aux_weight: float, label_smoothing: float) -> tuple[dict, dict]:
    """Losses and their weights by output name.

    Source: Szegedy et al. 2015, section 5 (auxiliary losses weighted 0.3); label smoothing: Szegedy et al. 2016,
    section 7. Every loss takes dense labels float32 [N, classes] and logits float32 [N, classes].

    Raises: ValueError if there is no output `main`.
    """
    if "main" not in outputs:
        raise ValueError(f"outputs must contain main, got {', '.join(outputs)}; use the names that models.build gives")
    losses = {
        name: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing, name=name)
        for name in outputs
    }
    weights = {name: 1.0 if name == "main" else aux_weight for name in outputs}
    return losses, weights


def metrics(outputs: Sequence[str]) -> dict[str, list[keras.metrics.Metric]]:
    """Top-1 accuracy of every output, `<output>_accuracy`."""
    return {name: [keras.metrics.CategoricalAccuracy(name="accuracy")] for name in outputs}
