"""Several views of an image, whose answers are averaged: test-time augmentation.

A view maps uint8 `[N, H, W, C]` to the same; probabilities are averaged, as in Szegedy et al. 2014, section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from train.evaluation.metrics import Predict, log_softmax

View = Callable[[np.ndarray], np.ndarray]

CROP_FRACTION = 0.875  # of a side: 224 of 256 pixels, Krizhevsky et al. 2012, section 4.1


def unchanged(images: np.ndarray) -> np.ndarray:
    return images


def flip_horizontal(images: np.ndarray) -> np.ndarray:
    return images[:, :, ::-1]


def make_crop(vertical: float, horizontal: float) -> View:
    """A part of 7/8 of each side, brought back to the full side. 0 is the upper or left edge, 1 the lower or right."""

    def cut(images: np.ndarray) -> np.ndarray:
        import cv2

        height, width = images.shape[1:3]
        rows, columns = max(1, round(CROP_FRACTION * height)), max(1, round(CROP_FRACTION * width))
        top, left = round(vertical * (height - rows)), round(horizontal * (width - columns))
        parts = images[:, top : top + rows, left : left + columns]
        sized = [cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in parts]
        return np.stack(sized).reshape(images.shape)

    return cut


def with_flip(view: View) -> View:
    return lambda images: flip_horizontal(view(images))


FIVE_CROPS = [make_crop(vertical, horizontal) for vertical, horizontal in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))]

VIEWS_BY_NAME: dict[str, list[View]] = {
    "one": [unchanged],
    "mirror": [unchanged, flip_horizontal],
    "ten_crop": [
        *FIVE_CROPS,
        *map(with_flip, FIVE_CROPS),
    ],  # centre and corners, each mirrored too: Krizhevsky et al. 2012
}


def average_views(predict: Predict, views_name: str) -> Predict:
    """Logits whose softmax is the mean over the named views; with a single view, those of `predict` themselves."""
    views = VIEWS_BY_NAME[views_name]
    if len(views) == 1:
        return predict

    def mean(images: Any) -> np.ndarray:
        pixels = np.asarray(images)
        logs = [log_softmax(predict(view(pixels)).astype(np.float64)) for view in views]
        return np.logaddexp.reduce(logs, axis=0) - np.log(len(views))

    return mean
