"""The state of a step: complete, a copy, and enough for another process to continue bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.training import KINDS, equal_states, full_step, make_batch
from train.training.step.tensorflow import Step

pytestmark = pytest.mark.usefixtures("fresh_keras")


def continue_training(step: Step, seeds: Iterator[int] | range) -> dict[str, Any]:
    """Takes further steps; returns every observable result."""
    for seed in seeds:
        step(*make_batch(seed=seed))
    found = {
        "weights": [variable.numpy().tobytes() for variable in step.model.trainable_variables],
        "metrics": step.metrics(),
        "predictions": step.predict(make_batch(seed=99)[0]).tobytes(),
        "digest": step.weights_sha256(),
    }
    with step.using_ema_weights():
        return found | {"averages": step.predict(make_batch(seed=99)[0]).tobytes()}


@dataclasses.dataclass
class Course:
    """Three steps, a checkpoint, and three more steps; the odd number leaves gradients accumulated."""

    step: Step
    start: dict[str, np.ndarray]
    saved: dict[str, np.ndarray]
    outcome: dict[str, Any]
    end: dict[str, np.ndarray]


@functools.cache
def course(kind: str) -> Course:
    step = full_step(kind)
    start = step.state()
    continue_training(step, range(1))
    step.set_lr_scale(0.5)
    continue_training(step, range(1, 3))
    saved = step.state()
    outcome = continue_training(step, range(3, 6))
    return Course(step, start, saved, outcome, step.state())


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_continues_bit_for_bit(kind: str):
    """The other network starts with other weights and seeds; loading the state replaces all of them."""
    first = course(kind)
    other = full_step(kind, seed=2)
    assert not equal_states(other.state(), first.start)
    other.load(first.saved)
    assert equal_states(other.state(), first.saved)
    assert continue_training(other, range(3, 6)) == first.outcome
    assert equal_states(other.state(), first.end)
    assert other.non_finite() is None


@pytest.mark.parametrize(
    ("kind", "part", "seen"),
    [
        ("float32", "seed_generator_state", "weights"),
        ("float32", "_momentum", "weights"),
        ("float32", "sgd/iteration", "weights"),  # the rate falls by it
        ("float32", "learning_rate_factor", "weights"),
        ("float32", "^metrics/", "metrics"),
        ("float32", "/bn/moving_", "predictions"),
        ("ema", "_average", "averages"),
        ("accumulation", "_gradient_accumulator", "weights"),
        ("accumulation", "sgd/iteration", "weights"),
        ("mixed_float16", "dynamic_scale", "metrics"),
        ("mixed_float16", "step_counter", "metrics"),
        ("mixed_float16", "^count$", "metrics"),  # the skipped steps are reckoned from it
        ("everything", "seed_generator_state", "weights"),
        ("everything", "_momentum", "weights"),
        ("everything", "^metrics/", "metrics"),
        ("everything", "_average", "averages"),
        ("everything", "_gradient_accumulator", "weights"),
    ],
)
def test_every_part_of_the_state_is_needed(kind: str, part: str, seen: str):
    """Negative control of the previous test: with this part at its initial value, the results differ."""
    first = course(kind)
    reset = {name: value for name, value in first.start.items() if re.search(part, name)}
    assert reset
    first.step.load(first.saved)
    assert continue_training(first.step, range(3, 6)) == first.outcome
    first.step.load(first.saved | reset)
    assert continue_training(first.step, range(3, 6))[seen] != first.outcome[seen]


@pytest.mark.parametrize("kind", ["float32", "everything"])
def test_every_variable_is_in_the_state_exactly_once(kind: str):
    """Each variable gets a distinct value, so that a duplicate or a missing one would be noticed."""
    step = full_step(kind)
    model = step.model
    listed = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    assert len({id(variable) for variable in listed}) == len(listed)
    for number, variable in enumerate(listed, start=2):
        variable.assign(np.full(variable.shape, number))
    state = step.state()
    own = {"count": 0, "learning_rate_factor": 1}
    assert {name: state[name] for name in own} == own
    values = [np.unique(value).tolist() for name, value in state.items() if name not in own]
    assert sorted(values) == [[number] for number in range(2, len(listed) + 2)]


def test_state_is_a_copy_that_further_steps_do_not_change():
    """A thread writes the state to disk while training continues."""
    step = course("float32").step
    step.load(course("float32").saved)
    taken = step.state()
    continue_training(step, range(3))
    assert equal_states(taken, course("float32").saved)
    assert not equal_states(taken, step.state())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"metrics/0000/loss/total": None, "model/0002/bn/moving_mean": None},
            "metrics/0000/loss/total must match the model and its optimizer (float32 ()), got none",
        ),
        (
            {"model/0002/bn/extra": np.zeros(2, "float32"), "zebra": np.zeros(1)},
            "model/0002/bn/extra must match the model and its optimizer (none), got float32 (2,)",
        ),
        (
            {"model/0002/bn/moving_mean": np.zeros((4, 1), "float32")},
            "model/0002/bn/moving_mean must match the model and its optimizer (float32 (4,)), got float32 (4, 1)",
        ),
        (
            {"count": np.int32(3)},
            "count must match the model and its optimizer (int64 ()), got int32 ()",
        ),
    ],
    ids=["missing", "unknown", "other shape", "other type"],
)
def test_state_of_another_network_is_rejected_and_names_the_tensor(change: dict[str, np.ndarray | None], sentence: str):
    step, saved = course("float32").step, course("float32").saved
    step.load(saved)
    other = {name: value for name, value in (course("float32").start | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        step.load(other)
    assert equal_states(step.state(), saved)  # half of another state would be worse than none
