"""Keras's own `fit` on arrays in memory, as its documentation shows it. Prints one line of JSON.

    KERAS_BACKEND=tensorflow python .../keras_fit.py FOLDER vgg16_inception 64 mixed_bfloat16 40

FOLDER is what export_network.py wrote; then the model, the batch, the precision and the steps. A last word `start`
leaves out what a person's own script would not do, so that the time to the first step is that of such a script.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from protocol import AUX_WEIGHT, LEARNING_RATE, MOMENTUM, agree, tell

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parents[3]


def parity(model: Any, folder: Path) -> float:
    """The largest difference in the logits. Raises: AssertionError where this is not the network that was given."""
    import numpy as np

    given, values = json.loads((folder / "network.json").read_text()), np.load(folder / "values.npz")
    assert model.count_params() == given["parameters"], f"{model.count_params()} parameters"
    for variable in model.variables:
        variable.assign(values["/".join(variable.path.split("/")[-2:])])
    asked = np.load(folder / "asked.npz")
    found = model(asked["images"], training=False)
    return max(float(np.abs(np.asarray(found[name], "float32") - asked[name]).max()) for name in found)


def main() -> None:
    folder, name, batch, precision, steps = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:6]
    sys.path.insert(0, str(ROOT))
    import keras
    import numpy as np

    from train import models

    given = np.load(folder / "asked.npz")
    shape, classes = given["images"].shape[1:], given["main"].shape[-1]
    worst = None
    if "start" not in sys.argv:  # it would count as part of the start
        worst = parity(models.build(name, shape, classes), folder)
        agree(worst)
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

    ends: list[float] = []

    class Ends(keras.callbacks.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    begun = float(os.environ.get("BENCH_BEGUN", time.time()))
    model.fit(images, dict.fromkeys(outputs, labels), batch_size=int(batch), verbose=0, callbacks=[Ends()])
    tell(int(batch), ends, begun=begun, worst=worst)


if __name__ == "__main__":
    main()
