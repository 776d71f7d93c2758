"""train/scores.py and train/views.py: numbers of answers, reckoned by hand or by scikit-learn's own one-liners."""

import json

import numpy as np
import pytest
from sklearn import metrics

from support.commands import message
from train.evaluation import test_time_augmentation
from train.evaluation.metrics import (
    ClassificationResult,
    bootstrap_interval,
    calibration_bins,
    compute_metrics,
    evaluate,
    log_softmax,
    predict_all,
    summary_metrics,
)

CLASSES = ("cat", "dog", "eel")
# Six answers: right, right, wrong and sure, right, wrong, right.
LOGITS = np.log(
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.2, 0.45, 0.35], [0.1, 0.6, 0.3]]
)
TRUTH = np.array([0, 1, 1, 0, 0, 1])


def outcome() -> ClassificationResult:
    return ClassificationResult(LOGITS, TRUTH, CLASSES)


def test_the_numbers_of_six_answers():
    found = compute_metrics(outcome())
    assert found["examples"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["loss"] == pytest.approx(-np.log([0.7, 0.8, 0.05, 0.5, 0.2, 0.6]).mean())
    assert found["top5_accuracy"] == 1
    cat, dog, eel = found["classes"]
    assert (cat["examples"], dog["examples"], eel["examples"]) == (3, 3, 0)
    assert (cat["precision"], cat["recall"], cat["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found["confusion"] == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert json.loads(json.dumps(found)) == found


def test_a_class_without_an_example_has_no_recall_and_counts_in_no_mean():
    found = compute_metrics(outcome())
    eel = found["classes"][2]
    assert (eel["recall"], eel["roc_auc"], eel["f1"]) == (None, None, None)
    assert found["macro_recall"] == pytest.approx(2 / 3)
    areas = [metrics.roc_auc_score(number == TRUTH, np.exp(LOGITS)[:, number]) for number in (0, 1)]
    assert found["roc_auc"] == pytest.approx(np.mean(areas))


def test_one_class_alone_has_no_area():
    found = compute_metrics(ClassificationResult(LOGITS, np.zeros(6, int), CLASSES))
    assert found["roc_auc"] is None
    assert found["accuracy"] == pytest.approx(3 / 6)


def test_calibration_is_the_gap_between_saying_and_being_right():
    bins = calibration_bins(outcome())
    assert [row["examples"] for row in bins] == [1, 1, 1, 1, 1, 1]
    assert sum(row["examples"] for row in bins) == 6
    by_hand = np.abs(np.array([0.7, 0.8, 0.9, 0.5, 0.45, 0.6]) - [1, 1, 0, 1, 0, 1]).mean()
    assert compute_metrics(outcome())["ece"] == pytest.approx(by_hand)


def test_confidence_on_an_edge_falls_into_the_lower_bin_and_certainty_into_the_last():
    sure = ClassificationResult(np.array([[50.0, -50.0], [0.0, 0.0]]), np.array([0, 0]), ("a", "b"))
    low, high = calibration_bins(sure)
    assert (low["examples"], low["confidence"]) == (1, 0.5)
    assert (high["high"], high["accuracy"]) == (1.0, 1.0)


def test_the_interval_is_that_of_resampling_examples():
    right = np.arange(200) < 150
    drawn = np.random.default_rng(1).choice(right, (4000, 200)).mean(1)
    low, high = bootstrap_interval(150, 200)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert bootstrap_interval(150, 200) == [low, high]
    assert bootstrap_interval(10, 10) == [1.0, 1.0]


def test_answers_that_are_no_numbers_are_refused():
    broken = LOGITS.copy()
    broken[2, 1] = np.nan
    assert message(ClassificationResult, broken, TRUTH, CLASSES).startswith(
        "the network's answers must be finite, got 1 of 6"
    )


def test_every_example_counts_once():
    batches = [(LOGITS[:4], np.eye(3)[TRUTH[:4]]), (LOGITS[4:], np.eye(3)[TRUTH[4:]])]
    logits, truth = predict_all(lambda images: images, batches, 6)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(truth, TRUTH)
    assert evaluate(lambda images: images, batches, 6) == summary_metrics(LOGITS, TRUTH)
    for expected in (5, 7):
        assert "got 6 of" in message(predict_all, lambda images: images, batches, expected)


# ------------------------------------------------------------------------------------------------------------- views


def brightness(images: np.ndarray) -> np.ndarray:
    """Logits of two classes that depend on where the light is: left, right."""
    return np.stack([images[:, :, :4].mean((1, 2, 3)), images[:, :, 4:].mean((1, 2, 3))], 1) / 50


def lit() -> np.ndarray:
    images = np.zeros((3, 8, 8, 1), np.uint8)
    images[0, :, :4], images[1, :, 4:], images[2] = 200, 100, 50
    return images


def test_one_view_is_the_network_itself():
    assert test_time_augmentation.average_views(brightness, "one") is brightness


def test_mirrored_answers_are_averaged_as_probabilities():
    found = np.exp(test_time_augmentation.average_views(brightness, "mirror")(lit()))
    np.testing.assert_allclose(found, 0.5)  # what speaks for left speaks for right in the mirror

    def asymmetric(images: np.ndarray) -> np.ndarray:
        return np.stack([images[:, 0, 0, 0] / 50.0, np.zeros(len(images))], 1)

    plain, mirrored = (np.exp(log_softmax(asymmetric(pixels))) for pixels in (lit(), lit()[:, :, ::-1]))
    np.testing.assert_allclose(
        np.exp(test_time_augmentation.average_views(asymmetric, "mirror")(lit())), (plain + mirrored) / 2
    )


def test_ten_crops_are_ten_and_keep_the_size():
    seen = []

    def predict(images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return brightness(images)

    assert test_time_augmentation.average_views(predict, "ten_crop")(lit()).shape == (3, 2)
    assert [(images.shape, images.dtype) for images in seen] == [((3, 8, 8, 1), np.uint8)] * 10
    np.testing.assert_array_equal(seen[5], seen[0][:, :, ::-1])
    corner = np.zeros((1, 16, 16, 1), np.uint8)
    corner[0, 0, 0] = 255
    assert [bool(view(corner).any()) for view in test_time_augmentation.FIVE_CROPS] == [
        False,
        True,
        False,
        False,
        False,
    ]
