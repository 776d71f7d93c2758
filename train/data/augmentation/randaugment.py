"""RandAugment: operations drawn per image from a list of fourteen, all with one magnitude; executed by Pillow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

PURPOSE = "paint"
MAX_MAGNITUDE = 30.0  # upper end of the magnitude scale
FILL_GREY = 128  # fills areas outside the image

Enhancer = ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Sharpness


@dataclass(frozen=True)
class RandAugment:
    """Applies `ops` random operations in sequence, with `magnitude` in 0..30.

    Source: Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space" (2019),
    section 3; ranges of the operations: Cubuk et al., "AutoAugment" (2018), table 6. Operations with a direction take
    either one with equal probability.
    """

    ops: int
    magnitude: float

    @property
    def num_draws(self) -> int:
        """Draws per example: operation and direction of each step."""
        return 2 * self.ops

    def apply(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Augments pixels uint8 [S, S, C] in 0..255, C = 1 or 3, by draws float32 [num_draws] in [0, 1); same shape."""
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)
        strength = self.magnitude / MAX_MAGNITUDE
        operations = tuple(OPERATIONS.values())
        for choice, direction in draws.reshape(-1, 2).tolist():
            operation = operations[min(int(choice * len(operations)), len(operations) - 1)]
            image = operation(image, strength if direction < 0.5 else -strength)
        return np.asarray(image).reshape(pixels.shape)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Applies an affine map about the centre. matrix: output to source, x' = a x + b y + c, y' = d x + e y + f."""
    a, b, c, d, e, f = matrix
    x, y = image.width / 2, image.height / 2
    about_center = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    grey = FILL_GREY if image.mode == "L" else (FILL_GREY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, about_center, Image.Resampling.BILINEAR, fillcolor=grey)


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    grey = FILL_GREY if image.mode == "L" else (FILL_GREY,) * 3
    return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=grey)


def _enhance(enhancer: Callable[[Image.Image], Enhancer]) -> Callable[[Image.Image, float], Image.Image]:
    """Returns an operation that scales a property of the image by 0.1 to 1.9."""
    return lambda image, strength: enhancer(image).enhance(1 + 0.9 * strength)


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
