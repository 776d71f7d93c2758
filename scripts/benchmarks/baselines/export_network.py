"""Exports one of our networks as plain data for the baselines: its layers, weights and reference outputs.

    python scripts/benchmarks/baselines/export_network.py vgg16_inception 32 1 FOLDER  (model, side in pixels, channels)

network.json: the layers in topological order, each with its kind, settings and inputs; the outputs; parameters and
multiply-accumulates of the training network. values.npz: every tensor, `layer/name`. asked.npz: a few images and
their expected logits in float32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CLASSES = 10
ASKED = 32  # images: with fewer, batch statistics amplify rounding errors


def description(model: Any) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "kind": type(layer).__name__,
            "inputs": [tensor._keras_history.operation.name for tensor in inputs(layer)],
            "settings": {name: value for name, value in layer.get_config().items() if is_plain(value)},
        }
        for layer in model.layers
    ]
    outputs = {name: tensor._keras_history.operation.name for name, tensor in model.output.items()}
    return {"layers": layers, "outputs": outputs}


def inputs(layer: Any) -> list[Any]:
    import keras

    return [] if isinstance(layer, keras.layers.InputLayer) else keras.tree.flatten(layer.input)


def is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | list | tuple | None)


def calibrate_batch_norm(model: Any, images: Any) -> None:
    """Sets the batch-norm statistics to those of `images`: else all logits of an untrained network are close to 0."""
    import keras

    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(images, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def main() -> None:
    name, side, channels, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(ROOT))
    import keras
    import numpy as np

    from train import models
    from train.models.cost import total_cost

    keras.utils.set_random_seed(0)
    model = models.build(name, (side, side, channels), CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (ASKED, side, side, channels), dtype=np.uint8)
    calibrate_batch_norm(model, images)
    cost = total_cost(model)
    network = {**description(model), "parameters": cost.parameters, "macs": cost.macs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.json").write_text(json.dumps(network, indent=1))
    np.savez(
        folder / "values.npz", **{v.path.split("/", v.path.count("/") - 1)[-1]: v.numpy() for v in model.variables}
    )
    np.savez(folder / "asked.npz", images=images, **{k: v.numpy() for k, v in model(images, training=False).items()})


if __name__ == "__main__":
    main()
