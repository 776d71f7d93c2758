"""The building blocks of the networks: input, convolution units and the block kinds.

Every tensor here is a symbolic `[N, H, W, C]` Keras tensor; every kind keeps H and W. The Inception kinds share one
signature, so that one idea can be exchanged for another with everything around it unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
from keras import layers

from train.models.cost import conv_macs

Tensor = keras.KerasTensor

# Mean of the ImageNet training images, in the order blue, green, red (Simonyan & Zisserman 2014, section 2.1).
IMAGENET_MEAN_BGR = (103.939, 116.779, 123.68)
# Weights of blue, green and red in the luma of an image (ITU-R BT.601).
LUMA_BGR = (0.114, 0.587, 0.299)


def scale_channels(channels: int, width: float) -> int:
    """Returns `channels * width` rounded half up, at least 1."""
    return max(1, int(channels * width + 0.5))


# Kernels without a following normalisation are initialised from He's distribution (He et al. 2015, Delving Deep into
# Rectifiers, section 2.2), which preserves the scale of a signal in [-1, 1] through ReLUs. Glorot's, Keras's default,
# shrinks it layer by layer: with it, five stages of `conv` at full width stayed near chance; with He's they reached
# 0.98 (digits, 32 px, three epochs).
KERNEL_INITIALIZER = "he_normal"


@dataclass(frozen=True)
class BranchWidths:
    """Channels of an Inception block, all at least 1.

    The projection after the pooling branch has no field: it gets the channels of `total` that the other branches leave,
    so that rounding never changes the width of the block.
    """

    total: int
    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_5x5: int
    conv_5x5: int

    def scaled(self, width: float) -> "BranchWidths":
        """Returns the same block with every width multiplied by `width`."""
        return BranchWidths(*(scale_channels(channels, width) for channels in vars(self).values()))


def proportional_widths(total: int) -> BranchWidths:
    """Returns the notebook's branch widths for a block of `total` channels: 256 gives 64, 96-128, 16-32 and 32."""
    return BranchWidths(total, total // 4, total * 3 // 8, total // 2, total // 16, total // 8)


# --- input -----------------------------------------------------------------------------------------------------------


def image_input(input_shape: tuple[int, int, int]) -> Tensor:
    """Returns the input of a network: `[N, H, W, C]` in 0..255, uint8 or float.

    It is declared float32 because Keras casts its input to the declared type: uint8 becomes float32 without loss, while
    a uint8 input would truncate augmented images.
    """
    return keras.Input(input_shape, dtype="float32", name="images")


def normalize_symmetric(x: Tensor) -> Tensor:
    """Maps 0..255 to float32 [-1, 1]. Source: the preprocessing of the Inception family in keras.applications."""
    # float32 also under a mixed policy: the cast to 16 bits comes after the scaling, not before it.
    return layers.Rescaling(1 / 127.5, offset=-1.0, dtype="float32", name="normalize")(x)


def normalize_caffe(x: Tensor) -> Tensor:
    """Subtracts the ImageNet mean: float32, about -124..151, channels in the order blue, green, red.

    Source: Simonyan & Zisserman 2014, section 2.1. From a grey image the luma of that mean is subtracted.
    """
    if x.shape[-1] == 1:
        luma = sum(mean * weight for mean, weight in zip(IMAGENET_MEAN_BGR, LUMA_BGR, strict=True))
        return layers.Rescaling(1.0, offset=-luma, dtype="float32", name="normalize")(x)
    rgb = keras.Input(x.shape[1:], dtype="float32")
    offset = [-mean for mean in IMAGENET_MEAN_BGR]
    # A nested model of built-in operations, so that a saved network loads where this package is not installed.
    bgr = layers.Rescaling(1.0, offset=offset, dtype="float32", name="subtract_mean")(keras.ops.flip(rgb, axis=-1))
    return keras.Model(rgb, bgr, name="normalize")(x)


# --- convolution units -----------------------------------------------------------------------------------------------


def conv_relu(x: Tensor, filters: int, name: str, initializer: str = KERNEL_INITIALIZER) -> Tensor:
    """Applies a 3x3 convolution with bias and ReLU, in one layer called `name`.

    Source: Simonyan & Zisserman 2014, table 1; layer names as in keras.applications.
    """
    layer = layers.Conv2D(filters, (3, 3), padding="same", activation="relu", kernel_initializer=initializer, name=name)
    return layer(x)


def conv_bn_relu(
    x: Tensor, filters: int, kernel: tuple[int, int], name: str, momentum: float | None, strides: int = 1
) -> Tensor:
    """Applies convolution, batch normalisation and ReLU: the layers `name_conv`, `name_bn`, `name_act`.

    Source: the notebook's `Conv2d_bn`, after Ioffe & Szegedy 2015, section 3.2 (no bias, since the normalisation
    subtracts it; no scale, since a ReLU follows). `momentum=None` replaces the normalisation by a bias.
    """
    use_bias = momentum is None
    convolution = layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding="same",
        use_bias=use_bias,
        kernel_initializer=KERNEL_INITIALIZER if use_bias else "glorot_uniform",
        name=f"{name}_conv",
    )
    x = convolution(x)
    if not use_bias:
        x = layers.BatchNormalization(momentum=momentum, scale=False, name=f"{name}_bn")(x)
    return layers.Activation("relu", name=f"{name}_act")(x)


# --- block kinds -----------------------------------------------------------------------------------------------------


def conv_block(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `conv`: a 3x3 convolution with bias. Source: Simonyan & Zisserman 2014, table 1, configuration D."""
    del momentum  # no normalisation
    return conv_relu(x, widths.total, name)


def conv_bn_block(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `conv_bn`: a 3x3 convolution with batch normalisation. Source: Ioffe & Szegedy 2015, section 3.2."""
    return conv_bn_relu(x, widths.total, (3, 3), name, momentum)


def inception_naive(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_naive`: 3x3 and 5x5 see all input channels, no 1x1 bottleneck before them.

    Source: Szegedy et al. 2014 (Going Deeper with Convolutions), figure 2a. The projection after the pooling stays:
    without it the block would be wider than those it is compared with.
    """
    branches = [
        conv_bn_relu(x, widths.conv_1x1, (1, 1), f"{name}_Branch_0", momentum),
        conv_bn_relu(x, widths.conv_3x3, (3, 3), f"{name}_Branch_1", momentum),
        conv_bn_relu(x, widths.conv_5x5, (5, 5), f"{name}_Branch_2", momentum),
    ]
    return _concatenate_with_pool(x, branches, widths, name, momentum)


def inception_v1(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_v1`: 1x1, 3x3, 5x5 and pooling side by side, 1x1 reductions before the larger kernels.

    Source: Szegedy et al. 2014, figure 2b; the notebook's `InceptionV1_block`.
    """
    return _bottleneck_block(x, widths, name, momentum, kernels_3x3=[(3, 3)], kernels_5x5=[(5, 5)])


def inception_two_3x3(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_two_3x3`: two 3x3 replace the 5x5, with the same receptive field.

    Source: Szegedy et al. 2015 (Rethinking the Inception Architecture), section 3.1 and figure 5.
    """
    return _bottleneck_block(x, widths, name, momentum, kernels_3x3=[(3, 3)], kernels_5x5=[(3, 3), (3, 3)])


def inception_v3(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_v3`: each nxn is factorised into 1xn and nx1.

    Source: Szegedy et al. 2015, section 3.2 and figure 6; the notebook's `InceptionV3_block`.
    """
    return _bottleneck_block(x, widths, name, momentum, kernels_3x3=[(1, 3), (3, 1)], kernels_5x5=[(1, 5), (5, 1)])


def inception_expanded(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_expanded`: 1xn and nx1 side by side, half of the branch's width each, concatenated.

    Source: Szegedy et al. 2015, figure 7. A half is at least one channel wide.
    """
    branches = [
        conv_bn_relu(x, widths.conv_1x1, (1, 1), f"{name}_Branch_0", momentum),
        _expanded_branch(x, widths.reduce_3x3, widths.conv_3x3, 3, f"{name}_Branch_1", momentum),
        _expanded_branch(x, widths.reduce_5x5, widths.conv_5x5, 5, f"{name}_Branch_2", momentum),
    ]
    return _concatenate_with_pool(x, branches, widths, name, momentum)


def inception_3x3_reduce(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `inception_3x3_reduce`: as `inception_v1`, but 3x3 convolutions do the reductions.

    Source: the question in the notes whether a 3x3 could reduce the channels as well; it has nine times the weights.
    The projection after the pooling precedes no larger kernel and stays 1x1.
    """
    return _bottleneck_block(
        x, widths, name, momentum, kernels_3x3=[(3, 3)], kernels_5x5=[(5, 5)], reduction_kernel=(3, 3)
    )


def single_1x1(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `single_1x1`: one 1x1 convolution with the multiply-accumulates of `inception_v1` on the same input."""
    return _single_conv(x, widths, name, momentum, 1)


def single_3x3(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `single_3x3`: one 3x3 convolution with the multiply-accumulates of `inception_v1` on the same input."""
    return _single_conv(x, widths, name, momentum, 3)


def single_5x5(x: Tensor, widths: BranchWidths, name: str, momentum: float | None) -> Tensor:
    """Kind `single_5x5`: one 5x5 convolution with the multiply-accumulates of `inception_v1` on the same input."""
    return _single_conv(x, widths, name, momentum, 5)


def inception_v1_macs(in_channels: int, widths: BranchWidths) -> int:
    """Returns the multiply-accumulates of an `inception_v1` block per position of its feature map."""
    projection = max(1, widths.total - widths.conv_1x1 - widths.conv_3x3 - widths.conv_5x5)
    entry = widths.conv_1x1 + widths.reduce_3x3 + widths.reduce_5x5 + projection
    return (
        conv_macs(1, 1, in_channels, entry, (1, 1))
        + conv_macs(1, 1, widths.reduce_3x3, widths.conv_3x3, (3, 3))
        + conv_macs(1, 1, widths.reduce_5x5, widths.conv_5x5, (5, 5))
    )


Kernels = list[tuple[int, int]]


def _bottleneck_block(
    x: Tensor,
    widths: BranchWidths,
    name: str,
    momentum: float | None,
    kernels_3x3: Kernels,
    kernels_5x5: Kernels,
    reduction_kernel: tuple[int, int] = (1, 1),
) -> Tensor:
    """Builds a block whose second and third branch reduce the channels, then apply the given kernels in turn."""
    branches = [conv_bn_relu(x, widths.conv_1x1, (1, 1), f"{name}_Branch_0", momentum)]
    for branch, reduce, filters, kernels in (
        (1, widths.reduce_3x3, widths.conv_3x3, kernels_3x3),
        (2, widths.reduce_5x5, widths.conv_5x5, kernels_5x5),
    ):
        y = conv_bn_relu(x, reduce, reduction_kernel, f"{name}_Branch_{branch}", momentum)
        for position, kernel in enumerate(kernels, start=1):
            y = conv_bn_relu(y, filters, kernel, f"{name}_Branch_{branch}_{position}", momentum)
        branches.append(y)
    return _concatenate_with_pool(x, branches, widths, name, momentum)


def _expanded_branch(
    x: Tensor, reduce_filters: int, filters: int, kernel_size: int, name: str, momentum: float | None
) -> Tensor:
    """Applies a 1x1 reduction, then 1xn and nx1 side by side, concatenated to `filters` channels (at least 2)."""
    x = conv_bn_relu(x, reduce_filters, (1, 1), name, momentum)
    row = conv_bn_relu(x, max(1, filters // 2), (1, kernel_size), f"{name}_1", momentum)
    column = conv_bn_relu(x, max(1, filters - filters // 2), (kernel_size, 1), f"{name}_2", momentum)
    return layers.Concatenate(name=f"{name}_Concatenated")([row, column])


def _concatenate_with_pool(
    x: Tensor, branches: list[Tensor], widths: BranchWidths, name: str, momentum: float | None
) -> Tensor:
    """Adds the pooling branch, which takes the remaining channels, and concatenates all branches."""
    remainder = max(1, widths.total - sum(branch.shape[-1] for branch in branches))
    pooled = layers.MaxPooling2D((3, 3), strides=1, padding="same", name=f"{name}_Branch_3_pool")(x)
    projected = conv_bn_relu(pooled, remainder, (1, 1), f"{name}_Branch_3", momentum)
    return layers.Concatenate(name=f"{name}_Concatenated")([*branches, projected])


def _single_conv(x: Tensor, widths: BranchWidths, name: str, momentum: float | None, kernel_size: int) -> Tensor:
    """Applies one convolution with as many filters as give it the multiply-accumulates of `inception_v1`."""
    in_channels = x.shape[-1]
    per_filter = conv_macs(1, 1, in_channels, 1, (kernel_size, kernel_size))
    filters = max(1, int(inception_v1_macs(in_channels, widths) / per_filter + 0.5))
    return conv_bn_relu(x, filters, (kernel_size, kernel_size), name, momentum)


BlockKind = Callable[[Tensor, BranchWidths, str, float | None], Tensor]

BLOCK_KINDS: dict[str, BlockKind] = {
    "conv": conv_block,
    "conv_bn": conv_bn_block,
    "inception_naive": inception_naive,
    "inception_v1": inception_v1,
    "inception_two_3x3": inception_two_3x3,
    "inception_v3": inception_v3,
    "inception_expanded": inception_expanded,
    "inception_3x3_reduce": inception_3x3_reduce,
    "single_1x1": single_1x1,
    "single_3x3": single_3x3,
    "single_5x5": single_5x5,
}

# Kinds that are a single convolution of a VGG stage and use its layer names (`block1_conv1`).
PLAIN_KINDS = frozenset({"conv", "conv_bn"})
