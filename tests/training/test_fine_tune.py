"""Fine-tuning: frozen layers keep their weights, and unfrozen groups have their own learning rates."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.commands import message
from support.shared import Finished
from support.training import compile_model, digits, make_sgd, make_step, reset_keras, train_tiny
from train import models
from train.config import schema as schema
from train.config.composition import compose, minimal_command
from train.config.serialization import flatten
from train.training.step.layerwise_lr import FreezeSchedule
from train.training.step.staged_optimizer import StagedOptimizer
from train.training.step.tensorflow import Step

STAGES = (
    "fine_tune.stages=[{epochs:1,from_part:head,learning_rate_factor:1.0},"
    "{epochs:2,from_part:upper,learning_rate_factor:0.5}]"
)


@pytest.mark.parametrize("name", models.BUILDERS)
def test_layer_groups_match_the_config_values(name: str):
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
    reset_keras("float32")
    model = models.build("vgg16_inception", (32, 32, 1), 10, width=0.05)
    model = compile_model(model, make_sgd(0.1, **optimizer))
    return make_step(model, 8, freeze_schedule=FreezeSchedule(models.group_layers(model), stages, decay))


def values(step: Step) -> dict[str, list[np.ndarray]]:
    return {layer.name: layer.get_weights() for layer in step.model.layers if layer.weights}


def moved(before: dict[str, list[np.ndarray]], after: dict[str, list[np.ndarray]]) -> set[str]:
    """The layers whose weights differ."""
    return {
        name
        for name in before
        if any(one.tobytes() != other.tobytes() for one, other in zip(before[name], after[name], strict=True))
    }


def test_frozen_layers_keep_their_weights_and_statistics():
    step = tuned(((1, "head"), (1, "block4"), (1, "all")), momentum=0.9, weight_decay=0.1)
    parts = {name: {layer.name for layer in layers} for name, layers in models.group_layers(step.model).items()}
    every = set().union(*parts.values())
    for epoch, free in enumerate((parts["head"], parts["block4"] | parts["block5"] | parts["head"], every)):
        step.begin_epoch(epoch)
        before = values(step)
        step(*digits(epoch))
        assert moved(before, values(step)) == free  # batch normalisation among them


def test_stages_cover_their_epochs():
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


def begin_stage(optimizer: StagedOptimizer, plan: FreezeSchedule, stage: int, variables: list[keras.Variable]) -> None:
    rates = plan.rates(stage)
    optimizer.begin_stage([(variable, rates[variable.path]) for variable in variables])


def test_unfrozen_group_starts_with_fresh_adam_moments():
    """The first update of a weight equals the learning rate, at any step (Kingma & Ba 2015, section 2.1)."""
    from train.training import optimizers, schedules

    reset_keras("float32")
    late, head = (keras.layers.Dense(3, kernel_initializer="ones", name=name) for name in ("late", "head"))
    for layer in (late, head):
        layer.build((None, 2))
    rate = schedules.build_schedule("constant", stages=[(1, 0.1)], steps_per_epoch=100, warmup_epochs=0)
    rules = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-9, "weight_decay": 0.0}
    optimizer = optimizers.build_optimizer(
        "adamw", rate, gradient_clip=None, gradient_accumulation=1, ema=None, **rules
    )
    optimizer.build([*late.trainable_variables, *head.trainable_variables])
    plan = FreezeSchedule({"late": [late], "head": [head]}, ((1, "head"), (1, "all")), 1.0, 50)
    gradients = [tf.ones((2, 3)), tf.ones(3)]
    begin_stage(optimizer, plan, 0, head.trainable_variables)
    for _ in range(50):
        optimizer.apply(gradients, head.trainable_variables)
    begin_stage(optimizer, plan, 1, [*late.trainable_variables, *head.trainable_variables])
    optimizer.apply(gradients * 2, [*late.trainable_variables, *head.trainable_variables])
    np.testing.assert_allclose(late.kernel.numpy(), 1 - 0.1, rtol=1e-4)
    np.testing.assert_allclose(head.kernel.numpy(), 1 - 51 * 0.1, rtol=1e-3)


def test_every_group_has_its_own_learning_rate(decay: float = 0.5):
    """A plain gradient descent step is rate times gradient; the rate of a group is scaled by a power of the decay."""
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
def test_weights_decay_at_the_rate_of_their_group(name: str):
    """Without a gradient, only the decay changes a weight."""
    from train.training import optimizers, schedules

    reset_keras("float32")
    layer = keras.layers.Dense(3, kernel_initializer="ones")
    layer.build((None, 2))
    config = compose([f"optimizer={name}", "optimizer.weight_decay=0.5"])
    rules = {name: value for name, value in schema.options(config.optimizer).items() if name != "learning_rate"}
    rate = schedules.build_schedule("constant", stages=[(1, 0.1)], steps_per_epoch=10, warmup_epochs=0)
    optimizer = optimizers.build_optimizer(name, rate, gradient_clip=None, gradient_accumulation=1, ema=None, **rules)
    optimizer.build(layer.trainable_variables)
    plan = FreezeSchedule({"late": [layer], "middle": [], "head": []}, ((1, "all"),), 0.5)
    begin_stage(optimizer, plan, 0, layer.trainable_variables)
    optimizer.apply([tf.zeros((2, 3)), tf.zeros(3)], layer.trainable_variables)
    np.testing.assert_allclose(layer.kernel.numpy(), 1 - 0.1 * 0.25 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias.numpy(), 0.0)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    done = train_tiny(run_dir, "epochs=2", "seed=5")
    assert done.code == 0, done.err
    return run_dir / "best/model.keras"


@pytest.mark.slow
def test_fine_tuning_without_stages_loads_the_head(pretrained: Path, tmp_path: Path):
    done = train_tiny(tmp_path / "run", f"model.weights={pretrained}", "epochs=1")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("weights: "))
    assert line.startswith(
        "weights: 99 layers loaded, block1_conv1_conv to predictions; newly initialised: aux_1_conv, "
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=fine_tune"], "fine_tune.stages requires pretrained weights; use model.weights=PATH"),
        (
            ["experiment=fine_tune", "model.weights=x.h5", "epochs=11"],
            "epochs must be at least those of all fine_tune.stages (12), got 11; use epochs=12",
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
        (
            ["fine_tune.layer_decay=0.5"],
            "fine_tune.layer_decay has no effect without fine_tune.stages; use experiment=fine_tune",
        ),
        (
            ["experiment=fine_tune", "model.weights=x.h5", "schedule.warmup_epochs=4"],
            "schedule.warmup_epochs must be at most the epochs of every stage (1 in fine_tune.stages[0]), got 4",
        ),
    ],
)
def test_invalid_fine_tuning_configs_are_rejected(overrides: list[str], expected: str):
    assert expected in message(compose, overrides)


@pytest.mark.slow
def test_fine_tuning_starts_from_a_finished_run(finished: Finished, tmp_path: Path):
    """Starts from the weights of grey digits, with another width and image size."""
    weights = f"model.weights={finished.path / 'best/model.keras'}"
    overrides = (weights, "model.width=0.125", "data.image_size=48", STAGES, "epochs=3")
    assert train_tiny(tmp_path / "run", *overrides).code == 0


def test_minimal_command_of_a_staged_run_gives_the_same_config():
    overrides = ["experiment=fine_tune", "model.weights=x.h5", STAGES, "epochs=3"]
    config = compose(overrides)
    command = minimal_command(flatten(dataclasses.asdict(config)))
    assert compose(shlex.split(command)[2:]) == config
