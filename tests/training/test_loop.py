"""The training loop: epochs, early stopping, checkpoints, signals, and resuming from any batch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support.training import (
    EXAMPLES,
    compile_model,
    dense_model,
    equal_states,
    full_step,
    make_batch,
    make_sgd,
    make_step,
    plain_step,
)
from train.evaluation.metrics import evaluate
from train.training.checkpoint import CheckpointPolicy
from train.training.early_stopping import EarlyStopping
from train.training.loop import DivergedError, Loop, Progress
from train.training.signals import Interrupted, SignalHandler
from train.training.step.tensorflow import Step

pytestmark = pytest.mark.usefixtures("fresh_keras")


class NoDisplay:
    """A display that shows nothing."""

    def step(self, *_): ...
    def epoch(self, *_): ...


@dataclasses.dataclass
class SavedState:
    """The contents of a checkpoint: progress, state, and the number of journal lines so far."""

    progress: dict[str, Any]
    state: dict[str, np.ndarray]
    lines: int

    def read(self) -> Progress:
        """The progress, as read from disk."""
        return Progress.from_dict(json.loads(json.dumps(self.progress)))

    @property
    def place(self) -> tuple[int, int, int]:
        return self.progress["epoch"], self.progress["batch"], self.progress["steps"]


class RecordingCallbacks:
    """Keeps everything that the loop reports in memory."""

    def __init__(self, step: Step, interval: CheckpointPolicy | None = None):
        self.trained, self.interval = step, interval
        self.journal: list[tuple[int, int, dict[str, float]]] = []
        self.best: list[int] = []
        self.saved: list[SavedState] = []
        self.periodic: list[bool] = []
        self.events: list[tuple] = []

    def broadcast_metrics(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def log_metrics(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.journal.append((epoch, step, values))

    def save_best(self, epoch: int, _: dict[str, float]) -> None:
        self.best.append(epoch)

    def on_step_end(self, progress: Progress) -> None:
        self.events.append(("trained", progress.steps))

    def should_checkpoint(self, progress: Progress) -> bool:
        if self.interval is None:
            return False
        return self.interval.should_save(progress.epoch, progress.steps, epoch_end=progress.batch == 0)

    def save(self, progress: Progress, *, periodic: bool) -> None:
        self.periodic.append(periodic)
        self.saved.append(SavedState(dataclasses.asdict(progress), self.trained.state(), len(self.journal)))

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Epoch, batch and step of each checkpoint."""
        return [saved.place for saved in self.saved]

    @property
    def reproducible_lines(self) -> list[tuple[int, int, dict[str, float]]]:
        """The journal without the timings, which differ between runs."""
        clock = {"images_per_second", "data_wait_fraction"}
        return [(e, s, {k: v for k, v in values.items() if k not in clock}) for e, s, values in self.journal]


def make_loop(
    step: Step,
    *,
    epochs: int = 3,
    progress: Progress | None = None,
    accuracies: list[float] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    interval: CheckpointPolicy | None = None,
    signals: SignalHandler | None = None,
    flawed: int = 0,
    **stopper,
) -> tuple[Loop, RecordingCallbacks]:
    """A loop of three batches per epoch; accuracies: results of validation; flawed: the number of a non-finite step."""
    recorder, found = RecordingCallbacks(step, interval), iter(accuracies or [0.1] * epochs)

    def batches(epoch: int, first: int) -> Iterator[tuple]:
        recorder.events.append(("asked", epoch, first))
        return (make_batch(seed=10 * epoch + n, flawed=3 * epoch + n + 1 == flawed) for n in range(first, 3))

    def validated() -> dict[str, float]:
        recorder.events.append(("validated",))
        return validate() if validate else {"accuracy": next(found), "loss": 1.0}

    loop = Loop(
        step=step,
        progress=progress or Progress(),
        epochs=epochs,
        steps_per_epoch=3,
        batch_size=EXAMPLES,
        log_every=2,
        batches=batches,
        validate=validated,
        callbacks=recorder,
        early_stopping=EarlyStopping(**({"metric": None, "patience_epochs": 1, "min_delta": 0.0} | stopper)),
        display=NoDisplay(),
        signals=signals or SignalHandler(),
    )
    return loop, recorder


def run_loop(step: Step, **options) -> tuple[Progress, RecordingCallbacks]:
    loop, recorder = make_loop(step, **options)
    loop.run()
    return loop.progress, recorder


class SignallingStep:
    """A step that sends these signals to the process during its `at`-th call."""

    def __init__(self, step: Step, at: int, *signals: int):
        self._step, self._at, self._signals, self._calls = step, at, signals, 0

    def __call__(self, images, labels):
        self._calls += 1
        if self._calls == self._at:
            for number in self._signals:
                os.kill(os.getpid(), number)
        self._step(images, labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def test_steps_count_over_the_run_and_every_epoch_ends_with_a_journal_line():
    progress, recorder = run_loop(plain_step())
    assert (progress.epoch, progress.batch, progress.steps) == (3, 0, 9)
    assert [(epoch, step) for epoch, step, _ in recorder.journal] == [
        (0, 2), (0, 3), (1, 4), (1, 6), (2, 8), (2, 9),
    ]  # fmt: skip
    assert {
        "train/loss",
        "train/total_loss",
        "validation/accuracy",
        "learning_rate",
        "images_per_second",
        "data_wait_fraction",
    } <= set(recorder.journal[-1][2])
    assert progress.timer.images == 8 * 8  # the first step, which makes buffers and kernels, is left out


def test_best_epoch_has_the_highest_accuracy_and_is_the_earliest_of_equals():
    step = plain_step()
    progress, recorder = run_loop(step, epochs=5, accuracies=[0.2, 0.5, 0.5, 0.4, 0.6])
    assert recorder.best == [0, 1, 4]
    assert (progress.best_epoch, progress.best_accuracy) == (4, 0.6)


PATIENT = {"metric": "validation/accuracy", "patience_epochs": 3, "min_delta": 0.01}


def test_early_stopping_waits_for_its_patience():
    accuracies = [0.2, 0.5, 0.5, 0.504, 0.5, 0.9, 0.9, 0.9, 0.9]
    progress, _ = run_loop(plain_step(), epochs=9, accuracies=accuracies, **PATIENT)
    assert (progress.epoch, progress.stopped_early, progress.best_accuracy) == (5, True, 0.504)


def test_nan_metric_is_not_an_improvement():
    stopper, progress = EarlyStopping("validation/loss", patience_epochs=3, min_delta=0.0), Progress()
    for loss in (math.nan, 3.0, 2.0, math.nan):
        stopper.update({"validation/loss": loss}, progress)
    assert (progress.best_metric, progress.epochs_without_improvement, progress.stopped_early) == (-2.0, 1, False)


def test_lower_loss_is_an_improvement():
    stopper, progress = EarlyStopping("validation/loss", patience_epochs=2, min_delta=0.0), Progress()

    def stops_at(loss: float) -> bool:
        stopper.update({"validation/loss": loss}, progress)
        return progress.stopped_early

    assert [stops_at(loss) for loss in (3.0, 2.0, 2.5, 2.1)] == [False, False, False, True]


def test_progress_survives_a_checkpoint():
    step = plain_step()
    progress, _ = run_loop(step, epochs=2, accuracies=[0.5, 0.4], **PATIENT)
    progress.rollbacks = 2
    assert (progress.best_metric, progress.epochs_without_improvement, progress.timer.images) == (0.5, 1, 5 * 8)
    again = Progress.from_dict(json.loads(json.dumps(dataclasses.asdict(progress))))
    assert again == progress
    assert again.timer is not progress.timer


@pytest.mark.parametrize("place", [(2, 0, 6), (2, 1, 7), (3, 0, 9), (3, 2, 11)])
def test_early_stopping_continues_counting_after_resuming(place: tuple[int, int, int]):
    step = plain_step()
    accuracies = [0.5, 0.505, 0.4, 0.4, 0.9, 0.9]
    whole, first = run_loop(step, epochs=6, accuracies=accuracies, interval=CheckpointPolicy(every_steps=1), **PATIENT)
    assert (whole.epoch, whole.epochs_without_improvement) == (4, 3)
    saved = first.saved[first.places.index(place)]
    progress, _ = run_loop(step, epochs=6, accuracies=accuracies[place[0] :], progress=saved.read(), **PATIENT)
    assert (progress.epoch, progress.steps, progress.stopped_early) == (4, 12, True)
    assert (progress.best_epoch, progress.best_accuracy) == (1, 0.505)


def test_early_stopped_run_does_not_train_again():
    step = plain_step()
    stopped = Progress(epoch=2, steps=6, epochs_without_improvement=3, stopped_early=True)
    progress, recorder = run_loop(step, epochs=6, progress=dataclasses.replace(stopped), **PATIENT)
    assert progress == stopped
    assert recorder.events == []


# ---------------------------------------------------------------------------------------------- checkpoints and signals


@pytest.mark.parametrize(
    ("interval", "places"),
    [
        (CheckpointPolicy(every_steps=2), [(0, 2, 2), (1, 1, 4), (2, 0, 6)]),
        (CheckpointPolicy(every_steps=3), [(1, 0, 3), (2, 0, 6)]),
        (CheckpointPolicy(), [(1, 0, 3), (2, 0, 6)]),
        (CheckpointPolicy(every_epochs=2), [(2, 0, 6)]),
        (None, []),
    ],
)
def test_checkpoints_are_saved_when_due_and_at_the_end(interval: CheckpointPolicy | None, places: list):
    """Once per position; a checkpoint at the end of an epoch has the position of the next one, batch 0."""
    progress, recorder = run_loop(plain_step(), epochs=2, interval=interval)
    assert recorder.places == [*places, (2, 0, 6)]
    assert recorder.saved[-1].progress == dataclasses.asdict(progress)
    assert [saved.lines for saved in recorder.saved if saved.place == (1, 0, 3)] == [2] * places.count((1, 0, 3))
    assert all(saved.state["count"] == saved.progress["steps"] for saved in recorder.saved)


@pytest.mark.parametrize("what", ["loss", "gradients"])
@pytest.mark.parametrize(
    ("flawed", "interval", "saved", "lines"),
    [
        (4, None, [], [2, 3]),  # found where a line is due
        (5, None, [], [2, 3, 4]),  # found at the end of the epoch, a step later
        (5, CheckpointPolicy(every_steps=1), [1, 2, 3, 4], [2, 3, 4]),  # found where a checkpoint is due
        (6, CheckpointPolicy(every_steps=6), [], [2, 3, 4]),
        (7, CheckpointPolicy(every_steps=4), [4], [2, 3, 4, 6]),
    ],
)
def test_non_finite_state_is_neither_saved_nor_logged(
    what: str, flawed: int, interval: CheckpointPolicy | None, saved: list[int], lines: list[int]
):
    step = plain_step(what)
    loop, recorder = make_loop(step, interval=interval, flawed=flawed)
    epoch = (flawed - 1) // 3
    sentence = rf"^training diverged: non-finite {what} at step {flawed} \(epoch {epoch + 1}\)$"
    with pytest.raises(DivergedError, match=sentence) as diverged:
        loop.run()
    assert (diverged.value.epoch, diverged.value.step) == (epoch, flawed)
    assert [saved.progress["steps"] for saved in recorder.saved] == saved
    assert all(np.isfinite(value).all() for saved in recorder.saved for value in saved.state.values())
    assert [step for _, step, _ in recorder.journal] == lines
    assert recorder.best == [0]


def test_divergence_ends_the_run_and_names_the_step():
    step = make_step(compile_model(dense_model(), make_sgd(1e38)))
    loop, recorder = make_loop(step)
    with pytest.raises(DivergedError, match=r"^training diverged: non-finite loss at step 2 \(epoch 1\)$"):
        loop.run()
    assert (recorder.journal, recorder.saved) == ([], [])


def test_signal_stops_the_loop_after_the_current_step():
    """The signal arrives during the second step, which is completed and saved; no third one starts."""
    step = SignallingStep(plain_step(), 2, signal.SIGTERM)
    with SignalHandler().installed() as signals, pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as stop:
        loop, recorder = make_loop(step, signals=signals)
        loop.run()
    assert recorder.events == [("asked", 0, 0), ("trained", 1), ("trained", 2)]
    assert (recorder.places, recorder.periodic) == ([(0, 2, 2)], [False])
    assert (stop.value.signal_number, stop.value.immediate) == (signal.SIGTERM, False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_signal_stops_the_loop_without_a_checkpoint():
    step = SignallingStep(plain_step(), 2, signal.SIGINT, signal.SIGTERM)
    with SignalHandler().installed() as signals, pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as stop:
        loop, recorder = make_loop(step, signals=signals)
        loop.run()
    assert recorder.events == [("asked", 0, 0), ("trained", 1)]
    assert recorder.saved == []
    assert (stop.value.signal_number, stop.value.immediate) == (signal.SIGTERM, True)


def test_signal_does_not_save_a_non_finite_state():
    step = SignallingStep(plain_step("loss"), 2, signal.SIGINT)
    with (
        SignalHandler().installed() as signals,
        pytest.raises(DivergedError, match=r"non-finite loss at step 1 \(epoch 1\)$"),
    ):
        loop, recorder = make_loop(step, signals=signals, flawed=1)
        loop.run()
    assert recorder.saved == []


# ------------------------------------------------------------------------------------------------------------- resuming


def make_validation(step: Step) -> Callable[[], dict[str, float]]:
    def validate() -> dict[str, float]:
        with step.using_ema_weights():
            found = evaluate(step.predict, [tuple(part.numpy() for part in make_batch(seed=99))], EXAMPLES)
        return {"accuracy": found["accuracy"], "loss": found["loss"]}

    return validate


def without_timer(progress: Progress) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "timer"}


@pytest.mark.parametrize("kind", ["float32", "everything"])
def test_resuming_at_any_batch_gives_the_same_journal_and_weights(kind: str):
    first = full_step(kind)
    whole, uncut = run_loop(first, validate=make_validation(first), interval=CheckpointPolicy(every_steps=1))
    assert uncut.places[:-1] == [(n // 3, n % 3, n) for n in range(1, 10)]
    end = first.state()
    other = full_step(kind, seed=2)
    for saved in uncut.saved[:-2]:
        other.load(saved.state)
        progress, rest = run_loop(other, validate=make_validation(other), progress=saved.read())
        epoch, first_batch, _ = saved.place
        asked = [event[1:] for event in rest.events if event[0] == "asked"]
        assert asked == [(epoch, first_batch), *((later, 0) for later in range(epoch + 1, 3))]
        # An epoch's means cover all of its batches, also those of the previous attempt.
        assert uncut.reproducible_lines[: saved.lines] + rest.reproducible_lines == uncut.reproducible_lines
        assert equal_states(other.state(), end)
        assert other.weights_sha256() == first.weights_sha256()
        assert without_timer(progress) == without_timer(whole)


@pytest.mark.parametrize("when", ["the epoch's last step", "validation"])
def test_resuming_before_validation_validates_first(when: str):
    """No batch is trained twice, and the training metrics of the epoch are kept."""
    first = full_step("float32")
    whole, uncut = run_loop(first, validate=make_validation(first))
    end = first.state()

    def stopped() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        list(signals.guard(range(2)))
        raise AssertionError("a signal was not heeded")

    step = SignallingStep(full_step("float32"), 3 if when == "the epoch's last step" else 0, signal.SIGINT)
    with SignalHandler().installed() as signals, pytest.raises(Interrupted):
        loop, cut = make_loop(step, signals=signals, validate=stopped)
        loop.run()
    assert [event for event in cut.events if event[0] == "validated"] == [("validated",)] * (when == "validation")
    assert cut.places == [(0, 3, 3)]
    assert [line[1] for line in cut.journal] == [2]

    other = full_step("float32", seed=2)
    other.load(cut.saved[0].state)
    progress, rest = run_loop(other, validate=make_validation(other), progress=cut.saved[0].read())
    assert rest.events[:4] == [("asked", 0, 3), ("validated",), ("asked", 1, 0), ("trained", 4)]
    assert cut.reproducible_lines + rest.reproducible_lines == uncut.reproducible_lines
    assert equal_states(other.state(), end)
    assert without_timer(progress) == without_timer(whole)
