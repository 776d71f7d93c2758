"""Heads: the main classifier, which is evaluated, and the auxiliary classifiers, which only training uses.

All logits are float32, whatever the precision policy: in 16 bits cross-entropy would lose small differences.
"""

from collections.abc import Callable

from keras import layers

from train.models.blocks import Tensor, conv_bn_relu, scale_channels


def logits(x: Tensor, num_classes: int, name: str) -> Tensor:
    """Applies a linear classifier without softmax: float32 `[N, num_classes]`."""
    return layers.Dense(num_classes, dtype="float32", name=name)(x)


# --- main head: [N, H, W, C] -> [N, features] ------------------------------------------------------------------------


def fc(x: Tensor, width: float) -> Tensor:
    """Head `fc`: flattened, two dense layers of 4096 times `width`.

    Source: Simonyan & Zisserman 2014, table 1; the notebook's network with its classifier.
    """
    x = layers.Flatten(name="flatten")(x)
    for name in ("fc1", "fc2"):
        x = layers.Dense(scale_channels(4096, width), activation="relu", name=name)(x)
    return x


def avg(x: Tensor, width: float) -> Tensor:
    """Head `avg`: the mean over the map. Source: Lin et al. 2013 (Network in Network), section 3.2."""
    del width  # nothing to scale
    return layers.GlobalAveragePooling2D(name="avg_pool")(x)


def max_pool(x: Tensor, width: float) -> Tensor:
    """Head `max`: the largest value over the map. Source: the notebook's network without its classifier."""
    del width  # nothing to scale
    return layers.GlobalMaxPooling2D(name="max_pool")(x)


HEADS: dict[str, Callable[[Tensor, float], Tensor]] = {"fc": fc, "avg": avg, "max": max_pool}


def main_head(x: Tensor, head: str, num_classes: int, width: float, dropout: float = 0.0) -> Tensor:
    """Builds the main classifier: the named head, dropout if any, and the logits `predictions`."""
    x = HEADS[head](x, width)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return logits(x, num_classes, "predictions")


# --- auxiliary heads: [N, H, W, C] -> [N, num_classes] ---------------------------------------------------------------


def adaptive_average_pool(x: Tensor, output_size: int, name: str) -> Tensor:
    """Average-pools to at most `output_size` x `output_size`; the windows cover the whole map.

    Window and stride follow from the map's size: 14 x 14 to 4 x 4 and 17 x 17 to 5 x 5 both give the papers' 5 x 5
    window with stride 3.
    """
    height, width = x.shape[1:3]
    targets = [min(output_size, height), min(output_size, width)]
    strides = [size // target for size, target in zip((height, width), targets, strict=True)]
    window = [
        size - (target - 1) * stride for size, target, stride in zip((height, width), targets, strides, strict=True)
    ]
    return layers.AveragePooling2D(tuple(window), strides=tuple(strides), name=name)(x)


def aux_inception_v1(x: Tensor, num_classes: int, width: float, momentum: float | None, name: str) -> Tensor:
    """GoogLeNet's auxiliary classifier: pooling to 4 x 4, 1x1 convolution to 128 maps, 1024 units, dropout 0.7, logits.

    Source: Szegedy et al. 2014, section 5. Layers are called `name_...`; `momentum=None` omits batch normalisation,
    as published.
    """
    x = adaptive_average_pool(x, 4, f"{name}_pool")
    x = conv_bn_relu(x, scale_channels(128, width), (1, 1), name, momentum)
    x = layers.Flatten(name=f"{name}_flatten")(x)
    x = layers.Dense(scale_channels(1024, width), activation="relu", name=f"{name}_fc")(x)
    x = layers.Dropout(0.7, name=f"{name}_dropout")(x)
    return logits(x, num_classes, f"{name}_predictions")


def aux_inception_v3(x: Tensor, num_classes: int, width: float, momentum: float, name: str) -> Tensor:
    """Inception-v3's auxiliary classifier: pooling to 5 x 5, 1x1 convolution to 128 maps, full-size one to 768, logits.

    Source: Szegedy et al. 2015, section 4 and figure 8; widths as in TensorFlow-slim's `inception_v3`. Layers are
    called `name_...`. Both convolutions are normalised, even if the trunk is not.
    """
    x = adaptive_average_pool(x, 5, f"{name}_pool")
    x = conv_bn_relu(x, scale_channels(128, width), (1, 1), f"{name}_1", momentum)
    x = layers.Conv2D(scale_channels(768, width), x.shape[1:3], use_bias=False, name=f"{name}_2_conv")(x)  # 1 x 1 x 768
    x = layers.BatchNormalization(momentum=momentum, scale=False, name=f"{name}_2_bn")(x)
    x = layers.Activation("relu", name=f"{name}_2_act")(x)
    x = layers.Flatten(name=f"{name}_flatten")(x)
    return logits(x, num_classes, f"{name}_predictions")
