"""Losses, optimizers, schedules, the step, the loop and the evaluation, on networks small enough to reckon by hand."""

from __future__ import annotations

import io
import math
import os
import re
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from train import losses, models, optim, progress
from train.evaluate import cross_entropy, evaluate, rank_of_truth
from train.loop import DivergedError, Interrupted, Outcome, Stopper, Stops, fit
from train.step.tensorflow import Step

CLASSES = 3


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.utils.clear_session()
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)


def dense_model(aux: bool = False) -> keras.Model:
    """One dense layer after batch normalisation; `aux` adds a second head."""
    images = keras.Input((4,))
    x = keras.layers.BatchNormalization(name="bn")(images)
    outputs = {"main": keras.layers.Dense(CLASSES, name="dense", bias_initializer="ones")(x)}
    if aux:
        outputs["aux"] = keras.layers.Dense(CLASSES, name="aux_dense")(x)
    return keras.Model(images, outputs)


def constant_rate(rate: float) -> optim.Warmup:
    return optim.build_schedule("constant", learning_rate=rate, epochs=1, epoch_steps=100, warmup_epochs=0)


def sgd(rate: float = 0.1, momentum: float = 0.0, **common) -> keras.optimizers.Optimizer:
    given = {"weight_decay": 0.0, "gradient_clip": None, "gradient_accumulation": 1, "ema": None} | common
    return optim.build("sgd", constant_rate(rate), momentum=momentum, nesterov=False, **given)


def compiled(model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **loss) -> keras.Model:
    names = tuple(model.output)
    weighted, weights = losses.build(names, **({"aux_weight": 0.3, "label_smoothing": 0.0} | loss))
    model.compile(optimizer or sgd(), weighted, loss_weights=weights, metrics=losses.metrics(names), jit_compile=False)
    return model


def step_of(model: keras.Model) -> Step:
    return Step(model, keras.Model(model.input, model.output["main"]), jit=False)


def batch(examples: int = 8, seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    draw = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype="float32")[draw.integers(CLASSES, size=examples)]
    return tf.constant(draw.normal(size=(examples, 4)), tf.float32), tf.constant(labels)


# ---------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_main_plus_a_third_of_each_auxiliary_loss(name: str, heads: list[str], smoothing: float):
    model = compiled(models.build(name, (32, 32, 1), 10, width=0.05), label_smoothing=smoothing)
    assert sorted(model.output) == sorted(["main", *heads])
    draw = np.random.default_rng(0)
    logits = {output: draw.normal(size=(16, 10)).astype("float32") for output in model.output}
    truth = draw.integers(10, size=16)
    labels = np.eye(10, dtype="float32")[truth]
    found = model.compute_loss(y=dict.fromkeys(logits, tf.constant(labels)), y_pred=logits)

    def by_hand(output: str) -> float:
        soft = labels.astype("float64") * (1 - smoothing) + smoothing / 10
        x = logits[output].astype("float64")
        return float(-(soft * (x - np.log(np.exp(x).sum(1, keepdims=True)))).sum(1).mean())

    expected = by_hand("main") + 0.3 * sum(by_hand(head) for head in heads)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert abs(expected - by_hand("main")) > 0.5  # the auxiliary part is no rounding error


def test_without_auxiliary_heads_the_loss_is_the_main_one():
    model = compiled(models.build("vgg16_inception", (32, 32, 1), 10, width=0.05, aux_weight=0), aux_weight=0.0)
    assert list(model.output) == ["main"]
    step = step_of(model)
    images = tf.zeros((4, 32, 32, 1), tf.uint8)
    step(images, tf.one_hot([0, 1, 2, 3], 10))
    assert sorted(step.metrics()) == ["loss", "main_accuracy", "main_loss"]


@pytest.mark.parametrize(("name", "heads"), [("vgg16_inception", ["aux"]), ("inception_v1", ["aux_1", "aux_2"])])
def test_the_auxiliary_losses_reach_their_heads_and_the_trunk(name: str, heads: list[str]):
    """With a weight of nought for the auxiliary losses their heads get no gradient, and the trunk another one."""
    model = models.build(name, (32, 32, 1), 10, width=0.05)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1)).astype("float32")
    labels = dict.fromkeys(model.output, tf.one_hot([0, 1, 2, 3], 10))

    def gradients(aux_weight: float) -> dict[str, float]:
        compiled(model, aux_weight=aux_weight)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=labels, y_pred=model(images, training=False))
        found = tape.gradient(loss, [v.value for v in model.trainable_variables], unconnected_gradients="zero")
        return {v.path: float(tf.norm(g)) for v, g in zip(model.trainable_variables, found, strict=True)}

    with_heads, without = gradients(0.3), gradients(0.0)
    kernels = [path for path in with_heads if path.startswith("aux") and path.endswith("kernel")]
    assert len(kernels) >= len(heads)
    assert all(with_heads[path] > 0 and without[path] == 0 for path in kernels)
    first = next(path for path in with_heads if path.endswith("kernel"))
    assert with_heads[first] > 0
    assert with_heads[first] != without[first]


def test_a_loss_needs_a_main_output():
    with pytest.raises(ValueError, match="outputs must contain main, got aux"):
        losses.build(["aux"], 0.3, 0.0)


# ------------------------------------------------------------------------------------------- optimizers, schedules


def test_weight_decay_spares_biases_and_batch_normalisation():
    model = compiled(dense_model(), sgd(rate=0.5, weight_decay=0.1))
    before = {variable.path: variable.numpy() for variable in model.trainable_variables}
    model.optimizer.build(model.trainable_variables)
    model.optimizer.apply([tf.zeros_like(v.value) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        factor = 1 - 0.5 * 0.1 if variable.path.endswith("kernel") else 1.0
        np.testing.assert_allclose(variable.numpy(), before[variable.path] * factor, rtol=1e-6, err_msg=variable.path)


def test_gradients_are_clipped_to_a_global_norm():
    model = compiled(dense_model(), sgd(rate=1.0, gradient_clip=0.01))
    before = [variable.numpy() for variable in model.trainable_variables]
    step_of(model)(*batch())
    moved = [v.numpy() - old for v, old in zip(model.trainable_variables, before, strict=True)]
    assert math.sqrt(sum(float((m**2).sum()) for m in moved)) == pytest.approx(0.01, rel=1e-4)


def test_accumulated_gradients_move_the_weights_once_by_their_mean():
    def run(accumulation: int, rounds: list[int]) -> np.ndarray:
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        model = compiled(dense_model(), sgd(gradient_accumulation=accumulation))
        model.get_layer("bn").trainable = False  # its batch statistics would differ between the two ways
        step, start = step_of(model), model.get_layer("dense").kernel.numpy()
        for seed in rounds:
            step(*batch(seed=seed))
        return model.get_layer("dense").kernel.numpy() - start

    assert not run(2, [1]).any()
    both, first, second = run(2, [1, 2]), run(1, [1]), run(1, [2])
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-7)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averaged_weights_are_swapped_in_and_back_to_the_bit(policy: str):
    keras.config.set_dtype_policy(policy)
    model = compiled(dense_model(), sgd(ema=0.5))
    step, kernel = step_of(model), model.get_layer("dense").kernel
    step(*batch())
    first = kernel.numpy()  # Keras starts the average here
    step(*batch(seed=1))
    after = kernel.numpy()
    with step.averaged():
        np.testing.assert_allclose(kernel.numpy(), (first + after) / 2, rtol=1e-6)
    assert kernel.numpy().tobytes() == after.tobytes()


def rates(name: str, steps: list[int], warmup: float = 0.0, **options) -> list[float]:
    rate = optim.build_schedule(name, learning_rate=0.8, epochs=10, epoch_steps=10, warmup_epochs=warmup, **options)
    return [round(float(rate(step)), 6) for step in steps]


def test_schedules_give_these_rates():
    assert rates("constant", [0, 99]) == [0.8, 0.8]
    assert rates("constant", [0, 9, 19, 20, 99], warmup=2) == [0.04, 0.4, 0.8, 0.8, 0.8]
    assert rates("cosine", [0, 50, 100], final_fraction=0.1) == [0.8, 0.44, 0.08]
    assert rates("cosine", [0, 9, 10, 55, 100], warmup=1, final_fraction=0.0) == [0.08, 0.8, 0.8, 0.4, 0.0]
    assert rates("exponential", [0, 19, 20, 40], factor=0.5, every_epochs=2) == [0.8, 0.8, 0.4, 0.2]
    assert rates("step", [0, 50, 51, 76], factor=0.1, milestones=[0.5, 0.75]) == [0.8, 0.8, 0.08, 0.008]


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, exponential, step, got linear"):
        optim.build_schedule("linear", learning_rate=1, epochs=1, epoch_steps=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, rmsprop, got lion"):
        optim.build("lion", constant_rate(1), weight_decay=0, gradient_clip=None, gradient_accumulation=1, ema=None)


# ------------------------------------------------------------------------------------------------------------ step


def test_the_step_measures_what_keras_would():
    step = step_of(compiled(dense_model(aux=True)))
    images, labels = batch()
    step(images, labels)
    first = step.metrics()
    assert sorted(first) == ["aux_accuracy", "aux_loss", "loss", "main_accuracy", "main_loss"]
    assert first["loss"] == pytest.approx(first["main_loss"] + 0.3 * first["aux_loss"], rel=1e-6)
    step.reset_metrics()
    assert step.metrics()["loss"] == 0.0


def test_the_digest_of_the_weights_tells_one_bit():
    model = compiled(dense_model())
    step = step_of(model)
    digest = step.weights_sha256()
    assert digest == step.weights_sha256()
    bias = model.get_layer("dense").bias
    bias.assign(np.nextafter(bias.numpy(), np.float32(2)))
    assert step.weights_sha256() != digest


# ------------------------------------------------------------------------------------------------------------ loop


class Quiet:
    """Nobody looks on."""

    def step(self, *_): ...
    def epoch(self, *_): ...


def run_loop(model: keras.Model, *, epochs: int = 3, accuracies=None, stops=None, step=None, **stopper):
    """Three batches an epoch; `accuracies` are what validation is to find."""
    journal, kept, outcome = [], [], Outcome()
    found = iter(accuracies or [0.1] * epochs)
    stopping = {"metric": None, "patience_epochs": 1, "min_delta": 0.0} | stopper
    fit(
        step or step_of(model),
        epochs=epochs,
        steps=3,
        log_every=2,
        batches=lambda epoch: [batch(seed=10 * epoch + n) for n in range(3)],
        validate=lambda: {"main_accuracy": next(found), "loss": 1.0},
        record=lambda epoch, step, values: journal.append((epoch, step, values)),
        keep_best=lambda epoch, _: kept.append(epoch),
        stopper=Stopper(**stopping),
        watch=Quiet(),
        outcome=outcome,
        stops=stops or Stops(),
    )
    return outcome, journal, kept


def test_steps_count_over_the_whole_run_and_epochs_end_with_a_line():
    outcome, journal, _ = run_loop(compiled(dense_model()))
    assert (outcome.epochs, outcome.steps) == (3, 9)
    assert [(epoch, step) for epoch, step, _ in journal] == [
        (0, 2), (0, 3), (1, 4), (1, 6), (2, 8), (2, 9),
    ]  # fmt: skip
    assert {
        "train/loss",
        "validation/main_accuracy",
        "learning_rate",
        "images_per_second",
        "data_wait_fraction",
    } <= set(journal[-1][2])
    assert outcome.clock.images == 8 * 8  # the first step, which traces the graph, is left out


def test_the_best_epoch_is_the_highest_and_of_equals_the_earlier():
    outcome, _, kept = run_loop(compiled(dense_model()), epochs=5, accuracies=[0.2, 0.5, 0.5, 0.4, 0.6])
    assert kept == [0, 1, 4]
    assert (outcome.best_epoch, outcome.best_accuracy) == (4, 0.6)


def test_early_stopping_waits_for_its_patience():
    outcome, _, _ = run_loop(
        compiled(dense_model()),
        epochs=9,
        accuracies=[0.2, 0.5, 0.5, 0.504, 0.5, 0.9, 0.9, 0.9, 0.9],
        metric="validation/main_accuracy",
        patience_epochs=3,
        min_delta=0.01,
    )
    assert (outcome.epochs, outcome.stopped_early, outcome.best_accuracy) == (5, True, 0.504)


def test_a_falling_metric_improves_downwards():
    stopper = Stopper("validation/loss", patience_epochs=2, min_delta=0.0)
    assert [stopper.done({"validation/loss": loss}) for loss in (3.0, 2.0, 2.5, 2.1)] == [False, False, False, True]


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step():
    model = compiled(dense_model(), sgd(rate=1e38))
    with pytest.raises(
        DivergedError, match=r"train/loss must stay finite, got (nan|inf) in epoch 1 at step 2; use a lower"
    ):
        run_loop(model)


def test_a_signal_is_obeyed_between_two_batches():
    """It comes in the middle of the second step, which is finished, and no third is begun."""
    steps = []

    class Noisy(Step):
        def __call__(self, images, labels):
            steps.append("begun")
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__call__(images, labels)
            steps.append("done")

    model = compiled(dense_model())
    noisy = Noisy(model, keras.Model(model.input, model.output["main"]), jit=False)
    with Stops().listening() as stops, pytest.raises(Interrupted, match="stopped by SIGTERM") as stop:
        run_loop(model, stops=stops, step=noisy)
    assert steps == ["begun", "done", "begun", "done"]
    assert stop.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_leaves_at_once_and_so_does_one_outside_the_loop():
    with Stops().listening() as stops, stops.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    with Stops().listening(), pytest.raises(Interrupted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_validation_heeds_a_signal_too():
    with Stops().listening() as stops, stops.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            list(stops.heed([1, 2, 3]))
    assert list(Stops().heed([1, 2, 3])) == [1, 2, 3]


def test_the_bar_shows_training_and_validation_together(monkeypatch: pytest.MonkeyPatch):
    """On a terminal of its own: after the first epoch both accuracies stay in sight."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    epoch = {"train/loss": 1.0, "train/main_accuracy": 0.25, "validation/main_accuracy": 0.75}
    with progress.Terminal(epochs=2, steps=3, batch_size=8) as bar:
        bar.epoch(0, epoch | {"images_per_second": 5.0, "data_wait_fraction": 0.01})
        bar.step(1, 4, {"train/main_accuracy": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "epoch 2/2" in shown
    assert "4/6" in shown
    assert "accuracy train 0.5000  validation 0.7500" in shown


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_reckons_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.4, 0.4, 0.2]]))
    labels = np.eye(3)[[0, 0, 1]]
    found = evaluate(lambda images: logits[images], [(np.array([0, 1]), labels[:2]), (np.array([2]), labels[2:])], 3)
    assert found["examples"] == 3
    assert found["accuracy"] == pytest.approx(1 / 3)  # of two equal logits the lower index stands first
    assert found["top5_accuracy"] == 1.0
    assert found["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3)


def test_evaluation_refuses_a_count_that_is_off():
    batches = [(np.zeros((2, 1)), np.eye(3)[[0, 1]])]
    with pytest.raises(ValueError, match="every example once, got 2 of 3"):
        evaluate(lambda images: np.zeros((len(images), 3)), batches, 3)


def test_top5_looks_at_five():
    logits = np.arange(10.0)[None].repeat(2, 0)
    assert rank_of_truth(logits, np.array([5, 4])).tolist() == [4, 5]


def test_logits_that_are_no_numbers_are_wrong():
    assert rank_of_truth(np.full((1, 4), np.nan), np.array([0])).tolist() == [4]
    assert math.isnan(cross_entropy(np.full((1, 4), np.nan), np.array([0]))[0])
