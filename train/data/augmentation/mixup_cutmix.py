"""mixup and CutMix: blends pairs of examples; all outputs of a network get the same dense labels."""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from train.data.sampling import keyed_generator

PURPOSE = "mix"
DRAWS = 5  # coefficients of mixup and of CutMix, choice between the two, position (2)


@dataclass(frozen=True)
class MixupCutmix:
    """Applies mixup, CutMix, or for each example one of both with equal probability.

    mixup, cutmix: alpha of the Beta distributions of the mixing coefficients; 0 disables.
    Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2017), section 2 (alpha 0.1 to 0.4 on ImageNet);
    Yun et al., "CutMix" (2019), section 3.1 (alpha 1). Every example has its own coefficient; its partner is the next
    example of the batch, whose order is random.
    """

    mixup: float
    cutmix: float

    def draw(self, seed: int, epoch: int, num_examples: int) -> np.ndarray:
        """Returns an epoch's draws: float32 [num_examples, DRAWS]; row i belongs to example i."""
        generator = keyed_generator(seed, PURPOSE, epoch)
        columns = [generator.beta(alpha or 1, alpha or 1, num_examples) for alpha in (self.mixup, self.cutmix)]
        columns += [generator.random(num_examples) for _ in range(3)]
        return np.stack(columns, axis=1).astype(np.float32)

    def apply(self, images: tf.Tensor, labels: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes images (uint8 or float [B, S, S, C]) and labels (float32 [B, classes]); returns both as float32."""
        images = tf.cast(images, tf.float32)
        pasted = draws[:, 2] < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        inside = tf.logical_and(self._rectangle_mask(images.shape[1], draws), pasted[:, None, None])
        pasted_area = tf.reduce_mean(tf.cast(inside, tf.float32), (1, 2))
        partner_weight = tf.where(pasted, pasted_area, 1 - draws[:, 0])
        blend = tf.where(pasted[:, None, None], tf.cast(inside, tf.float32), partner_weight[:, None, None])[..., None]
        mixed = images + blend * (tf.roll(images, -1, 0) - images)
        return mixed, labels + partner_weight[:, None] * (tf.roll(labels, -1, 0) - labels)

    def _rectangle_mask(self, side: int, draws: tf.Tensor) -> tf.Tensor:
        """Mask of a rectangle of 1 - coefficient of the area around a random centre, clipped: bool [B, side, side]."""
        half = tf.sqrt(1 - draws[:, 1]) * side / 2
        centers = tf.range(side, dtype=tf.float32) + 0.5
        rows = tf.abs(centers - draws[:, 3:4] * side) < half[:, None]
        columns = tf.abs(centers - draws[:, 4:5] * side) < half[:, None]
        return tf.logical_and(rows[:, :, None], columns[:, None, :])
