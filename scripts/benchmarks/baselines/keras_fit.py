"""Baseline: Keras's own `fit` on arrays in memory, as in its documentation. Prints one line of JSON.

    KERAS_BACKEND=tensorflow python .../keras_fit.py FOLDER vgg16_inception 64 mixed_bfloat16 40

FOLDER is the output of export_network.py, followed by model, batch size, precision and steps. A last argument `start`
skips the parity check, so that the time to the first step is that of an ordinary script.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from protocol import AUX_WEIGHT, LEARNING_RATE, MOMENTUM, check_parity, print_results

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parents[3]


def parity(model: Any, folder: Path) -> float:
    """Returns the largest difference in the logits. Raises: AssertionError if the number of parameters differs."""
    import numpy as np

    network = json.loads((folder / "network.json").read_text())
    values = np.load(folder / "values.npz")
    assert model.count_params() == network["parameters"], f"{model.count_params()} parameters"
    for variable in model.variables:
        variable.assign(values["/".join(variable.path.split("/")[-2:])])
    expected = np.load(folder / "asked.npz")
    logits = model(expected["images"], training=False)
    return max(float(np.abs(np.asarray(logits[name], "float32") - expected[name]).max()) for name in logits)


def main() -> None:
    folder, name, batch, precision, steps = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:6]
    sys.path.insert(0, str(ROOT))
    import keras
    import numpy as np

    from train import models

    expected = np.load(folder / "asked.npz")
    shape = expected["images"].shape[1:]
    classes = expected["main"].shape[-1]
    worst = None
    if "start" not in sys.argv:  # the check would count as part of the start
        worst = parity(models.build(name, shape, classes), folder)
        check_parity(worst)
    keras.utils.clear_session()
    keras.config.set_dtype_policy(precision)
    model = models.build(name, shape, classes)
    outputs = tuple(model.output)
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM, nesterov=True),
        dict.fromkeys(outputs, keras.losses.CategoricalCrossentropy(from_logits=True)),
        loss_weights={output: 1.0 if output == "main" else AUX_WEIGHT for output in outputs},
        metrics={output: ["accuracy"] for output in outputs},
    )
    count = int(batch) * int(steps)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = np.eye(classes, dtype=np.float32)[draw.integers(0, classes, count)]

    step_ends: list[float] = []

    class StepTimer(keras.callbacks.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            step_ends.append(time.time())

    start = float(os.environ.get("BENCH_BEGUN", time.time()))
    model.fit(images, dict.fromkeys(outputs, labels), batch_size=int(batch), verbose=0, callbacks=[StepTimer()])
    print_results(int(batch), step_ends, start=start, worst=worst)


if __name__ == "__main__":
    main()
