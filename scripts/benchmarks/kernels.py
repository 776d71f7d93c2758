"""Measures when the filter gradient of a convolution is faster as a matrix product: the evidence for our rule.

    python scripts/benchmarks/kernels.py                 (about a minute)

Times both implementations in turn on convolutions of the networks, batch 64, and compares the medians with the choice
of the rule in train/training/step/fused_kernels.py.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BATCH, TURNS = 64, 9
# Side of the feature map, channels, filters, height and width of the kernel.
SHAPES = [
    (32, 64, 64, 3, 3), (16, 64, 128, 3, 3), (16, 128, 128, 3, 3), (8, 128, 256, 3, 3), (8, 256, 256, 3, 3),
    (8, 96, 128, 3, 3), (8, 16, 32, 5, 5), (8, 256, 64, 1, 1), (4, 256, 512, 3, 3), (4, 512, 512, 3, 3),
    (4, 512, 64, 1, 1), (2, 512, 512, 3, 3), (2, 192, 256, 1, 3), (35, 64, 96, 3, 3), (17, 192, 192, 1, 7),
    (17, 768, 192, 1, 1), (8, 384, 384, 1, 3), (8, 2048, 320, 1, 1), (3, 160, 160, 1, 7), (3, 768, 192, 1, 1),
    (1, 384, 384, 1, 3), (1, 2048, 448, 1, 1), (35, 192, 64, 1, 1), (71, 64, 80, 1, 1), (28, 256, 128, 1, 1),
    (16, 128, 32, 1, 1),
]  # fmt: skip


def main() -> None:
    import tensorflow as tf

    from train.training.step.fused_kernels import MAX_POSITIONS_PER_FILTER, filter_gradient, is_matmul_faster

    def onednn(images: Any, upstream: Any, shape: tuple[int, ...]) -> Any:
        return tf.raw_ops.Conv2DBackpropFilter(
            input=images, filter_sizes=shape, out_backprop=upstream, strides=[1] * 4, padding="SAME"
        )

    def matmul(images: Any, upstream: Any, shape: tuple[int, ...]) -> Any:
        return filter_gradient(images, upstream, shape, "SAME")

    num_correct = 0
    for kind in MAX_POSITIONS_PER_FILTER:
        for side, channels, filters, height, width in SHAPES:
            images, upstream = (
                tf.cast(tf.random.normal((BATCH, side, side, depth)), kind) for depth in (channels, filters)
            )
            shape = (height, width, channels, filters)
            seconds = []
            for implementation in (onednn, matmul):
                run = tf.function(lambda x, y, f=implementation, shape=shape: f(x, y, shape), autograph=False)
                seconds.append(median_seconds(lambda run=run, x=images, y=upstream: run(x, y).numpy()))
            chooses_matmul = is_matmul_faster(kind, (height, width), BATCH * side * side, filters)
            num_correct += chooses_matmul == (seconds[1] < seconds[0])
            print(
                f"{kind:9} {side:2} px {channels:4} -> {filters:3} by {height} x {width}: oneDNN "
                f"{seconds[0] * 1e3:6.2f} ms, matmul {seconds[1] * 1e3:6.2f} ms, chosen: "
                f"{'matmul' if chooses_matmul else 'oneDNN'}",
                flush=True,
            )
    print(f"the faster implementation is chosen for {num_correct} of {len(SHAPES) * len(MAX_POSITIONS_PER_FILTER)}")


def median_seconds(run: Any) -> float:
    """Returns the median duration of a call, in seconds."""
    for _ in range(2):
        run()
    durations = []
    for _ in range(TURNS):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


if __name__ == "__main__":
    main()
