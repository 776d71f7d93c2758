"""Metrics and test-time augmentation, checked by hand or against scikit-learn."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics

from support.commands import message
from train.evaluation import test_time_augmentation
from train.evaluation.metrics import (
    ClassificationResult,
    calibration_bins,
    compute_metrics,
    cross_entropy,
    evaluate,
    label_rank,
    log_softmax,
    predict_all,
    summary_metrics,
)

CLASSES = ("cat", "dog", "eel")
# Six predictions: right, right, wrong with high confidence, right, wrong, right.
LOGITS = np.log(
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.2, 0.45, 0.35], [0.1, 0.6, 0.3]]
)
TRUTH = np.array([0, 1, 1, 0, 0, 1])


def outcome() -> ClassificationResult:
    return ClassificationResult(LOGITS, TRUTH, CLASSES)


def test_metrics_of_six_predictions():
    scores = compute_metrics(outcome())
    assert scores["examples"] == 6
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["loss"] == pytest.approx(-np.log([0.7, 0.8, 0.05, 0.5, 0.2, 0.6]).mean())
    assert scores["top5_accuracy"] == 1
    cat, dog, eel = scores["classes"]
    assert (cat["examples"], dog["examples"], eel["examples"]) == (3, 3, 0)
    assert (cat["precision"], cat["recall"], cat["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert scores["confusion"] == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert json.loads(json.dumps(scores)) == scores


def test_class_without_examples_has_no_recall_and_is_left_out_of_means():
    scores = compute_metrics(outcome())
    eel = scores["classes"][2]
    assert (eel["recall"], eel["roc_auc"], eel["f1"]) == (None, None, None)
    assert scores["macro_recall"] == pytest.approx(2 / 3)
    areas = [metrics.roc_auc_score(number == TRUTH, np.exp(LOGITS)[:, number]) for number in (0, 1)]
    assert scores["roc_auc"] == pytest.approx(np.mean(areas))


def test_single_class_has_no_roc_auc():
    scores = compute_metrics(ClassificationResult(LOGITS, np.zeros(6, int), CLASSES))
    assert scores["roc_auc"] is None
    assert scores["accuracy"] == pytest.approx(3 / 6)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    bins = calibration_bins(outcome())
    assert [row["examples"] for row in bins] == [1, 1, 1, 1, 1, 1]
    assert sum(row["examples"] for row in bins) == 6
    by_hand = np.abs(np.array([0.7, 0.8, 0.9, 0.5, 0.45, 0.6]) - [1, 1, 0, 1, 0, 1]).mean()
    assert compute_metrics(outcome())["ece"] == pytest.approx(by_hand)


def test_edge_confidence_falls_into_the_lower_bin_and_certainty_into_the_last():
    sure = ClassificationResult(np.array([[50.0, -50.0], [0.0, 0.0]]), np.array([0, 0]), ("a", "b"))
    low, high = calibration_bins(sure)
    assert (low["examples"], low["confidence"]) == (1, 0.5)
    assert (high["high"], high["accuracy"]) == (1.0, 1.0)


def test_accuracy_has_its_wilson_interval():
    low, high = compute_metrics(outcome())["accuracy_interval"]
    assert (low, high) == pytest.approx((0.2999933, 0.9032286), abs=1e-7)  # 4 of 6, by the formula


def test_non_finite_logits_are_rejected():
    broken = LOGITS.copy()
    broken[2, 1] = np.nan
    assert message(ClassificationResult, broken, TRUTH, CLASSES).startswith(
        "the network's output is not finite for 1 of 6 examples"
    )


def test_every_example_is_counted_once():
    batches = [(LOGITS[:4], np.eye(3)[TRUTH[:4]]), (LOGITS[4:], np.eye(3)[TRUTH[4:]])]
    logits, truth = predict_all(lambda images: images, batches, 6)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(truth, TRUTH)
    assert evaluate(lambda images: images, batches, 6) == summary_metrics(LOGITS, TRUTH)
    for expected in (5, 7):
        assert f"evaluation saw 6 examples instead of {expected}; " in message(
            predict_all, lambda images: images, batches, expected
        )


# ------------------------------------------------------------------------------------------------------------- views


def brightness(images: np.ndarray) -> np.ndarray:
    """Logits of two classes: the brightness of the left and the right half."""
    return np.stack([images[:, :, :4].mean((1, 2, 3)), images[:, :, 4:].mean((1, 2, 3))], 1) / 50


def lit() -> np.ndarray:
    images = np.zeros((3, 8, 8, 1), np.uint8)
    images[0, :, :4], images[1, :, 4:], images[2] = 200, 100, 50
    return images


def test_single_view_returns_the_network_itself():
    assert test_time_augmentation.average_views(brightness, "one") is brightness


def test_mirrored_views_are_averaged_as_probabilities():
    probabilities = np.exp(test_time_augmentation.average_views(brightness, "mirror")(lit()))
    np.testing.assert_allclose(probabilities, 0.5)  # evidence for left is evidence for right in the mirrored view

    def asymmetric(images: np.ndarray) -> np.ndarray:
        return np.stack([images[:, 0, 0, 0] / 50.0, np.zeros(len(images))], 1)

    plain, mirrored = (np.exp(log_softmax(asymmetric(pixels))) for pixels in (lit(), lit()[:, :, ::-1]))
    np.testing.assert_allclose(
        np.exp(test_time_augmentation.average_views(asymmetric, "mirror")(lit())), (plain + mirrored) / 2
    )


def test_ten_crops_are_ten_images_of_the_input_size():
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


def test_evaluation_matches_calculations_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.4, 0.4, 0.2]]))
    labels = np.eye(3)[[0, 0, 1]]
    found = evaluate(lambda images: logits[images], [(np.array([0, 1]), labels[:2]), (np.array([2]), labels[2:])], 3)
    assert found["examples"] == 3
    assert found["accuracy"] == pytest.approx(1 / 3)  # of equal logits the lower index comes first
    assert found["top5_accuracy"] == 1.0
    assert found["loss"] == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3)


def test_evaluation_rejects_a_wrong_number_of_examples():
    batches = [(np.zeros((2, 1)), np.eye(3)[[0, 1]])]
    with pytest.raises(ValueError, match="evaluation saw 2 examples instead of 3"):
        evaluate(lambda images: np.zeros((len(images), 3)), batches, 3)


def test_label_rank_counts_higher_logits():
    logits = np.arange(10.0)[None].repeat(2, 0)
    assert label_rank(logits, np.array([5, 4])).tolist() == [4, 5]


def test_nan_logits_are_wrong():
    assert label_rank(np.full((1, 4), np.nan), np.array([0])).tolist() == [4]
    assert math.isnan(cross_entropy(np.full((1, 4), np.nan), np.array([0]))[0])
