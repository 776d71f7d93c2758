"""Test-time augmentation: averages the predictions over several views of each image.

A view maps uint8 `[N, H, W, C]` to the same shape; probabilities are averaged, as in Szegedy et al. 2014, section 7.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train.evaluation.metrics import Predict, log_softmax

View = Callable[[np.ndarray], np.ndarray]

CROP_FRACTION = 0.875  # of a side: 224 of 256 pixels, Krizhevsky et al. 2012, section 4.1


def unchanged(images: np.ndarray) -> np.ndarray:
    return images


def flip_horizontal(images: np.ndarray) -> np.ndarray:
    return images[:, :, ::-1]


def make_crop(vertical: float, horizontal: float) -> View:
    """Makes a view that crops 7/8 of each side, at 0 (top, left) to 1 (bottom, right), and resizes to full size."""

    def crop(images: np.ndarray) -> np.ndarray:
        import cv2

        height, width = images.shape[1:3]
        rows = max(1, round(CROP_FRACTION * height))
        columns = max(1, round(CROP_FRACTION * width))
        top = round(vertical * (height - rows))
        left = round(horizontal * (width - columns))
        crops = images[:, top : top + rows, left : left + columns]
        resized = [cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in crops]
        return np.stack(resized).reshape(images.shape)

    return crop


def with_flip(view: View) -> View:
    return lambda images: flip_horizontal(view(images))


FIVE_CROPS = [make_crop(vertical, horizontal) for vertical, horizontal in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))]

VIEWS_BY_NAME: dict[str, list[View]] = {
    "one": [unchanged],
    "mirror": [unchanged, flip_horizontal],
    # Centre and corners, each mirrored too: Krizhevsky et al. 2012.
    "ten_crop": [*FIVE_CROPS, *map(with_flip, FIVE_CROPS)],
}


def average_views(predict: Predict, views_name: str) -> Predict:
    """Returns a function whose logits' softmax is the mean over the named views; for one view, `predict` itself."""
    views = VIEWS_BY_NAME[views_name]
    if len(views) == 1:
        return predict

    def mean(images: object) -> np.ndarray:
        pixels = np.asarray(images)
        log_probabilities = [log_softmax(predict(view(pixels)).astype(np.float64)) for view in views]
        return np.logaddexp.reduce(log_probabilities, axis=0) - np.log(len(views))

    return mean
