"""Estimates the scaling of InceptionV3 on ImageNet to 8, 64 and 512 GPUs with this pipeline, and its limits.

    python scripts/benchmarks/device_scaling.py --report scripts/results/scaling.json   (a minute: it compiles a step)

No such machine was available. Measured are the all-reduces of a step, counted in XLA's program for two devices, the
size of parameters and state, and the decoding rate in scripts/results/data.json. A single GPU's images per second are
from published benchmarks. The links are assumed, see GPUS and the constants. An all-reduce goes over the n GPUs of each
host, then over the m hosts: 2 (n - 1) / n times its bytes through the links inside a host, 2 (m - 1) / m times through
those between hosts, and a latency for every level of a tree, up and down.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "scripts/results"


@dataclass(frozen=True)
class Gpu:
    """A GPU and its links. images_per_second: of one GPU training InceptionV3. Links: bytes/s per direction."""

    images_per_second: float
    source: str
    inside: float  # between the eight GPUs of a host
    between: float  # between hosts, per host


GPUS = {
    "P100, 100 Gbit/s": Gpu(
        142, "tensorflow.org/performance/benchmarks (2017): float32, 64 images, synthetic data", 20e9, 12.5e9
    ),
    "A100, 100 Gbit/s": Gpu(
        2630, "ResNet-50's 90 epochs in 8.75 hours (NVIDIA's MXNet example, one A100), by multiply-accumulates",
        300e9, 12.5e9,
    ),
    "A100, 8 x 200 Gbit/s": Gpu(2630, "as above", 300e9, 200e9),
}  # fmt: skip
COUNTS = (8, 64, 512)
PER_HOST = 8
PER_GPU = (32, 128)  # batch size per GPU
INSIDE_LATENCY, BETWEEN_LATENCY = 10e-6, 20e-6  # seconds per level of a tree
HIDDEN = 0.5  # share of the backward pass, two thirds of a step, that overlaps with the all-reduce of gradients
TRAINING_IMAGES, EPOCHS = 1_281_167, 90
JPEG_BYTES = 110e3  # ImageNet's mean
JPEG_PIXELS = 500 * 375
TO_HOST, TO_DISK = 12e9, 1e9  # bytes per second of a checkpoint
LARGEST_BATCH = 8192  # up to here accuracy does not drop, with warm-up (Goyal et al. 2017, figure 1; ResNet-50)


def counted() -> dict[str, int]:
    """Counts the all-reduces of a step, and bytes. A narrow network has as many all-reduces as the full one."""
    environment = os.environ | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, __file__, "--count"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def count() -> None:
    """Counts in this process, with two virtual CPU devices, and prints JSON."""
    from train import models
    from train.config.composition import compose
    from train.run import factory
    from train.runtime import backends

    overrides = ["model=inception_v3", "backend=jax", "device=cpu", "devices=2", "precision=float32", "jit=on"]
    config = compose([*overrides, "threads=2", "data.image_size=75", "model.width=0.03", "batch_size=2"])
    backend = backends.get_backend("jax")
    backend.initialize(device="cpu", devices="2", group=config.distributed)
    backend.set_up(device="cpu", devices=2, threads=2, gpu_memory=None, deterministic=config.deterministic)
    import jax
    import numpy as np

    model = models.build("inception_v3", (75, 75, 3), 10, width=0.03, aux_weight=0.3)
    step = factory.make_training_step(config, model, models.inference_model(model), 100, None)
    compiled: list[str] = []
    original_jit = jax.jit

    def recording_jit(*jit_args: Any, **jit_options: Any) -> Any:
        run = original_jit(*jit_args, **jit_options)

        def call(*args: Any, **kwargs: Any) -> Any:
            compiled.append(run.lower(*args, **kwargs).compile().as_text())
            return run(*args, **kwargs)

        return call

    jax.jit = recording_jit
    step.begin_epoch(0)
    jax.jit = original_jit
    step(np.zeros((2, 75, 75, 3), "uint8"), np.eye(10, dtype="float32")[:2])
    sums = re.findall(r"= .* all-reduce(?:-start)?\(.*", compiled[0])
    weights = [line for line in sums if "conv_general_dilated" in line or "dot_general" in line]  # of gradients
    full = models.build("inception_v3", (299, 299, 3), 1000, aux_weight=0.3)
    trainable = sum(math.prod(variable.shape) for variable in full.trainable_variables)
    print(
        json.dumps(
            {
                "sums_of_gradients": len(weights),
                "sums_of_statistics": len(sums) - len(weights),
                "gradient_bytes": 4 * trainable,
                "state_bytes": 4 * (full.count_params() + trainable),  # with momentum
            }
        )
    )


def all_reduce_seconds(gpu: Gpu, gpus: int, size: float) -> float:
    """Returns the seconds of one all-reduce of `size` bytes: inside the hosts, then between them."""
    inside, hosts = min(gpus, PER_HOST), math.ceil(gpus / PER_HOST)
    seconds = 2 * (inside - 1) / inside * size / gpu.inside + 2 * math.log2(inside) * INSIDE_LATENCY
    return seconds + 2 * (hosts - 1) / hosts * size / gpu.between + 2 * math.log2(hosts) * BETWEEN_LATENCY


def decoding() -> float:
    """Returns how many ImageNet-sized images a core decodes and crops per second, interpolated between two sizes."""
    rows = json.loads((FIGURES / "data.json").read_text())
    rates = {row["images"]: row["images_per_second"] / 2 for row in rows if row["name"] == "crop 224, flip"}
    points = sorted((math.prod(map(int, name.split("x"))), 1 / rate) for name, rate in rates.items() if "x" in name)
    (small, fast), (large, slow) = points[0], points[-1]
    return 1 / (fast + (slow - fast) * (JPEG_PIXELS - small) / (large - small))


def row(kind: str, gpus: int, images: int, sent: dict[str, int], per_core: float) -> dict[str, Any]:
    """Returns a row of the table. images: batch size per GPU."""
    gpu = GPUS[kind]
    computing = images / gpu.images_per_second
    statistics = sent["sums_of_statistics"] * all_reduce_seconds(gpu, gpus, 4096)  # a few hundred numbers each
    gradients = all_reduce_seconds(gpu, gpus, sent["gradient_bytes"])
    exposed = max(0.0, gradients - HIDDEN * 2 / 3 * computing)
    seconds = computing + statistics + exposed
    batch = images * gpus
    rate = batch / seconds
    host = rate / math.ceil(gpus / PER_HOST)
    return {
        "kind": kind,
        "gpus": gpus,
        "batch_size": batch,
        "step_ms": 1000 * seconds,
        "statistics_ms": 1000 * statistics,
        "gradients_ms": 1000 * gradients,
        "exposed_ms": 1000 * exposed,
        "images_per_second": rate,
        "efficiency": rate / (gpus * gpu.images_per_second),
        "input_mb_per_second_of_a_host": host * JPEG_BYTES / 1e6,
        "cores_of_a_host": host / per_core,
        "hours": EPOCHS * TRAINING_IMAGES / rate / 3600,
        "checkpoint_stall_ms": 1000 * sent["state_bytes"] / TO_HOST,
        "checkpoint_seconds": sent["state_bytes"] / TO_DISK,
        "too_large": batch > LARGEST_BATCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="only count the all-reduces of a step")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.count:
        count()
        return
    sent, per_core = counted(), decoding()
    rows = [row(kind, gpus, images, sent, per_core) for kind in GPUS for images in PER_GPU for gpus in COUNTS]
    results = {"sent": sent, "decoded_per_core": per_core, "rows": rows}
    print(json.dumps(results, indent=1))
    if options.report:
        options.report.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
