"""Fine-tuning: what is frozen stays to the bit, what is set free learns at its own rate, and a kill changes nothing."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_training import begin_anew, compiled, sgd, step_of

from support.commands import message, run_train
from support.shared import Finished
from train import models
from train.config import schema as schema
from train.config.composition import compose, minimal_command
from train.config.serialization import flatten
from train.training.step.layerwise_lr import FreezeSchedule
from train.training.step.tensorflow import Step

TINY = ("model.width=0.05", "steps_per_epoch=4", "batch_size=8", "tracking.wait_seconds=0", "tracking.log_model=false",
        "evaluate.test=false", "checkpoint.every_steps=1", "precision=float32")  # fmt: skip
STAGES = (
    "fine_tune.stages=[{epochs:1,from_part:head,learning_rate_factor:1.0},"
    "{epochs:2,from_part:upper,learning_rate_factor:0.5}]"
)


@pytest.mark.parametrize("name", models.BUILDERS)
def test_the_parts_of_a_network_are_those_that_can_be_typed(name: str):
    side = models.MIN_IMAGE_SIZE[name]
    with models.weights.without_weights():
        model = models.build(name, (side, side, 3), 10, width=0.05)
    found = models.group_layers(model)
    assert tuple(found) == (*schema.LAYER_GROUPS[name], schema.HEAD_LAYER_GROUP)
    weighted = [layer.name for layer in model.layers if layer.weights]
    assert sorted(layer.name for layers in found.values() for layer in layers) == sorted(weighted)
    assert {layer.name for layer in found["head"]} >= {"predictions"}
    assert all(layer.name.startswith(("aux", "fc", "predictions")) for layer in found["head"])


def tuned(stages: tuple[tuple[int, str], ...], decay: float = 1.0, **optimizer: Any) -> Step:
    begin_anew("float32")
    model = models.build("vgg16_inception", (32, 32, 1), 10, width=0.05)
    model = compiled(model, sgd(0.1, **optimizer))
    return step_of(model, 8, freeze_schedule=FreezeSchedule(models.group_layers(model), stages, decay))


def digits(seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    draw = np.random.default_rng(seed)
    images = draw.integers(256, size=(8, 32, 32, 1)).astype(np.uint8)
    return tf.constant(images), tf.constant(np.eye(10, dtype="float32")[draw.integers(10, size=8)])


def values(step: Step) -> dict[str, list[np.ndarray]]:
    return {layer.name: layer.get_weights() for layer in step.model.layers if layer.weights}


def moved(before: dict[str, list[np.ndarray]], after: dict[str, list[np.ndarray]]) -> set[str]:
    """The layers of which a bit is another."""
    return {
        name
        for name in before
        if any(one.tobytes() != other.tobytes() for one, other in zip(before[name], after[name], strict=True))
    }


def test_what_is_frozen_keeps_its_weights_and_its_statistics():
    step = tuned(((1, "head"), (1, "block4"), (1, "all")), momentum=0.9, weight_decay=0.1)
    parts = {name: {layer.name for layer in layers} for name, layers in models.group_layers(step.model).items()}
    every = set().union(*parts.values())
    for epoch, free in enumerate((parts["head"], parts["block4"] | parts["block5"] | parts["head"], every)):
        step.begin_epoch(epoch)
        before = values(step)
        step(*digits(epoch))
        assert moved(before, values(step)) == free  # batch normalisation among them


def test_stages_have_their_epochs():
    plan = FreezeSchedule(
        {"a": [], "b": [], "c": [], "head": []}, ((2, "head"), (3, "upper"), (1, "b"), (1, "all")), 0.5, 10
    )
    assert [plan.stage_of(epoch) for epoch in range(9)] == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert [plan.trainable_groups(stage) for stage in range(4)] == [
        ["head"],
        ["c", "head"],
        ["b", "c", "head"],
        [*plan.layer_groups],
    ]
    assert [plan.lr_multiplier(part) for part in plan.layer_groups] == [0.125, 0.25, 0.5, 1.0]
    assert [plan.first_update(part) for part in plan.layer_groups] == [60, 50, 20, 0]
    with pytest.raises(KeyError):
        FreezeSchedule({"a": [], "head": []}, ((1, "b"),))


def test_a_part_that_is_set_free_begins_as_adam_begins():
    """The first update of a weight is the learning rate, whenever it comes (Kingma & Ba 2015, section 2.1)."""
    from train.training import optimizers
    from train.training.step.layerwise_lr import layerwise_lr

    begin_anew("float32")
    late, head = (keras.layers.Dense(3, kernel_initializer="ones", name=name) for name in ("late", "head"))
    for layer in (late, head):
        layer.build((None, 2))
    rate = optimizers.build_schedule("constant", stages=[(1, 0.1)], steps_per_epoch=100, warmup_epochs=0)
    rules = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-9, "weight_decay": 0.0}
    optimizer = optimizers.build_optimizer(
        "adamw", rate, gradient_clip=None, gradient_accumulation=1, ema=None, **rules
    )
    optimizer.build([*late.trainable_variables, *head.trainable_variables])
    plan = FreezeSchedule({"late": [late], "head": [head]}, ((1, "head"), (1, "all")), 1.0, 50)
    gradients = [tf.ones((2, 3)), tf.ones(3)]
    for _ in range(50):
        with layerwise_lr(optimizer, plan, 0):
            optimizer.apply(gradients, head.trainable_variables)
    with layerwise_lr(optimizer, plan, 1):
        optimizer.apply(gradients * 2, [*late.trainable_variables, *head.trainable_variables])
    np.testing.assert_allclose(late.kernel.numpy(), 1 - 0.1, rtol=1e-4)
    np.testing.assert_allclose(head.kernel.numpy(), 1 - 51 * 0.1, rtol=1e-3)


def test_every_part_learns_at_its_own_rate(decay: float = 0.5):
    """Of plain gradient descent a step is the rate times the gradient: that of a part is a power of the decay."""
    whole = tuned(((1, "all"),))
    start = whole.state()
    whole(*digits(0))
    plain = whole.state()
    scaled = tuned(((1, "all"),), decay)
    scaled.load(start)
    scaled(*digits(0))
    ours = scaled.state()
    depth = {
        layer.name: number
        for number, layers in enumerate(reversed(models.group_layers(scaled.model).values()))
        for layer in layers
    }
    seen = set()
    for name in plain:
        layer = name.split("/")[-2] if name.startswith("model/") else ""
        if name.startswith("model/") and name.endswith("kernel"):
            wanted = start[name] + (plain[name] - start[name]) * decay ** depth[layer]
            np.testing.assert_allclose(ours[name], wanted, rtol=1e-4, atol=1e-6)
            seen.add(depth[layer])
    assert seen == set(range(6))


@pytest.mark.parametrize("name", schema.GROUPS["optimizer"])
def test_weights_decay_at_the_rate_of_their_part(name: str):
    """With no gradient at all only the decay moves a weight."""
    from train.training import optimizers
    from train.training.step.layerwise_lr import layerwise_lr

    begin_anew("float32")
    layer = keras.layers.Dense(3, kernel_initializer="ones")
    layer.build((None, 2))
    config = compose([f"optimizer={name}", "optimizer.weight_decay=0.5"])
    rules = {name: value for name, value in schema.options(config.optimizer).items() if name != "learning_rate"}
    rate = optimizers.build_schedule("constant", stages=[(1, 0.1)], steps_per_epoch=10, warmup_epochs=0)
    optimizer = optimizers.build_optimizer(name, rate, gradient_clip=None, gradient_accumulation=1, ema=None, **rules)
    optimizer.build(layer.trainable_variables)
    plan = FreezeSchedule({"late": [layer], "middle": [], "head": []}, ((1, "all"),), 0.5)
    with layerwise_lr(optimizer, plan, 0):
        optimizer.apply([tf.zeros((2, 3)), tf.zeros(3)], layer.trainable_variables)
    np.testing.assert_allclose(layer.kernel.numpy(), 1 - 0.1 * 0.25 * 0.5, rtol=1e-6)
    assert "update_step" not in vars(optimizer)


# ------------------------------------------------------------------------------------------------------- whole runs


def train(place: Path, *words: str, env: dict[str, str] | None = None) -> Any:
    own = [f"run_dir={place}", f"tracking.uri=sqlite:///{place.parent / 'mlflow.db'}"]
    return run_train(*TINY, *words, *own, env=env)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pretrained") / "run"
    done = train(place, "epochs=2", "seed=5")
    assert done.code == 0, done.err
    return place / "best/model.keras"


@pytest.mark.slow
def test_without_stages_everything_learns_and_the_head_is_kept(pretrained: Path, tmp_path: Path):
    done = train(tmp_path / "run", f"model.weights={pretrained}", "epochs=1")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("weights: "))
    assert line.startswith("weights: 99 layers loaded, block1_conv1_conv to predictions; new: aux_1_conv, ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=fine_tune"], "fine_tune.stages must go with weights to start from, got none; use model.weights="),
        (
            ["experiment=fine_tune", "model.weights=x.h5", "epochs=11"],
            "epochs must be at least those of fine_tune.stages, 12, got 11; use epochs=12",
        ),
        (
            ["model.weights=x.h5", "fine_tune.stages=[{epochs:12,from_part:block9,learning_rate_factor:0.1}]"],
            "fine_tune.stages[0].from_part must be one of all, upper, block1, block2, block3, block4, block5, head, "
            "got block9",
        ),
        (
            ["model.weights=x.h5", "fine_tune.stages=[{epochs:12,from_part:all,learning_rate_factor:-1}]"],
            "fine_tune.stages[0].learning_rate_factor must be above 0, got -1",
        ),
        *(
            (
                [f"fine_tune.stages={typed}"],
                "fine_tune.stages must be a list like [{epochs:1,from_part:all,learning_rate_factor:1.0}], "
                f"got {typed}",
            )
            for typed in ("[{epoch:1}]", "[{epochs:three}]", "[head]")
        ),
        (["fine_tune.layer_decay=0.5"], "fine_tune.layer_decay must go with fine_tune.stages, got none"),
        (
            ["experiment=fine_tune", "model.weights=x.h5", "schedule.warmup_epochs=4"],
            "schedule.warmup_epochs must be at most the epochs of every stage, 1 of fine_tune.stages[0], got 4",
        ),
    ],
)
def test_what_can_not_be_tuned(words: list[str], said: str):
    assert said in message(compose, words)


@pytest.mark.slow
def test_the_finished_run_can_be_started_from(finished: Finished, tmp_path: Path):
    """Grey digits' weights, for another number of classes and another size."""
    words = (f"model.weights={finished.path / 'best/model.keras'}", "model.width=0.125", "data.image_size=48", STAGES)
    assert train(tmp_path / "run", *words, "epochs=3").code == 0


def test_the_command_of_a_run_in_stages_can_be_typed():
    words = ["experiment=fine_tune", "model.weights=x.h5", STAGES, "epochs=3"]
    config = compose(words)
    command = minimal_command(flatten(dataclasses.asdict(config)))
    assert compose(shlex.split(command)[2:]) == config
