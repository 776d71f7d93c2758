"""Inception's random resized crop with distorted colours, at the size that is needed.

Where the crop lies and the map of its colours are worked out for many examples at once, in NumPy. OpenCV resizes and
colours, and holds Python's lock for none of it; with TensorFlow's operations the whole took twice as long.
"""

import math
import threading
from dataclasses import dataclass

import cv2
import numpy as np

from train.data.decode import JPEG_SCALE_DENOMS

cv2.setNumThreads(1)  # whoever crops has threads of its own

PURPOSE = "crop"
DRAWS = 9  # area, stretch, place (2), mirror, brightness, contrast, saturation, hue
BRIGHTNESS = 32.0  # of 255, added
CONTRAST = SATURATION = 0.5  # around 1
HUE = 0.2  # of the circle
MEAN_ROW_STRIDE = 8  # the mean of an image is that of every eighth row

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in decode.py
TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


@dataclass(frozen=True)
class RandomResizedCrop:
    """A rectangle of at least `least_area` of the image, stretched by at most `most_stretch`, as a square.

    Source: Szegedy et al., "Going Deeper with Convolutions" (2014), section 6: 8 % to 100 % of the area, sides 3:4 to
    4:3. Colours: those of the TensorFlow authors' Inception (brightness 32/255, contrast and saturation 0.5 to 1.5, hue
    0.2), of which `color` in [0, 1] is the share. `mirror`: every second one is turned left to right.
    """

    min_area: float
    max_aspect_ratio: float
    color_strength: float
    mirror: bool

    def sample_boxes(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int32 [N, 4] (top, left, height, width), from sizes [N, 2] (height, width) and draws [N, DRAWS] in [0, 1).

        The area is even, and so is the logarithm of the stretch among those with which it fits into the image. Of an
        image that is longer than `most_stretch` large areas can't be had: the crop is then the largest that can.
        """
        size = sizes.astype(np.float64)
        height, width = size.T
        area = (self.min_area + (1 - self.min_area) * draws[:, 0]) * height * width
        least = np.maximum(1 / self.max_aspect_ratio, area / height**2)  # width over height
        most = np.minimum(self.max_aspect_ratio, width**2 / area)
        stretch = least * (np.maximum(most, least) / least) ** draws[:, 1]
        stretch = np.clip(stretch, 1 / self.max_aspect_ratio, self.max_aspect_ratio)
        extent = np.stack([np.sqrt(area / stretch), np.sqrt(area * stretch)], axis=1)
        extent *= np.minimum(1, (size / extent).min(axis=1, keepdims=True))
        extent = np.clip(np.rint(extent), 1, size)
        # Rounding must not bring the area below its least: the shorter side grows.
        small = extent.prod(axis=1) < self.min_area * height * width
        shorter = extent.argmin(axis=1)
        extent[np.arange(len(extent)), shorter] += small
        extent = np.minimum(extent, size)
        begin = np.floor(draws[:, 2:4] * (size - extent + 1))
        return np.concatenate([begin, extent], axis=1).astype(np.int32)

    def mirror_mask(self, draws: np.ndarray) -> np.ndarray:
        """bool [N], from draws [N, DRAWS]."""
        return (draws[:, 4] < 0.5) & self.mirror

    def color_matrices(self, draws: np.ndarray, channels: int) -> np.ndarray:
        """What `finish` does to each example: float32 [N, C, 2 C + 1], from draws [N, DRAWS] in [0, 1).

        Brightness, saturation, hue and contrast, in this order, are one affine map of the pixels. Saturation and hue
        are turned about the grey axis, as in P. Haeberli, "Matrix Operations for Image Processing" (1993), not in HSV,
        and only the result is brought into 0..255. Grey images have neither.
        Columns 0..C-1: what a pixel is multiplied by; C..2C-1: what the image's mean is; the last one is added.
        """
        brightness, contrast, saturation, hue = (2 * draws[:, 5:].T.astype(np.float64) - 1) * self.color_strength
        contrast = (1 + contrast * CONTRAST)[:, None, None]
        turn = np.broadcast_to(np.eye(channels), (len(draws), channels, channels))
        if channels == 3:
            turn = _saturation_matrices(1 + saturation * SATURATION) @ _hue_matrices(hue * HUE * 2 * math.pi)
        offset = (brightness * BRIGHTNESS)[:, None, None] * turn.sum(axis=1, keepdims=True)
        rows = np.concatenate([turn * contrast, turn * (1 - contrast), offset], axis=1)
        return rows.swapaxes(1, 2).astype(np.float32)

    def render_into(self, pixels: np.ndarray, mirrored: bool, color_matrix: np.ndarray, out: np.ndarray) -> None:
        """Fills `image` uint8 [side, side, C] from a crop uint8 [h, w, C] in 0..255; rounded once.

        colors: one of `color_maps`.
        """
        side, _, channels = out.shape
        exact = _scratch("exact", pixels.shape, np.float32)
        np.copyto(exact, pixels)
        sized = _scratch("sized", out.shape, np.float32)
        cv2.resize(exact, (side, side), sized, interpolation=cv2.INTER_LINEAR)
        if self.color_strength:
            affine = np.empty((channels, channels + 1), np.float32)
            affine[:, :-1] = color_matrix[:, :channels]
            affine[:, -1] = (
                color_matrix[:, channels:-1] @ cv2.mean(sized[::MEAN_ROW_STRIDE])[:channels] + color_matrix[:, -1]
            )
            cv2.transform(sized, affine, sized)
            cv2.threshold(sized, 0, 0, cv2.THRESH_TOZERO, sized)  # below 0 the amount would be taken
        rounded = _scratch("rounded", out.shape, np.uint8) if mirrored else out
        cv2.convertScaleAbs(sized, rounded)  # ends at 255
        if mirrored:
            cv2.flip(rounded, 1, out)


_thread_local = threading.local()


def _scratch(name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Memory of this thread, for something of that name; fresh one for every image took longer than the work in it."""
    size = math.prod(shape)
    held = vars(_thread_local).get(name)
    if held is None or held.size < size:
        held = vars(_thread_local)[name] = np.empty(size, kind)
    return held[:size].reshape(shape)


def _saturation_matrices(amount: np.ndarray) -> np.ndarray:
    """[N, 3, 3], for rows of pixels: blends with the luma."""
    grey = np.array([[weight] * 3 for weight in LUMA])
    amount = amount[:, None, None]
    return amount * np.eye(3) + (1 - amount) * grey


def _hue_matrices(angle: np.ndarray) -> np.ndarray:
    """[N, 3, 3], for rows of pixels: turns the colour plane of YIQ by angles in radians."""
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2] = np.sin(angle)
    turn[:, 2, 1] = -np.sin(angle)
    return TO_YIQ.T @ turn @ np.linalg.inv(TO_YIQ).T


def jpeg_scale(box: np.ndarray, side: int) -> int:
    """How small the image may become before a crop of it (top, left, height, width) gets smaller than `side`."""
    return max(part for part in JPEG_SCALE_DENOMS if part == 1 or min(box[2], box[3]) >= side * part)


def crop_box(pixels: np.ndarray, box: np.ndarray, scale_denom: int) -> np.ndarray:
    """The crop, where `box` is that in the whole image and `pixels` are 1/part of it."""
    top, left, height, width = (box // scale_denom).tolist()
    return pixels[top : top + height, left : left + width]


def downscale(pixels: np.ndarray, scale_denom: int) -> np.ndarray:
    """Pixels at 1/part of their size, by averaging blocks: what a JPEG does while it is decoded."""
    if scale_denom == 1:
        return pixels
    height, width, channels = pixels.shape
    padded = cv2.copyMakeBorder(pixels, 0, -height % scale_denom, 0, -width % scale_denom, cv2.BORDER_REPLICATE)
    small = cv2.resize(
        padded, (padded.shape[1] // scale_denom, padded.shape[0] // scale_denom), interpolation=cv2.INTER_AREA
    )
    return small.reshape(*small.shape[:2], channels)
