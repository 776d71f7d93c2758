"""JAX computes what TensorFlow computes, within rounding, and goes on to the same bits by itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
from conftest import ROOT, Done, message, run_command

from train import build
from train.compose import compose
from train.config import SMALLEST_IMAGE

QUICK = ("staged",)  # the others take minutes to compile


def of_case(case: str) -> Any:
    return case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", map(of_case, steps.CASES))
def test_both_backends_take_the_same_steps(case: str, tmp_path: Path):
    start = steps.make(case).state()
    np.savez(tmp_path / "start.npz", **start)
    command = [sys.executable, str(ROOT / "tests/steps.py"), case, str(tmp_path)]
    done = run_command(*command, env={"KERAS_BACKEND": "jax"})
    assert done.code == 0, done.err
    ours: Any = steps.course(case, start)
    theirs = json.loads((tmp_path / "told.json").read_text())
    assert ours["goes_on"] and theirs["goes_on"]  # to the bit, by way of another network
    assert theirs["told"]["fault"] is None
    assert [*ours["broken"]] == theirs["broken"] == ["the loss", steps.STEPS + 1]
    # An input of a ReLU that is negative here and positive there changes all gradients below it.
    half = steps.CASES[case].get("policy") == "mixed_float16"
    relative, told_within, answers_within = (0.3, 0.05, 0.05) if half else (0.03, 1e-3, 2e-3)
    for one, other in zip(ours["told"]["told"], theirs["told"]["told"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if np.isfinite(value):
                assert other[name] == pytest.approx(value, rel=told_within, abs=1e-6), name
            else:  # an overflow, for which the step is skipped
                assert not np.isfinite(other[name]), name
    with np.load(tmp_path / "end.npz") as end:
        np.testing.assert_allclose(end["answers"], ours["answers"], atol=answers_within)
        for name, value in ours["state"].items():
            if np.issubdtype(value.dtype, np.floating):
                way = np.abs(value - start[name]).max()  # that the step has come
                assert np.abs(end[name] - value).max() <= relative * way + 1e-5, name
            else:
                assert np.array_equal(end[name], value), name


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = ("backend=jax", "model=vgg16", "model.head=fc", "model.width=0.05", "epochs=2", "steps_per_epoch=6",
        "batch_size=16", "checkpoint.every_steps=4", "tracking.log_model=false")  # fmt: skip


def train(place: Path, *words: str, env: dict[str, str] | None = None) -> Done:
    own = [f"run_dir={place}", f"tracking.uri=sqlite:///{place.parent / 'mlflow.db'}"]
    return run_command(sys.executable, "-m", "train", *TINY, *words, *own, env=env)


def summary_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_on_jax_is_one_like_all_others(tmp_path: Path):
    """Killed and gone on with; with its report; and answers the same to whoever asks TensorFlow."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train(whole)
    assert done.code == 0, done.err
    assert done.out.startswith("on: JAX, cpu, ")
    assert (whole / "report.html").exists()
    assert "warning" not in done.out + done.err
    assert train(killed, "evaluate.report=false", env={"INCEPTION_FAULT": "step:7"}).code == -9
    done = run_command("make", "resume", f"run={killed}")
    assert done.code == 0, done.err
    one, other = summary_of(whole), summary_of(killed)
    assert (one["weights_sha256"], one["test"]) == (other["weights_sha256"], other["test"])
    assert other["lives"] == 2
    done = run_command(sys.executable, "-m", "train.evaluate", f"run={whole}", "backend=tensorflow", "jit=off")
    assert done.code == 0, done.err
    scores = json.loads(next((whole / "evaluation").rglob("scores.json")).read_text())
    assert scores["loss"] == pytest.approx(one["test"]["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALLEST_IMAGE)
def test_every_network_trains_on_jax(model: str, tmp_path: Path):
    words = [f"model={model}", "model.head=avg", "steps_per_epoch=2", "epochs=1", "evaluate.report=false"]
    done = train(tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert summary_of(tmp_path / "run")["steps"] == 2
    assert summary_of(tmp_path / "run")["test"]["examples"] == 340


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backend=jax", "jit=off"], "jit must be auto or on with backend=jax, which compiles everything, got off"),
        (["backend=jax", "gpu_memory=4096"], "gpu_memory must be null with backend=jax, which takes what it comes to "),
        (["backend=torch"], "backend must be one of tensorflow, jax, got torch"),
    ],
)
def test_what_a_backend_can_not_do(words: list[str], said: str):
    assert said in message(compose, words)


def test_a_backend_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    said = message(build.check_sources, compose(["backend=jax"]))
    assert said.startswith("backend must be installed, got jax, which is not; use backend=tensorflow, or install the ")
    assert (ROOT / "requirements-jax.lock").name in said
