"""Inception's random resized crop with colour distortion.

Boxes and colour matrices are computed for a batch at once, in NumPy. OpenCV resizes and applies the colours without
holding the interpreter's lock; TensorFlow's operations took twice as long.
"""

import math
import threading
from dataclasses import dataclass

import cv2
import numpy as np

from train.data.decode import JPEG_SCALE_DENOMS

cv2.setNumThreads(1)  # the input pipeline has its own threads

PURPOSE = "crop"
DRAWS = 9  # area, aspect ratio, position (2), mirror, brightness, contrast, saturation, hue
BRIGHTNESS = 32.0  # of 255, added
CONTRAST = SATURATION = 0.5  # around 1
HUE = 0.2  # of the circle
MEAN_ROW_STRIDE = 8  # every eighth row suffices for the mean of an image

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in decode.py
TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crops a random rectangle and resizes it to a square.

    min_area: smallest crop, as a fraction of the image. max_aspect_ratio: of the crop, its inverse is the minimum.
    color_strength: in [0, 1], scales the colour distortion. mirror: flips every second image horizontally.

    Source: Szegedy et al., "Going Deeper with Convolutions" (2014), section 6: 8 % to 100 % of the area, sides 3:4 to
    4:3. Colours: the TensorFlow authors' Inception (brightness 32/255, contrast and saturation 0.5 to 1.5, hue 0.2).
    """

    min_area: float
    max_aspect_ratio: float
    color_strength: float
    mirror: bool

    def sample_boxes(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Samples boxes int32 [N, 4] (top, left, height, width) from sizes [N, 2] (height, width) and draws [N, DRAWS].

        The area is uniform, and so is the logarithm of the aspect ratio, among those that fit into the image. In an
        image longer than `max_aspect_ratio`, large areas don't fit: the crop is then the largest that does.
        """
        size = sizes.astype(np.float64)
        height, width = size.T
        area = (self.min_area + (1 - self.min_area) * draws[:, 0]) * height * width
        smallest = np.maximum(1 / self.max_aspect_ratio, area / height**2)  # width over height
        largest = np.minimum(self.max_aspect_ratio, width**2 / area)
        aspect_ratio = smallest * (np.maximum(largest, smallest) / smallest) ** draws[:, 1]
        aspect_ratio = np.clip(aspect_ratio, 1 / self.max_aspect_ratio, self.max_aspect_ratio)
        extent = np.stack([np.sqrt(area / aspect_ratio), np.sqrt(area * aspect_ratio)], axis=1)
        extent *= np.minimum(1, (size / extent).min(axis=1, keepdims=True))
        extent = np.clip(np.rint(extent), 1, size)
        # Rounding must not bring the area below the minimum: then the shorter side grows by a pixel.
        too_small = extent.prod(axis=1) < self.min_area * height * width
        shorter = extent.argmin(axis=1)
        extent[np.arange(len(extent)), shorter] += too_small
        extent = np.minimum(extent, size)
        origin = np.floor(draws[:, 2:4] * (size - extent + 1))
        return np.concatenate([origin, extent], axis=1).astype(np.int32)

    def mirror_mask(self, draws: np.ndarray) -> np.ndarray:
        """Whether each image is flipped: bool [N], from draws [N, DRAWS]."""
        return (draws[:, 4] < 0.5) & self.mirror

    def color_matrices(self, draws: np.ndarray, channels: int) -> np.ndarray:
        """Computes the colour maps for `render_into`: float32 [N, C, 2 C + 1], from draws [N, DRAWS] in [0, 1).

        Brightness, saturation, hue and contrast, in this order, are one affine map of the pixels. Saturation and hue
        are changes about the grey axis, as in P. Haeberli, "Matrix Operations for Image Processing" (1993), not in HSV,
        and only the result is clipped to 0..255. Grey images have neither.
        Columns 0..C-1 multiply the pixel, C..2C-1 the mean of the image, and the last one is added.
        """
        brightness, contrast, saturation, hue = (2 * draws[:, 5:].T.astype(np.float64) - 1) * self.color_strength
        contrast = (1 + contrast * CONTRAST)[:, None, None]
        rotation = np.broadcast_to(np.eye(channels), (len(draws), channels, channels))
        if channels == 3:
            rotation = _saturation_matrices(1 + saturation * SATURATION) @ _hue_matrices(hue * HUE * 2 * math.pi)
        offset = (brightness * BRIGHTNESS)[:, None, None] * rotation.sum(axis=1, keepdims=True)
        rows = np.concatenate([rotation * contrast, rotation * (1 - contrast), offset], axis=1)
        return rows.swapaxes(1, 2).astype(np.float32)

    def render_into(self, pixels: np.ndarray, mirrored: bool, color_matrix: np.ndarray, out: np.ndarray) -> None:
        """Resizes, colours and flips a crop uint8 [h, w, C] in 0..255 into `out` uint8 [side, side, C]; rounds once.

        color_matrix: one entry of `color_matrices`.
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
            cv2.threshold(sized, 0, 0, cv2.THRESH_TOZERO, sized)  # convertScaleAbs takes the absolute value
        rounded = _scratch("rounded", out.shape, np.uint8) if mirrored else out
        cv2.convertScaleAbs(sized, rounded)  # saturates at 255
        if mirrored:
            cv2.flip(rounded, 1, out)


_thread_local = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Returns this thread's buffer with that name; allocating one per image took longer than the work on it."""
    size = math.prod(shape)
    buffer = vars(_thread_local).get(name)
    if buffer is None or buffer.size < size:
        buffer = vars(_thread_local)[name] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def _saturation_matrices(amount: np.ndarray) -> np.ndarray:
    """Matrices [N, 3, 3] for pixels as row vectors that blend with the luma."""
    grey = np.array([[weight] * 3 for weight in LUMA])
    amount = amount[:, None, None]
    return amount * np.eye(3) + (1 - amount) * grey


def _hue_matrices(angle: np.ndarray) -> np.ndarray:
    """Matrices [N, 3, 3] for pixels as row vectors that rotate the chroma plane of YIQ by angles in radians."""
    rotation = np.zeros((len(angle), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(angle)
    rotation[:, 1, 2] = np.sin(angle)
    rotation[:, 2, 1] = -np.sin(angle)
    return TO_YIQ.T @ rotation @ np.linalg.inv(TO_YIQ).T


def jpeg_scale(box: np.ndarray, side: int) -> int:
    """Largest scale denominator at which the box (top, left, height, width) is not smaller than `side` pixels."""
    return max(denom for denom in JPEG_SCALE_DENOMS if denom == 1 or min(box[2], box[3]) >= side * denom)


def crop_box(pixels: np.ndarray, box: np.ndarray, scale_denom: int) -> np.ndarray:
    """Crops `pixels`, an image at 1/scale_denom of its size, to a box given at full size."""
    top, left, height, width = (box // scale_denom).tolist()
    return pixels[top : top + height, left : left + width]


def downscale(pixels: np.ndarray, scale_denom: int) -> np.ndarray:
    """Reduces pixels to 1/scale_denom of their size by averaging blocks, as scaled JPEG decoding does."""
    if scale_denom == 1:
        return pixels
    height, width, channels = pixels.shape
    padded = cv2.copyMakeBorder(pixels, 0, -height % scale_denom, 0, -width % scale_denom, cv2.BORDER_REPLICATE)
    small = cv2.resize(
        padded, (padded.shape[1] // scale_denom, padded.shape[0] // scale_denom), interpolation=cv2.INTER_AREA
    )
    return small.reshape(*small.shape[:2], channels)
