"""Inception's random resized crop with distorted colours, at the size that is needed.

Where the crop lies and the map of its colours are worked out for many examples at once, in NumPy. OpenCV resizes and
colours, and holds Python's lock for none of it; with TensorFlow's operations the whole took twice as long.
"""

import math
import threading
from dataclasses import dataclass

import cv2
import numpy as np

from train.data.decode import JPEG_PARTS

cv2.setNumThreads(1)  # whoever crops has threads of its own

PURPOSE = "crop"
DRAWS = 9  # area, stretch, place (2), mirror, brightness, contrast, saturation, hue
BRIGHTNESS = 32.0  # of 255, added
CONTRAST = SATURATION = 0.5  # around 1
HUE = 0.2  # of the circle
EVERY = 8  # the mean of an image is that of every eighth row

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in decode.py
TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


@dataclass(frozen=True)
class Crop:
    """A rectangle of at least `least_area` of the image, stretched by at most `most_stretch`, as a square.

    Source: Szegedy et al., "Going Deeper with Convolutions" (2014), section 6: 8 % to 100 % of the area, sides 3:4 to
    4:3. Colours: those of the TensorFlow authors' Inception (brightness 32/255, contrast and saturation 0.5 to 1.5, hue
    0.2), of which `color` in [0, 1] is the share. `mirror`: every second one is turned left to right.
    """

    least_area: float
    most_stretch: float
    color: float
    mirror: bool

    def boxes(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int32 [N, 4] (top, left, height, width), from sizes [N, 2] (height, width) and draws [N, DRAWS] in [0, 1).

        The area is even, and so is the logarithm of the stretch among those with which it fits into the image. Of an
        image that is longer than `most_stretch` large areas can't be had: the crop is then the largest that can.
        """
        size = sizes.astype(np.float64)
        height, width = size.T
        area = (self.least_area + (1 - self.least_area) * draws[:, 0]) * height * width
        least = np.maximum(1 / self.most_stretch, area / height**2)  # width over height
        most = np.minimum(self.most_stretch, width**2 / area)
        stretch = least * (np.maximum(most, least) / least) ** draws[:, 1]
        stretch = np.clip(stretch, 1 / self.most_stretch, self.most_stretch)
        extent = np.stack([np.sqrt(area / stretch), np.sqrt(area * stretch)], axis=1)
        extent *= np.minimum(1, (size / extent).min(axis=1, keepdims=True))
        extent = np.clip(np.rint(extent), 1, size)
        # Rounding must not bring the area below its least: the shorter side grows.
        small = extent.prod(axis=1) < self.least_area * height * width
        shorter = extent.argmin(axis=1)
        extent[np.arange(len(extent)), shorter] += small
        extent = np.minimum(extent, size)
        begin = np.floor(draws[:, 2:4] * (size - extent + 1))
        return np.concatenate([begin, extent], axis=1).astype(np.int32)

    def mirrored(self, draws: np.ndarray) -> np.ndarray:
        """bool [N], from draws [N, DRAWS]."""
        return (draws[:, 4] < 0.5) & self.mirror

    def color_maps(self, draws: np.ndarray, channels: int) -> np.ndarray:
        """What `finish` does to each example: float32 [N, C, 2 C + 1], from draws [N, DRAWS] in [0, 1).

        Brightness, saturation, hue and contrast, in this order, are one affine map of the pixels. Saturation and hue
        are turned about the grey axis, as in P. Haeberli, "Matrix Operations for Image Processing" (1993), not in HSV,
        and only the result is brought into 0..255. Grey images have neither.
        Columns 0..C-1: what a pixel is multiplied by; C..2C-1: what the image's mean is; the last one is added.
        """
        brightness, contrast, saturation, hue = (2 * draws[:, 5:].T.astype(np.float64) - 1) * self.color
        contrast = (1 + contrast * CONTRAST)[:, None, None]
        turn = np.broadcast_to(np.eye(channels), (len(draws), channels, channels))
        if channels == 3:
            turn = _saturation(1 + saturation * SATURATION) @ _hue(hue * HUE * 2 * math.pi)
        offset = (brightness * BRIGHTNESS)[:, None, None] * turn.sum(axis=1, keepdims=True)
        rows = np.concatenate([turn * contrast, turn * (1 - contrast), offset], axis=1)
        return rows.swapaxes(1, 2).astype(np.float32)

    def finish(self, pixels: np.ndarray, mirrored: bool, colors: np.ndarray, image: np.ndarray) -> None:
        """Fills `image` uint8 [side, side, C] from a crop uint8 [h, w, C] in 0..255; rounded once.

        colors: one of `color_maps`.
        """
        side, _, channels = image.shape
        exact = _scratch("exact", pixels.shape, np.float32)
        np.copyto(exact, pixels)
        sized = _scratch("sized", image.shape, np.float32)
        cv2.resize(exact, (side, side), sized, interpolation=cv2.INTER_LINEAR)
        if self.color:
            affine = np.empty((channels, channels + 1), np.float32)
            affine[:, :-1] = colors[:, :channels]
            affine[:, -1] = colors[:, channels:-1] @ cv2.mean(sized[::EVERY])[:channels] + colors[:, -1]
            cv2.transform(sized, affine, sized)
            cv2.threshold(sized, 0, 0, cv2.THRESH_TOZERO, sized)  # below 0 the amount would be taken
        rounded = _scratch("rounded", image.shape, np.uint8) if mirrored else image
        cv2.convertScaleAbs(sized, rounded)  # ends at 255
        if mirrored:
            cv2.flip(rounded, 1, image)


_kept = threading.local()


def _scratch(name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Memory of this thread, for something of that name; fresh one for every image took longer than the work in it."""
    size = math.prod(shape)
    held = vars(_kept).get(name)
    if held is None or held.size < size:
        held = vars(_kept)[name] = np.empty(size, kind)
    return held[:size].reshape(shape)


def _saturation(amount: np.ndarray) -> np.ndarray:
    """[N, 3, 3], for rows of pixels: blends with the luma."""
    grey = np.array([[weight] * 3 for weight in LUMA])
    amount = amount[:, None, None]
    return amount * np.eye(3) + (1 - amount) * grey


def _hue(angle: np.ndarray) -> np.ndarray:
    """[N, 3, 3], for rows of pixels: turns the colour plane of YIQ by angles in radians."""
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2] = np.sin(angle)
    turn[:, 2, 1] = -np.sin(angle)
    return TO_YIQ.T @ turn @ np.linalg.inv(TO_YIQ).T


def part_of(box: np.ndarray, side: int) -> int:
    """How small the image may become before a crop of it (top, left, height, width) gets smaller than `side`."""
    return max(part for part in JPEG_PARTS if part == 1 or min(box[2], box[3]) >= side * part)


def cut(pixels: np.ndarray, box: np.ndarray, part: int) -> np.ndarray:
    """The crop, where `box` is that in the whole image and `pixels` are 1/part of it."""
    top, left, height, width = (box // part).tolist()
    return pixels[top : top + height, left : left + width]


def shrunk(pixels: np.ndarray, part: int) -> np.ndarray:
    """Pixels at 1/part of their size, by averaging blocks: what a JPEG does while it is decoded."""
    if part == 1:
        return pixels
    height, width, channels = pixels.shape
    padded = cv2.copyMakeBorder(pixels, 0, -height % part, 0, -width % part, cv2.BORDER_REPLICATE)
    small = cv2.resize(padded, (padded.shape[1] // part, padded.shape[0] // part), interpolation=cv2.INTER_AREA)
    return small.reshape(*small.shape[:2], channels)
