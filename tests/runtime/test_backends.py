"""JAX computes what TensorFlow computes, within rounding, and resumes to the same bits."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import steps
from support.commands import ROOT, Done, message, run_command
from support.shared import once
from train.config.composition import compose
from train.config.schema import MIN_IMAGE_SIZE
from train.run import factory
from train.runtime.backends import BACKENDS

# --------------------------------------------------------------------------------------------------------- same steps

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "mixed_float16": 2.0**-11, "mixed_bfloat16": 2.0**-8}
CONFIDENCE = 4.0
Courses = dict[str, dict[str, Any]]  # by backend


@pytest.fixture(scope="session")
def courses(tmp_path_factory: pytest.TempPathFactory) -> Courses:
    """Courses of all cases: one process of each backend, in which XLA compiles for a minute and more."""
    return once(tmp_path_factory, "courses", lambda place: run_steps(place, list(steps.CASES)))


def run_steps(place: Path, cases: list[str]) -> Courses:
    def run(backend: str) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "tests/support/steps.py"), str(place), *cases]
        done = run_command(*command, env={"KERAS_BACKEND": backend}, timeout=1200)
        assert done.code == 0, done.err
        return pickle.loads((place / f"{backend}.pickle").read_bytes())

    with ThreadPoolExecutor() as both:
        return dict(zip(BACKENDS, both.map(run, BACKENDS), strict=True))


def relative_rounding(precision: str) -> float:
    """The tolerance of a course in a precision, in units of the effect of changing every weight by its own size.

    Rounding errors, also those within a sum, accumulate like independent ones, with the square root of their
    number n; the probability of more than CONFIDENCE times that is at most 2 exp(-CONFIDENCE^2/2), here 7e-4.
    Source: Higham & Mary 2019 (A New Approach to Probabilistic Rounding Error Analysis). 16-bit numbers are assumed to
    be summed in float32.
    """
    roundings = 2 * steps.DEPTH * steps.STEPS  # forwards and backwards
    terms = steps.EXAMPLES * steps.SIDE**2  # of the longest sum: over all positions of all images
    within_sums = min(UNIT_ROUNDOFF[precision], UNIT_ROUNDOFF["float32"])
    return CONFIDENCE * (math.sqrt(roundings) * UNIT_ROUNDOFF[precision] + math.sqrt(terms) * within_sums)


def largest_excess(course: dict[str, Any], reference: dict[str, Any], precision: str, case: str) -> tuple[float, str]:
    """The tensor with the largest distance in units of its bound: this distance, and its name.

    reference: of `steps.train_float64`. Its courses from perturbed starts show how far changing every weight by a
    little moves each tensor, which makes the bound large only for the tensors that depend on rounding.
    """
    exact = reference["course"]["tensors"]
    assert course["tensors"].keys() == exact.keys()

    def excess(name: str, value: np.ndarray) -> float:
        distances = [np.linalg.norm(other["tensors"][name] - value) for other in reference["perturbed"]]
        condition = max(distances) / steps.PERTURBATION + np.linalg.norm(value)  # the latter: it is rounded itself
        # Norms of gradients are float32 in a float64 course, too.
        stored = "float32" if (name, precision) == ("gradient_norm", "float64") else precision
        bound = condition * relative_rounding(stored)
        if "stages" in steps.CASES[case]:  # about eight float32 operations for the bias correction
            moved = np.linalg.norm(value - reference["start"].get(name, 0.0))
            bound += 8 * UNIT_ROUNDOFF["float32"] * moved
        distance = np.linalg.norm(course["tensors"][name] - value)
        multiple = distance / max(bound, np.finfo(float).tiny)  # the bound is 0 where nothing may move
        return float(np.nan_to_num(multiple, nan=np.inf))  # max would overlook a NaN

    return max((excess(name, np.asarray(value, float)), name) for name, value in exact.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", steps.CASES)
def test_both_backends_take_the_same_steps(case: str, courses: Courses):
    """In float64, where agreement within rounding leaves no room for another rule."""
    reference = courses["tensorflow"]["float64"][case]
    course = courses["jax"]["float64"][case]["course"]
    excess, name = largest_excess(course, reference, "float64", case)
    assert excess <= 1, name
    np.testing.assert_equal(course["counts"], reference["course"]["counts"])
    assert course["fault"] is reference["course"]["fault"] is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in steps.CASES if "rectified" not in steps.CASES[case]])
def test_lower_precision_takes_the_same_steps(case: str, backend: str, courses: Courses):
    reference = courses["tensorflow"]["float64"][case]
    precision = steps.CASES[case].get("policy", "float32")
    course = courses[backend]["rounded"][case]
    excess, name = largest_excess(course, reference, precision, case)
    assert excess <= 1, name
    # With 16 bits the order of two nearly equal logits may change.
    counted = [name for name in course["counts"] if name != "correct" or precision == "float32"]
    np.testing.assert_equal(*({name: c["counts"][name] for name in counted} for c in (course, reference["course"])))
    assert course["fault"] is None
    assert course["fault_of_nan"] == ("loss", 1)
    assert course["resumes"]  # bit for bit, in another network
    assert course.get("skips_overflow", True)


@pytest.mark.slow
@pytest.mark.parametrize("rule", steps.WRONG)
def test_wrong_rule_exceeds_the_tolerance(rule: str, courses: Courses):
    """Negative control: each bound is smaller than the effect of a wrong rule."""
    case, _ = steps.WRONG[rule]
    wrong = courses["tensorflow"]["wrong"][rule]["course"]
    reference = courses["tensorflow"]["float64"][case]
    for precision in {"float64", "float32", steps.CASES[case].get("policy", "float32")}:
        excess, _ = largest_excess(wrong, reference, precision, case)
        assert excess > 1, precision


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = ("backend=jax", "model=vgg16", "model.head=fc", "model.width=0.05", "epochs=2", "steps_per_epoch=6",
        "batch_size=16", "checkpoint.every_steps=4", "tracking.log_model=false")  # fmt: skip


def train(run: Path, *overrides: str, env: dict[str, str] | None = None) -> Done:
    paths = [f"run_dir={run}", f"tracking.uri=sqlite:///{run.parent / 'mlflow.db'}"]
    return run_command(sys.executable, "-m", "train", *TINY, *overrides, *paths, env=env)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.slow
def test_run_on_jax_resumes_reports_and_is_read_by_tensorflow(tmp_path: Path):
    """It is killed and resumed, writes its report, and gives the same predictions with TensorFlow."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train(whole)
    assert done.code == 0, done.err
    assert done.out.startswith("device: CPU, JAX, ")
    assert (whole / "report.html").exists()
    assert "warning" not in done.out + done.err
    assert train(killed, "evaluate.report=false", env={"INCEPTION_FAULT": "step:7"}).code == -9
    done = run_command("make", "resume", f"run={killed}")
    assert done.code == 0, done.err
    one, other = summary_of(whole), summary_of(killed)
    assert (one["weights_sha256"], one["test"]) == (other["weights_sha256"], other["test"])
    assert other["attempts"] == 2
    done = run_command(sys.executable, "-m", "train.evaluate", f"run={whole}", "backend=tensorflow", "jit=off")
    assert done.code == 0, done.err
    scores = json.loads(next((whole / "evaluation").rglob("scores.json")).read_text())
    assert scores["loss"] == pytest.approx(one["test"]["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", MIN_IMAGE_SIZE)
def test_every_network_trains_on_jax(model: str, tmp_path: Path):
    overrides = [f"model={model}", "model.head=avg", "steps_per_epoch=2", "epochs=1", "evaluate.report=false"]
    done = train(tmp_path / "run", *overrides)
    assert done.code == 0, done.err
    assert summary_of(tmp_path / "run")["steps"] == 2
    assert summary_of(tmp_path / "run")["test"]["examples"] == 340


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["backend=jax", "jit=off"],
            "jit=off is not supported with backend=jax, which compiles everything; use jit=auto",
        ),
        (
            ["backend=jax", "gpu_memory=4096"],
            "gpu_memory is not supported with backend=jax, which allocates memory as ",
        ),
        (["backend=torch"], "backend must be one of tensorflow, jax, got torch"),
    ],
)
def test_unsupported_backend_option_is_rejected(overrides: list[str], expected: str):
    assert expected in message(compose, overrides)


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    error = message(factory.check_sources, compose(["backend=jax"]))
    assert error.startswith("backend jax is not installed; use backend=tensorflow, or install it: ")
    assert (ROOT / "requirements/jax.lock").name in error
