"""Pairs of examples mixed into one, with dense labels, which every output of a network gets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from train.data.sampling import keyed_generator

PURPOSE = "mix"
DRAWS = 5  # shares by mixup and by cutmix, which of both, place (2)


@dataclass(frozen=True)
class MixupCutmix:
    """mixup, cutmix: alpha of the Beta distributions that the shares come from; 0 is without. Both: one half each.

    Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2017), section 2 (alpha 0.1 to 0.4 on ImageNet);
    Yun et al., "CutMix" (2019), section 3.1 (alpha 1). Every example has a share of its own; its partner is the next
    one of the batch, whose order is random.
    """

    mixup: float
    cutmix: float

    def draw(self, seed: int, epoch: int, num_examples: int) -> np.ndarray:
        """float32 [examples, COLUMNS]; row i belongs to example i."""
        generator = keyed_generator(seed, PURPOSE, epoch)
        columns = [generator.beta(alpha or 1, alpha or 1, num_examples) for alpha in (self.mixup, self.cutmix)]
        columns += [generator.random(num_examples) for _ in range(3)]
        return np.stack(columns, axis=1).astype(np.float32)

    def apply(self, images: Any, labels: Any, draws: Any) -> tuple[Any, Any]:
        """images: uint8 or float [B, S, S, C]; labels: float32 [B, classes]; draws: [B, COLUMNS]. Both as float32."""
        images = tf.cast(images, tf.float32)
        pasted = draws[:, 2] < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        inside = tf.logical_and(self._rectangle_mask(images.shape[1], draws), pasted[:, None, None])
        covered = tf.reduce_mean(tf.cast(inside, tf.float32), (1, 2))
        share = tf.where(pasted, covered, 1 - draws[:, 0])  # of the partner
        blend = tf.where(pasted[:, None, None], tf.cast(inside, tf.float32), share[:, None, None])[..., None]
        mixed = images + blend * (tf.roll(images, -1, 0) - images)
        return mixed, labels + share[:, None] * (tf.roll(labels, -1, 0) - labels)

    def _rectangle_mask(self, side: int, draws: Any) -> Any:
        """bool [B, side, side]: 1 - share of the area around a random middle, as far as it lies in the image."""
        half = tf.sqrt(1 - draws[:, 1]) * side / 2
        place = tf.range(side, dtype=tf.float32) + 0.5
        rows = tf.abs(place - draws[:, 3:4] * side) < half[:, None]
        columns = tf.abs(place - draws[:, 4:5] * side) < half[:, None]
        return tf.logical_and(rows[:, :, None], columns[:, None, :])
