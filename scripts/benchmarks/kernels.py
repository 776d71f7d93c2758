"""When the gradient of a convolution's filters is faster as a matrix product: what the rule stands on.

    python scripts/benchmarks/kernels.py                 (about a minute)

For convolutions of the networks, batch 64, both ways in turn, medians; and where the rule of
train/training/step/fused_kernels.py puts each.
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
# Side of the map, channels, filters, height and width of the kernel.
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

    def own(images: Any, upstream: Any, shape: tuple[int, ...]) -> Any:
        return tf.raw_ops.Conv2DBackpropFilter(
            input=images, filter_sizes=shape, out_backprop=upstream, strides=[1] * 4, padding="SAME"
        )

    def product(images: Any, upstream: Any, shape: tuple[int, ...]) -> Any:
        return filter_gradient(images, upstream, shape, "SAME")

    right = 0
    for kind in MAX_POSITIONS_PER_FILTER:
        for side, channels, filters, height, width in SHAPES:
            images, upstream = (
                tf.cast(tf.random.normal((BATCH, side, side, depth)), kind) for depth in (channels, filters)
            )
            shape, seconds = (height, width, channels, filters), []
            for way in (own, product):
                run = tf.function(lambda x, y, way=way, shape=shape: way(x, y, shape), autograph=False)
                seconds.append(took(lambda run=run, x=images, y=upstream: run(x, y).numpy()))
            chosen = is_matmul_faster(kind, (height, width), BATCH * side * side, filters)
            right += chosen == (seconds[1] < seconds[0])
            print(
                f"{kind:9} {side:2} px {channels:4} -> {filters:3} by {height} x {width}: oneDNN "
                f"{seconds[0] * 1e3:6.2f} ms, product {seconds[1] * 1e3:6.2f} ms, chosen: "
                f"{'product' if chosen else 'oneDNN'}",
                flush=True,
            )
    print(f"the faster one is chosen for {right} of {len(SHAPES) * len(MAX_POSITIONS_PER_FILTER)}")


def took(run: Any) -> float:
    """Seconds, the median."""
    for _ in range(2):
        run()
    found = []
    for _ in range(TURNS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
