"""Prints the machine's peak rate as JSON: multiply-accumulates per second of a large matrix product, by precision."""

from __future__ import annotations

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
SECONDS = 4.0  # for each precision


def main() -> None:
    import tensorflow as tf

    gpu = bool(tf.config.list_physical_devices("GPU"))
    side = 8192 if gpu else 2048
    rates = {}
    for precision in ("float32", "bfloat16", *(["float16"] if gpu else [])):  # CPUs are very slow in float16
        x = tf.cast(tf.random.normal((side, side)), precision)
        product = tf.function(lambda x=x: tf.reduce_sum(tf.linalg.matmul(x, x)))
        product().numpy()
        best, until = float("inf"), time.perf_counter() + SECONDS
        while time.perf_counter() < until:
            start = time.perf_counter()
            product().numpy()
            best = min(best, time.perf_counter() - start)
        rates[precision] = side**3 / best
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
