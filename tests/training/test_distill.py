"""Learning from a larger network: the loss is the paper's, the teacher stays as it is, and belongs to the ground."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_fine_tune import digits, train
from test_training import begin_anew, sgd, step_of

from support.commands import message, run_command
from support.shared import Finished
from train import models
from train.config.composition import compose
from train.run import factory
from train.training import losses


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    raised = np.exp(logits / temperature)
    return raised / raised.sum(axis=1, keepdims=True)


def test_the_loss_is_that_of_the_paper():
    random = np.random.default_rng(0)
    answers, teacher = random.normal(size=(2, 5, 3)).astype("float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1]]
    hard = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    found = losses.DistillationLoss(hard, 0.7, 4.0).call(np.concatenate([labels, teacher], axis=1), answers)
    smooth = labels * 0.9 + 0.1 / 3
    cross = -(smooth * np.log(softened(answers, 1))).sum(axis=1)
    wanted, said = softened(teacher, 4.0), softened(answers, 4.0)
    np.testing.assert_allclose(
        found, 0.3 * cross + 0.7 * 16 * (wanted * np.log(wanted / said)).sum(axis=1), rtol=1e-4, atol=1e-5
    )
    perfect = losses.DistillationLoss(hard, 1.0, 4.0).call(np.concatenate([labels, answers], axis=1), answers)
    np.testing.assert_allclose(perfect, 0, atol=1e-6)


def taught(teacher: keras.Model, weight: float):
    begin_anew("float32")
    model = models.build("vgg16", (32, 32, 1), 10, width=0.03, aux_weight=0.3)
    weighted, weights = losses.build_losses(tuple(model.output), 0.0, 0.0, (weight, 2.0))
    metrics = losses.build_metrics(tuple(model.output), distilled=True)
    model.compile(sgd(0.1), weighted, loss_weights=weights, metrics=metrics, jit_compile=False)
    return step_of(model, 8, teacher=teacher)


@pytest.mark.slow
def test_with_the_teacher_alone_labels_change_nothing_but_the_accuracy():
    begin_anew("float32", 7)
    teacher = models.inference_model(models.build("vgg16_inception", (32, 32, 1), 10, width=0.05))  # normalises batches
    before = [weight.numpy() for weight in teacher.weights]
    images, labels = digits(0)
    found = []
    for truth in (labels, tf.roll(labels, 1, axis=1)):
        step = taught(teacher, 1.0)
        step(images, truth)
        found.append((step.weights_sha256(), step.metrics()["accuracy"]))
    own = taught(teacher, 0.5)
    own(images, labels)
    assert found[0][0] == found[1][0] != own.weights_sha256()
    assert all(np.array_equal(one, other) for one, other in zip(before, teacher.weights, strict=True))
    said = keras.utils.to_categorical(own.predict(images).argmax(axis=1), 10)
    for truth, wanted in ((said, 1.0), (np.roll(said, 1, axis=1), 0.0)):
        step = taught(teacher, 1.0)
        step.load(own.state())
        step.reset_metrics()
        step(images, tf.constant(truth, tf.float32))
        assert step.metrics()["accuracy"] == pytest.approx(wanted)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher") / "run"
    done = train(place, "epochs=1", "seed=5")
    assert done.code == 0, done.err
    return place


@pytest.mark.slow
def test_another_teacher_in_the_same_place_is_refused(teacher: Path, tmp_path: Path):
    copy, place = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, copy, symlinks=True)
    words = (f"distill.teacher={copy}", "model.width=0.03", "epochs=2")
    assert train(place, *words, env={"INCEPTION_FAULT": "step:5"}).code != 0
    model = keras.models.load_model(copy / "best/model.keras")
    model.set_weights([weight + 1 for weight in model.get_weights()])
    model.save(copy / "best/model.keras")
    done = run_command("make", "resume", f"run={place}")
    assert done.code == 2
    assert "a run goes on as it was, but distill.teacher_sha256 was" in done.err


def test_teachers_that_can_not_teach(finished: Finished, tmp_path: Path):
    said = message(factory.check_sources, compose([f"distill.teacher={tmp_path}"]))
    assert said.startswith(f"distill.teacher must be the folder of a finished run, got {tmp_path}")
    copy = tmp_path / "unfinished"
    shutil.copytree(finished.path, copy, symlinks=True)
    (copy / "summary.json").unlink()
    assert "distill.teacher must be the folder of a finished run" in message(
        factory.check_sources, compose([f"distill.teacher={copy}"])
    )
    words = [f"distill.teacher={finished.path}", "data.image_size=48"]
    assert "distill.teacher must look at images of this run's shape, [48, 48, 1], got [32, 32, 1]" in message(
        factory.check_sources, compose(words)
    )
