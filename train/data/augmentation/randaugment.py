"""RandAugment: some of fourteen changes, drawn for each image, all of one strength; done by Pillow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

PURPOSE = "paint"
MAX_MAGNITUDE = 30.0  # the scale of the magnitude
FILL_GREY = 128  # what comes in from outside


@dataclass(frozen=True)
class RandAugment:
    """`ops` changes one after the other, of `magnitude` in 0..30.

    Source: Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space" (2019),
    section 3; ranges of its changes: Cubuk et al., "AutoAugment" (2018), table 6. Those with a direction take either
    one with the same probability.
    """

    ops: int
    magnitude: float

    @property
    def num_draws(self) -> int:
        """Draws per example: which change and which direction, each time."""
        return 2 * self.ops

    def apply(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """pixels: uint8 [S, S, C] in 0..255, C = 1 or 3; draws: float32 [columns] in [0, 1). The same shape."""
        image, strength = (
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels),
            self.magnitude / MAX_MAGNITUDE,
        )
        names = tuple(OPERATIONS)
        for which, direction in draws.reshape(-1, 2).tolist():
            change = OPERATIONS[names[min(int(which * len(names)), len(names) - 1)]]
            image = change(image, strength if direction < 0.5 else -strength)
        return np.asarray(image).reshape(pixels.shape)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """`matrix`: where in the source a pixel comes from, x' = a x + b y + c, y' = d x + e y + f, about the middle."""
    a, b, c, d, e, f = matrix
    x, y = image.width / 2, image.height / 2
    about = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    grey = FILL_GREY if image.mode == "L" else (FILL_GREY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, about, Image.Resampling.BILINEAR, fillcolor=grey)


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    grey = FILL_GREY if image.mode == "L" else (FILL_GREY,) * 3
    return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=grey)


def _enhance(kind: Callable) -> Callable[[Image.Image, float], Image.Image]:
    """From 0.1 to 1.9 of what there is."""
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _solarize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(strength))))


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _enhance(ImageEnhance.Color),
    "posterize": _posterize,
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength: _affine(image, (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda image, strength: _affine(image, (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate_x": lambda image, strength: _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    "translate_y": lambda image, strength: _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
}
