"""Inception's random resized crop with distorted colours, cut out of the image while it is decoded.

Of a JPEG only the crop is decoded, and at a fraction of its size where it is to become much smaller. What can be said
before a pixel is there (the map of the colours) is worked out in NumPy for many examples at once: in a graph the many
small operations would take longer than the large ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

PURPOSE = "crop"
DRAWS = 5  # mirror, brightness, contrast, saturation, hue
BRIGHTNESS = 32.0  # of 255, added
CONTRAST = SATURATION = 0.5  # around 1
HUE = 0.2  # of the circle
ATTEMPTS = 10
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

    def mirrored(self, draws: np.ndarray) -> np.ndarray:
        """bool [N], from draws [N, DRAWS]."""
        return (draws[:, 0] < 0.5) & self.mirror

    def apply(
        self, data: Any, size: Any, plain: Any, mirrored: Any, colors: Any, seed: Any, side: int, channels: int
    ) -> Any:
        """One example as uint8 [side, side, channels].

        data: scalar string, a JPEG where `plain` (scalar bool), else raw uint8 pixels. size: int32 [2], height and
        width. mirrored: scalar bool. colors: float32 [2 C + 1, C] from `color_maps`. seed: int64 [2], of this example
        in this epoch.
        """
        box = self._box(size, seed)
        cut = tf.cond(
            plain,
            lambda: _decode(data, box, side, channels),
            lambda: _slice(tf.reshape(tf.io.decode_raw(data, tf.uint8), (size[0], size[1], channels)), box, side),
        )
        pixels = tf.image.resize(tf.ensure_shape(cut, (None, None, channels)), (side, side))
        if self.color:
            pixels = distorted(pixels, colors)
        image = tf.saturate_cast(pixels + 0.5, tf.uint8)
        # On three dimensions and bytes this is fast; on batches it takes as long as decoding.
        return tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)

    def _box(self, size: Any, seed: Any) -> Any:
        """int32 [4]: top, left, height, width."""
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            image_size=tf.concat([size, [1]], 0),
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(1 / self.most_stretch, self.most_stretch),
            area_range=(self.least_area, 1.0),
            max_attempts=ATTEMPTS,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    def color_maps(self, draws: np.ndarray, channels: int) -> np.ndarray:
        """What `distorted` does to each example: float32 [N, 2 C + 1, C], from draws [N, DRAWS] in [0, 1).

        Brightness, saturation, hue and contrast, in this order, are one affine map of the pixels. Saturation and hue
        are turned about the grey axis, as in P. Haeberli, "Matrix Operations for Image Processing" (1993), not in HSV,
        and only the result is brought into 0..255. Grey images have neither.
        """
        brightness, contrast, saturation, hue = (2 * draws[:, 1:].T.astype(np.float64) - 1) * self.color
        contrast = (1 + contrast * CONTRAST)[:, None, None]
        turn = np.broadcast_to(np.eye(channels), (len(draws), channels, channels))
        if channels == 3:
            turn = _saturation(1 + saturation * SATURATION) @ _hue(hue * HUE * 2 * math.pi)
        offset = (brightness * BRIGHTNESS)[:, None, None] * turn.sum(axis=1, keepdims=True)
        return np.concatenate([turn * contrast, turn * (1 - contrast), offset], axis=1).astype(np.float32)


def distorted(pixels: Any, colors: Any) -> Any:
    """float32 [H, W, C] in 0..255 with other colours, not clipped. colors: float32 [2 C + 1, C].

    Rows 0..C-1: what a pixel is multiplied by; C..2C-1: what the image's mean is; the last one is added.
    """
    height, width, channels = pixels.shape
    mean = tf.reduce_mean(pixels[::EVERY], (0, 1))
    offset = tf.linalg.matvec(colors[channels:-1], mean, transpose_a=True) + colors[-1]
    turned = tf.reshape(pixels, (-1, channels)) @ colors[:channels]
    # A whole row at once: adding three numbers to every pixel takes ten times as long.
    return tf.reshape(tf.reshape(turned, (height, -1)) + tf.tile(offset, [width]), pixels.shape)


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


def _slice(pixels: Any, box: Any, side: int) -> Any:
    """The crop of raw pixels, shrunk by averaging as that of a JPEG is."""
    cut = tf.slice(pixels, [box[0], box[1], 0], [box[2], box[3], -1])
    size = box[2:] // tf.bitwise.left_shift(1, _halvings(box, side))
    small = tf.image.resize(cut, size, tf.image.ResizeMethod.AREA)
    return tf.cast(tf.round(small), tf.uint8)


def _decode(data: Any, box: Any, side: int, channels: int) -> Any:
    """The crop of a JPEG, at 1, 1/2, 1/4 or 1/8 of its size."""

    def scaled(halvings: int) -> Any:
        ratio = 2**halvings
        return lambda: tf.io.decode_and_crop_jpeg(
            data, box // ratio, channels=channels, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    return tf.switch_case(_halvings(box, side), [scaled(halvings) for halvings in range(4)])


def _halvings(box: Any, side: int) -> Any:
    """How often a crop can be halved, at most three times, and still be no smaller than `side`."""
    return tf.reduce_sum(tf.cast(tf.minimum(box[2], box[3]) >= side * tf.constant([2, 4, 8]), tf.int32))
