"""Short training courses on whatever backend Keras has, for the tests that compare backends.

KERAS_BACKEND=jax python tests/support/steps.py FOLDER CASE...      (writes FOLDER/jax.pickle: what `run` returns)

Every case trains from the same weights on the same batches, in the precision of the case and in float64. In float64 two
backends agree to 13 digits if they compute the same mathematics, and to a few if a rule differs; and it shows how far
off the lower precision is.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from train import models
from train.runtime import backends
from train.training import losses, optimizers, schedules, step
from train.training.step.layerwise_lr import FreezeSchedule

Tensors = dict[str, np.ndarray]
Course = dict[str, Any]

STEPS = 4
EXAMPLES = 8
CLASSES = 5
SIDE = 16  # of the images, in pixels

# All numbers are short binary fractions, which float32 holds exactly: even in float64 Keras and TensorFlow round some
# of Python's numbers to float32 on the way to a tensor, and the two backends not the same ones.
PEAK = 0.25  # learning rate
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.875, "nesterov": True, "weight_decay": 0.125},
    "adamw": {"optimizer": "adamw", "peak": 2**-5, "ema": 0.875, "gradient_clip": 0.5, "weight_decay": 0.125},
    "rmsprop": {"optimizer": "rmsprop", "peak": 2**-5},
    "accumulation": {"optimizer": "adamw", "peak": 2**-5, "gradient_accumulation": 2},
    "slowed": {"optimizer": "sgd", "peak": 1.0, "slow": 0.25},
    "staged": {"optimizer": "adamw", "peak": 2**-5, "stages": ((2, "head"), (2, "all")), "ema": 0.875},
    "taught": {"optimizer": "sgd", "taught": True},
    "rectified": {"optimizer": "sgd", "momentum": 0.875, "rectified": True},
    "mixed_float16": {"optimizer": "sgd", "momentum": 0.875, "policy": "mixed_float16"},
    "mixed_bfloat16": {"optimizer": "sgd", "momentum": 0.875, "policy": "mixed_bfloat16"},
}
RULES = {
    "sgd": {"momentum": 0.0, "nesterov": False},
    "adamw": {"beta_1": 0.875, "beta_2": 0.9375, "epsilon": 2**-10},  # large enough to matter
    "rmsprop": {"rho": 0.875, "momentum": 0.875, "epsilon": 2**-7},
}
# Wrong rules, which the comparison must notice: the case, and what differs from it.
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "learning rate off by a thousandth": ("taught", {"peak": PEAK * (1 + 2**-10)}),
    "momentum off by a thousandth": ("sgd", {"momentum": 0.875 * (1 + 2**-10)}),
    "momentum without Nesterov": ("sgd", {"nesterov": False}),
    "weight decay applied twice": ("sgd", {"weight_decay": 0.25}),
    "accumulation over a step too many": ("accumulation", {"gradient_accumulation": 3}),
    "momentum with Nesterov": ("mixed_float16", {"nesterov": True}),
    "average off by a thousandth": ("staged", {"ema": 0.875 * (1 + 2**-10)}),
}

DEPTH = 14  # roundings between an image and the loss: one for each layer of the longest path
PERTURBATION = 2.0**-20  # of weights, relative: so little that results move in proportion
PERTURBED_COURSES = 4


def build_network(policy: str, *, rectified: bool = False) -> keras.Model:
    """A small network with the kinds of layers and the layer names of the real ones.

    It is smooth, so that rounding moves results in proportion. A ReLU close to 0 and a maximum of near equals are
    corners, where rounding decides which way a gradient takes, which moves weights a thousand times as far. rectified:
    with corners, like the real networks; for float64, in which nothing is close enough to one.
    """
    activation = "relu" if rectified else "softplus"
    pool = layers.MaxPooling2D if rectified else layers.AveragePooling2D
    unset = {"kernel_initializer": "zeros"}  # replaced by draw_start; XLA would compile each random draw
    plain = {"use_bias": False, **unset}
    normal = {"momentum": 0.875, "epsilon": 2**-10, "scale": False}
    full = "float64" if policy == "float64" else "float32"  # of images and logits, also under a mixed policy

    inputs = keras.Input((SIDE, SIDE, 1), dtype="float32", name="images")
    x = layers.Rescaling(2**-7, offset=-1.0, dtype=full, name="normalize")(inputs)
    x = layers.Conv2D(4, 3, padding="same", name="block1_conv1_conv", **plain)(x)
    x = layers.BatchNormalization(name="block1_conv1_bn", **normal)(x)
    x = layers.Activation(activation, name="block1_conv1_act")(x)
    x = pool(2, name="block1_pool")(x)
    x = layers.Conv2D(8, 3, padding="same", activation=activation, name="block2_conv1", **unset)(x)
    x = pool(2, name="block2_pool")(x)
    aux = layers.Conv2D(6, 1, name="aux_1_conv", **plain)(x)
    aux = layers.BatchNormalization(name="aux_1_bn", **normal)(aux)
    aux = layers.Activation(activation, name="aux_1_act")(aux)
    aux = layers.Conv2D(16, aux.shape[1:3], name="aux_2_conv", **plain)(aux)  # one position: a matrix product
    aux = layers.Flatten(name="aux_flatten")(aux)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    logits = {
        "main": layers.Dense(CLASSES, dtype=full, name="predictions", **unset)(x),
        "aux": layers.Dense(CLASSES, dtype=full, name="aux_predictions", **unset)(aux),
    }
    return keras.Model(inputs, logits, name="small")


def make_step(case: str, policy: str, **changes: Any) -> Any:
    """The training step of a case; changes: what shall differ."""
    chosen = CASES[case] | changes
    own_policy = chosen.pop("policy", "float32")
    name = chosen.pop("optimizer")
    taught = chosen.pop("taught", False)
    stages = chosen.pop("stages", ())
    slow = chosen.pop("slow", 1.0)
    peak = chosen.pop("peak", PEAK)
    rectified = chosen.pop("rectified", False)
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    teacher = models.inference_model(build_network(policy)) if taught else None
    if teacher:
        teacher.set_weights(draw_weights({w.path: np.array(w.value) for w in teacher.weights}, seed=5).values())
    model = build_network(policy, rectified=rectified)
    # Halved from the third step on.
    halved = {"steps_per_epoch": STEPS, "warmup_epochs": 0, "factor": 0.5, "milestones": [0.5]}
    rate = schedules.build_schedule("step", stages=[(1, peak)], **halved)
    common = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None}
    optimizer = optimizers.build_optimizer(name, rate, **RULES[name] | common | chosen)
    if own_policy == "mixed_float16" and policy == "float64":  # Keras does so by itself under the mixed policy only
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    outputs = tuple(model.output)
    weighted, weights = losses.build_losses(outputs, 0.25, 0.125, (0.5, 2.0) if taught else None)
    metrics = losses.build_metrics(outputs, distilled=taught)
    model.compile(optimizer, weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    plan = FreezeSchedule(models.group_layers(model), stages, 0.75, 1.0) if stages else None
    kind = step.get_step_class(keras.backend.backend())
    made = kind(
        model,
        models.inference_model(model),
        rate,
        EXAMPLES,
        False,
        float_images=False,
        example_weights=False,
        measure_gradients=True,
        freeze_schedule=plan,
        teacher=teacher,
    )
    made.set_lr_scale(slow)
    return made


def is_float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating)


def draw_weights(weights: Tensors, seed: int) -> Tensors:
    """New values in the order of the old ones, the same on every backend, and exact in float32 for every precision."""
    draw = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            return draw.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)  # He et al. 2015, section 2.2
        return draw.uniform(0.5, 1.5, shape) if name.endswith("moving_variance") else draw.normal(0, 0.1, shape)

    return {name: drawn(name, old.shape).astype("float32").astype(old.dtype) for name, old in weights.items()}


def is_weight(name: str, value: np.ndarray) -> bool:
    return name.startswith("model/") and is_float(value)


def draw_start(made: Any) -> Tensors:
    """The state that courses start from."""
    state = made.state()
    return state | draw_weights({name: value for name, value in state.items() if is_weight(name, value)}, seed=1)


def perturb(start: Tensors, seed: int) -> Tensors:
    """The start, every weight slightly larger or smaller."""
    draw = np.random.default_rng(seed)
    return {
        name: value * (1 + PERTURBATION * draw.uniform(-1, 1, value.shape)) if is_weight(name, value) else value
        for name, value in start.items()
    }


def draw_batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(number)
    images = draw.integers(256, size=(EXAMPLES, SIDE, SIDE, 1)).astype(np.uint8)
    return images, np.eye(CLASSES, dtype="float32")[draw.integers(CLASSES, size=EXAMPLES)]


def take_step(made: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """On a batch of the kind that the stream yields."""
    import tensorflow as tf

    made(tf.constant(images), tf.constant(labels))


def train(made: Any, first: int = 0, last: int = STEPS) -> list[dict[str, float]]:
    """Takes one step per epoch; returns the metrics after each."""
    measured = []
    for number in range(first, last):
        made.begin_epoch(number)
        made.reset_metrics()
        take_step(made, *draw_batch(number))
        measured.append(made.metrics() | {"learning_rate": made.learning_rate()})
    return measured


def describe(made: Any, measured: list[dict[str, float]]) -> Course:
    """What a course has computed: `tensors`, and the `counts`, which rounding does not change."""
    with made.using_ema_weights():
        logits = made.predict(draw_batch(0)[0])
    by_kind: dict[str, list[float]] = {}
    for metrics in measured:
        for name, value in metrics.items():
            kind = next((kind for kind in ("loss", "accuracy", "gradient_norm") if kind in name), name)
            by_kind.setdefault(kind, []).append(value)
    series = {kind: np.array(values) for kind, values in by_kind.items()}
    correct = np.rint(series.pop("accuracy") * EXAMPLES)
    state = {name: value for name, value in made.state().items() if not name.startswith("metrics/")}  # in the series
    return {
        "tensors": {name: value for name, value in state.items() if is_float(value)} | series | {"logits": logits},
        "counts": {name: value for name, value in state.items() if not is_float(value)} | {"correct": correct},
        "fault": made.non_finite(),
    }


def train_rounded(case: str) -> Course:
    """A course in the precision of the case, with what only that can show: resuming, an overflow, a loss of NaN."""
    policy = CASES[case].get("policy", "float32")
    made = make_step(case, policy)
    start = draw_start(made)
    made.load(start)
    measured = train(made, last=STEPS // 2)
    checkpoint = made.state()
    measured += train(made, first=STEPS // 2)
    course = describe(made, measured)
    resumed = make_step(case, policy)
    resumed.load(checkpoint)
    train(resumed, first=STEPS // 2)
    end = made.state()
    course["resumes"] = all(end[name].tobytes() == value.tobytes() for name, value in resumed.state().items())
    if policy == "mixed_float16":
        course["skips_overflow"] = skips_overflow(made, start)
    images, labels = draw_batch(0)
    made.load(start)
    take_step(made, images, labels * np.float32("nan"))
    course["fault_of_nan"] = made.non_finite()
    return course


def skips_overflow(made: Any, start: Tensors) -> bool:
    """Whether a step leaves the weights alone and halves the loss scale where scaled gradients are infinite."""
    scale = next(name for name in start if name.endswith("dynamic_scale"))
    made.load(start | {scale: np.full_like(start[scale], 2.0**40)})
    take_step(made, *draw_batch(0))
    end = made.state()
    learning = [name for name, value in start.items() if is_weight(name, value) and "/moving_" not in name]
    return end[scale] == 2.0**39 and all(np.array_equal(end[name], start[name]) for name in learning)


def train_float64(case: str, perturbed: int = 0, **changes: Any) -> dict[str, Any]:
    """A course in float64; and so many from perturbed starts, which show how much results depend on rounding."""
    made = make_step(case, "float64", **changes)
    start = draw_start(made)

    def train_from(state: Tensors) -> Course:
        made.load(state)
        return describe(made, train(made))

    courses = [train_from(perturb(start, seed)) for seed in range(perturbed)]
    return {"start": start, "course": train_from(start), "perturbed": courses}


def use_float64() -> None:
    """From now on everything can be float64, in this process; the step's own code has float32 in two places left."""
    keras.config.set_floatx("float64")
    if keras.backend.backend() == "jax":
        import jax
        from keras.src.backend.common import dtypes

        jax.config.update("jax_enable_x64", True)
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"  # Keras makes it float32 on JAX, whatever JAX allows
        jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running
    else:
        from train.training.step import fused_kernels

        fused_kernels.can_fuse_batchnorm = lambda _: False  # the fused kernel has no float64; Keras's operations have
        fused_kernels.MAX_POSITIONS_PER_FILTER["float64"] = fused_kernels.MAX_POSITIONS_PER_FILTER["float32"]


def run(cases: list[str]) -> dict[str, dict[str, Any]]:
    """All courses of these cases. TensorFlow's are the reference, since it takes less time to make a graph."""
    reference = keras.backend.backend() == "tensorflow"
    rounded = {case: train_rounded(case) for case in cases if "rectified" not in CASES[case]}
    use_float64()
    return {
        "rounded": rounded,
        "float64": {case: train_float64(case, PERTURBED_COURSES if reference else 0) for case in cases},
        "wrong": {
            name: train_float64(case, **changes)
            for name, (case, changes) in WRONG.items()
            if reference and case in cases
        },
    }


def main(folder: Path, cases: list[str]) -> None:
    backend = keras.backend.backend()
    backends.get_backend(backend).set_up(device="cpu", devices=1, threads=None, gpu_memory=None, deterministic=True)
    (folder / f"{backend}.pickle").write_bytes(pickle.dumps(run(cases)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
