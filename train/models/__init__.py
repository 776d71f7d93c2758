"""The model registry: builds a network by its name and checks its options."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar

import keras

from train.config import schema
from train.models.blocks import BLOCK_KINDS
from train.models.heads import HEADS
from train.models.inception_resnet_v2 import inception_resnet_v2
from train.models.inception_v1 import inception_v1
from train.models.inception_v3 import inception_v3
from train.models.layer_groups import group_layers
from train.models.vgg16 import STAGES, vgg16
from train.models.vgg16_inception import vgg16_inception
from train.models.weights import load as load_weights

__all__ = [
    "BLOCK_KINDS",
    "BUILDERS",
    "HEADS",
    "MIN_IMAGE_SIZE",
    "NATIVE_SIZE",
    "build",
    "group_layers",
    "inference_model",
    "load_weights",
    "option_names",
]  # fmt: skip

BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "vgg16": vgg16,
    "vgg16_inception": vgg16_inception,
    "inception_v1": inception_v1,
    "inception_v3": inception_v3,
    "inception_resnet_v2": inception_resnet_v2,
}

# The smallest side of an image, in pixels, that leaves a feature map at the end of the trunk.
MIN_IMAGE_SIZE: dict[str, int] = {
    "vgg16": 32,
    "vgg16_inception": 32,
    "inception_v1": 32,
    "inception_v3": 75,
    "inception_resnet_v2": 75,
}

# The side of the images in the papers, in pixels.
NATIVE_SIZE: dict[str, int] = {
    "vgg16": 224,
    "vgg16_inception": 224,
    "inception_v1": 224,
    "inception_v3": 299,
    "inception_resnet_v2": 299,
}


def build(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    **options: object,
) -> keras.Model:
    """Returns the named network.

    Args:
        name: a key of `BUILDERS`.
        input_shape: height, width (each at least `MIN_IMAGE_SIZE[name]`) and channels (1 or 3).
        num_classes: at least 2.
        **options: `width` (channel multiplier, above 0), `head` (a key of `HEADS`), `batch_norm_momentum` (0 to 1,
            1 excluded), `aux_weight` (0 builds no auxiliary head); `vgg16_inception` has `blocks` (five keys of
            `BLOCK_KINDS`), `inception_v1` has `batch_norm` (bool). Those left out have the config schema's defaults.

    Returns:
        A model from uint8 or float `[N, H, W, C]` in 0..255 to a dict of float32 `[N, num_classes]` logits: `main`,
        and `aux` (or `aux_1`, `aux_2`) where there are auxiliary heads. `keras.utils.set_random_seed` determines
        the initial values.

    Raises:
        ValueError: an unknown name or option, or a value out of range; the message says what is allowed.
    """
    builder = _look_up("model", name, BUILDERS)
    _check_options(name, options)
    for option, value in options.items():
        OPTION_CHECKS[option](value)
    shape = _check_shape(name, input_shape)
    if not _is_int(num_classes) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2, got {num_classes!r}; use 2 or more")
    return builder(shape, num_classes, **default_options(name) | options)


def inference_model(model: keras.Model) -> keras.Model:
    """Returns the network without its auxiliary heads, sharing all variables with `model`.

    Input: that of `model`. Output: float32 `[N, num_classes]`, the `main` logits. The network consists of Keras's own
    layers and operations, so that it loads where this package is not installed.
    """
    return keras.Model(model.input, model.output["main"], name=model.name)


def default_options(name: str) -> dict[str, object]:
    """Returns the values that the config schema gives to the options of the named model."""
    defaults = schema.options(schema.GROUPS["model"][name]())
    return {option: defaults[option] for option in option_names(name)}


def option_names(name: str) -> tuple[str, ...]:
    """Returns the names of the options that the named model takes."""
    parameters = inspect.signature(_look_up("model", name, BUILDERS)).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


# --- checks ----------------------------------------------------------------------------------------------------------


Entry = TypeVar("Entry")


def _look_up(field: str, name: object, table: dict[str, Entry]) -> Entry:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{field} must be one of {', '.join(table)}, got {name!r}; use {field}={next(iter(table))}")
    return table[name]


def _check_options(name: str, options: dict[str, object]) -> None:
    allowed = option_names(name)
    for option in options:
        if option not in allowed:
            raise ValueError(f"model.{option} is not an option of {name}; its options are {', '.join(allowed)}")


def _check_shape(name: str, input_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(_is_int(size) for size in shape):
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape!r}; use (32, 32, 3)")
    if shape[2] not in (1, 3):
        raise ValueError(f"data.channels must be 1 or 3, got {shape[2]}; use data.channels=3")
    minimum = MIN_IMAGE_SIZE[name]
    if min(shape[:2]) < minimum:
        raise ValueError(
            f"data.image_size must be at least {minimum} for {name}, got {min(shape[:2])}; "
            f"use data.image_size={minimum}"
        )
    if keras.config.image_data_format() != "channels_last":
        raise ValueError("image_data_format must be channels_last, got channels_first; change it in keras.json")
    return shape


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_width(value: object) -> None:
    if not _is_finite_number(value) or value <= 0:
        raise ValueError(f"model.width must be a number above 0, got {value!r}; use model.width=1.0")


def _check_momentum(value: object) -> None:
    if not _is_finite_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"model.batch_norm_momentum must be at least 0 and below 1, got {value!r}; "
            "use model.batch_norm_momentum=0.9"
        )


def _check_aux_weight(value: object) -> None:
    if not _is_finite_number(value) or value < 0:
        raise ValueError(
            f"model.aux_weight must be at least 0, got {value!r}; use model.aux_weight=0 for no auxiliary head"
        )


def _check_blocks(value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(STAGES):
        raise ValueError(
            f"model.blocks must be a list of {len(STAGES)} block kinds, one for each stage, got {value!r}; "
            f"the kinds are {', '.join(BLOCK_KINDS)}"
        )
    for kind in value:
        if kind not in BLOCK_KINDS:
            raise ValueError(f"model.blocks must contain only {', '.join(BLOCK_KINDS)}, got {kind!r}; use one of these")


def _check_batch_norm(value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"model.batch_norm must be true or false, got {value!r}; use model.batch_norm=true")


def _check_head(value: object) -> None:
    _look_up("model.head", value, HEADS)


OPTION_CHECKS: dict[str, Callable[[object], None]] = {
    "width": _check_width,
    "head": _check_head,
    "batch_norm_momentum": _check_momentum,
    "aux_weight": _check_aux_weight,
    "blocks": _check_blocks,
    "batch_norm": _check_batch_norm,
}
