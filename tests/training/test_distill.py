"""Distillation: the loss matches the paper, the teacher does not change, and its weights belong to the provenance."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from support.commands import message, run_command
from support.shared import Finished
from support.training import digits, make_sgd, make_step, reset_keras, train_tiny
from train import models
from train.config.composition import compose
from train.run import factory
from train.training import losses


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    raised = np.exp(logits / temperature)
    return raised / raised.sum(axis=1, keepdims=True)


def test_distillation_loss_matches_the_paper():
    random = np.random.default_rng(0)
    answers, teacher = random.normal(size=(2, 5, 3)).astype("float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1]]
    hard = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    actual = losses.DistillationLoss(hard, 0.7, 4.0).call(np.concatenate([labels, teacher], axis=1), answers)
    smooth = labels * 0.9 + 0.1 / 3
    cross = -(smooth * np.log(softened(answers, 1))).sum(axis=1)
    wanted, predicted = softened(teacher, 4.0), softened(answers, 4.0)
    np.testing.assert_allclose(
        actual, 0.3 * cross + 0.7 * 16 * (wanted * np.log(wanted / predicted)).sum(axis=1), rtol=1e-4, atol=1e-5
    )
    perfect = losses.DistillationLoss(hard, 1.0, 4.0).call(np.concatenate([labels, answers], axis=1), answers)
    np.testing.assert_allclose(perfect, 0, atol=1e-6)


def taught(teacher: keras.Model, weight: float):
    reset_keras("float32")
    model = models.build("vgg16", (32, 32, 1), 10, width=0.03, aux_weight=0.3)
    weighted, weights = losses.build_losses(tuple(model.output), 0.0, 0.0, (weight, 2.0))
    metrics = losses.build_metrics(tuple(model.output), distilled=True)
    model.compile(make_sgd(0.1), weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    return make_step(model, 8, teacher=teacher)


@pytest.mark.slow
def test_labels_only_affect_accuracy_with_teacher_weight_one():
    reset_keras("float32", 7)
    teacher = models.inference_model(models.build("vgg16_inception", (32, 32, 1), 10, width=0.05))  # normalises batches
    before = [weight.numpy() for weight in teacher.weights]
    images, labels = digits(0)
    actual = []
    for truth in (labels, tf.roll(labels, 1, axis=1)):
        step = taught(teacher, 1.0)
        step(images, truth)
        actual.append((step.weights_sha256(), step.metrics()["accuracy"]))
    own = taught(teacher, 0.5)
    own(images, labels)
    assert actual[0][0] == actual[1][0] != own.weights_sha256()
    assert all(np.array_equal(one, other) for one, other in zip(before, teacher.weights, strict=True))
    predicted = keras.utils.to_categorical(own.predict(images).argmax(axis=1), 10)
    for truth, wanted in ((predicted, 1.0), (np.roll(predicted, 1, axis=1), 0.0)):
        step = taught(teacher, 1.0)
        step.load(own.state())
        step.reset_metrics()
        step(images, tf.constant(truth, tf.float32))
        assert step.metrics()["accuracy"] == pytest.approx(wanted)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    done = train_tiny(run_dir, "epochs=1", "seed=5")
    assert done.code == 0, done.err
    return run_dir


@pytest.mark.slow
def test_changed_teacher_is_rejected_on_resume(teacher: Path, tmp_path: Path):
    copy, run_dir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, copy, symlinks=True)
    overrides = (f"distill.teacher={copy}", "model.width=0.03", "epochs=2")
    assert train_tiny(run_dir, *overrides, env={"INCEPTION_FAULT": "step:5"}).code != 0
    model = keras.models.load_model(copy / "best/model.keras")
    model.set_weights([weight + 1 for weight in model.get_weights()])
    model.save(copy / "best/model.keras")
    done = run_command("make", "resume", f"run={run_dir}")
    assert done.code == 2
    assert "cannot resume: distill.teacher_sha256 changed from" in done.err


def test_unsuitable_teachers_are_rejected(finished: Finished, tmp_path: Path):
    error = message(factory.check_sources, compose([f"distill.teacher={tmp_path}"]))
    assert error.startswith(f"distill.teacher={tmp_path} is not a finished run")
    copy = tmp_path / "unfinished"
    shutil.copytree(finished.path, copy, symlinks=True)
    (copy / "summary.json").unlink()
    assert f"distill.teacher={copy} is not a finished run" in message(
        factory.check_sources, compose([f"distill.teacher={copy}"])
    )
    overrides = [f"distill.teacher={finished.path}", "data.image_size=48"]
    assert "distill.teacher takes images of shape [32, 32, 1], this run has [48, 48, 1]" in message(
        factory.check_sources, compose(overrides)
    )
