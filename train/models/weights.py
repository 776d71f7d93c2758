"""Values of a network's variables: files that bring them, and models that need none."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
from keras.src.backend.common import global_state

log = logging.getLogger(__name__)

MAX_LISTED_DIFFERENCES = 5  # differences that are named
IMAGENET = "imagenet"
KERAS_APPLICATIONS = {"vgg16": "VGG16", "inception_v3": "InceptionV3", "inception_resnet_v2": "InceptionResNetV2"}
FILE_SUFFIXES = (".weights.h5", ".h5", ".keras")
# Layers that depend on the classes or the image size: another shape, or none, is what a new task looks like.
HEAD_LAYER_PATTERN = re.compile(r"(fc1|fc2|predictions|aux_.*)")
# Names that Keras gives by counting: they depend on what else was built in the process that wrote the file.
AUTO_NUMBERED_PATTERNS = tuple(re.compile(rf"{kind}(_\d+)?") for kind in ("conv2d", "batch_normalization"))
# Where Keras 3 keeps a layer's variables; the state of dropout's random numbers lies deeper and is no weight.
LAYER_PATH_PATTERN = re.compile(r"layers/[^/]+/vars")

LayerWeights = dict[str, list[np.ndarray]]  # layer name -> its variables' values, in the layer's own order


@contextmanager
def without_weights() -> Iterator[None]:
    """Builds models whose variables have shapes and no values: for counting, and as patterns for others.

    A network of 138 million parameters takes hundredths of a second instead of seconds, and no memory. Such a model
    can be inspected; to call it or to read its variables is an error.
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras remembers what was not initialised and would do it in the next model that somebody builds. It has no
        # public way to forget. Where these blocks are nested, the outer one has nothing to initialise either.
        global_state.set_global_attribute("uninitialized_variables", [])


@dataclass
class LoadReport:
    """What a file gave to a model: names of layers."""

    loaded: list[str] = field(default_factory=list)
    newly_initialized: list[str] = field(
        default_factory=list
    )  # heads of another shape or missing in the file: initial values stay
    unused: list[str] = field(default_factory=list)  # heads that only the file has
    adapted: list[str] = field(default_factory=list)  # of those loaded: made for colours, summed up for grey images

    def summary(self) -> str:
        """What somebody should hear who starts from these weights."""
        parts = [f"{len(self.loaded)} layers loaded, {self.loaded[0]} to {self.loaded[-1]}"]
        if self.adapted:
            parts.append(f"{', '.join(self.adapted)} summed over its three colours")
        if self.newly_initialized:
            parts.append(f"new: {', '.join(self.newly_initialized)}")
        if self.unused:
            parts.append(f"of the file not used: {', '.join(self.unused)}")
        return f"weights: {'; '.join(parts)}"


def load(model: keras.Model, path: str | Path, *, load_heads: bool = True) -> LoadReport:
    """Copies the weights in a local file into `model`, layer by layer, by name.

    `path` is `imagenet`, for what Keras publishes, or ends in `.weights.h5`, `.h5` (weights or a whole model, as
    keras.applications publishes them) or `.keras`.
    Where a file's names are those that Keras counts up (`conv2d_7`) and they are not the model's, the order of the
    layers decides, as it does in Keras itself. A first convolution of three colours is summed up for grey images: it
    answers them as it answers an image whose colours are equal (nearly so in vgg16, whose mean differs from colour to
    colour). Heads (`fc1`, `fc2`, `predictions`, `aux_...`) that differ keep their initial values, as all do without
    `heads`; the report names them.

    Raises:
        ValueError: no such file, another format, or a trunk that differs from the model's in any layer; nothing is
            changed in the model then.
    """
    theirs = imagenet_weights(model.name) if str(path) == IMAGENET else read_weights_file(path := Path(path))
    ours = {layer.name: layer for layer in _layers_with_weights(model)}
    if not load_heads:
        theirs = {name: values for name, values in theirs.items() if not HEAD_LAYER_PATTERN.fullmatch(name)}
    theirs, adapted = _adapt_input_channels(next(iter(ours.values())), _rename_auto_numbered(ours, theirs))
    report = _compare_layers(ours, theirs, path)
    report.adapted = adapted
    for name in report.loaded:
        ours[name].set_weights(theirs[name])
    log.info("%s, from %s", report.summary(), path)
    return report


def imagenet_weights(name: str) -> LayerWeights:
    """What Keras publishes for this architecture, trained on ImageNet, without its classifier; kept in ~/.keras.

    Raises:
        ValueError: nothing is published for it, or it can't be fetched.
    """
    if name not in KERAS_APPLICATIONS:
        raise ValueError(
            f"model.weights=imagenet must go with {', '.join(KERAS_APPLICATIONS)}, got {name}; use null or a file"
        )
    try:
        theirs = getattr(keras.applications, KERAS_APPLICATIONS[name])(weights=IMAGENET, include_top=False)
    except Exception as error:  # Keras raises a bare one
        raise ValueError(
            f"model.weights=imagenet must be fetched, got {' '.join(str(error).split())}; fetch that file where there "
            "is a network, and use model.weights=PATH"
        ) from error
    return {layer.name: layer.get_weights() for layer in theirs.layers if layer.weights}


def read_weights_file(path: Path) -> LayerWeights:
    """Returns the values in a weights file by layer name.

    Raises:
        ValueError: no such file, or not one of the formats.
    """
    if not path.name.endswith(FILE_SUFFIXES):
        raise ValueError(
            f"model.weights must end in {', '.join(FILE_SUFFIXES)}, got {path}; use a file that Keras wrote"
        )
    if not path.is_file():
        raise ValueError(f"model.weights must be a file, got {path}; use the path of a file on this machine")
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as member:
                return _read_hdf5(member, archive.getinfo("model.weights.h5").file_size)
        return _read_hdf5(path, path.stat().st_size)
    except (OSError, KeyError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"model.weights must be a file that Keras wrote, got {path} ({why}); use an undamaged file"
        ) from error


def _read_hdf5(file: Any, size: int) -> LayerWeights:
    with h5py.File(file, "r") as root:
        group = root.get("model_weights", root)  # a whole model in the old format keeps them one level down
        take = SafeArrayReader(size)
        return _read_legacy_hdf5(group, take) if "layer_names" in group.attrs else _read_keras3_hdf5(root, take)


@dataclass
class SafeArrayReader:
    """Arrays out of a file that somebody else made: those that are in it, and no more than `left` bytes of them."""

    bytes_left: int

    def __call__(self, group: h5py.Group, name: str) -> np.ndarray:
        """Raises: ValueError for what lies elsewhere, or takes more room than the file has."""
        found = group[name]
        if not isinstance(found, h5py.Dataset) or found.file != group.file or found.external or found.is_virtual:
            raise ValueError(f"{name} is no array in the file")
        self.bytes_left -= found.nbytes
        if self.bytes_left < 0:
            raise ValueError(f"{name} is larger than the file")
        return np.asarray(found)


def _read_legacy_hdf5(group: h5py.Group, read_array: SafeArrayReader) -> LayerWeights:
    """Keras 1 and 2, and what keras.applications publishes: a group for each layer, variables listed by name."""
    values = {}
    for name in map(_to_str, group.attrs["layer_names"]):
        variables = [read_array(group[name], _to_str(variable)) for variable in group[name].attrs["weight_names"]]
        if variables:
            values[name] = variables
    return values


def _read_keras3_hdf5(root: h5py.File, read_array: SafeArrayReader) -> LayerWeights:
    """Keras 3: a group for each layer, its name in an attribute, its variables counted in `vars`."""
    values: LayerWeights = {}

    def visit(path: str, item: Any) -> None:
        if LAYER_PATH_PATTERN.fullmatch(path) and len(item):
            variables = [read_array(item, key) for key in sorted(item, key=int)]
            values[_to_str(item.attrs["name"])] = variables

    root.visititems(visit)
    return values


def _to_str(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _layers_with_weights(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model.layers if layer.weights]


def _rename_auto_numbered(model_layers: dict[str, keras.Layer], file_weights: LayerWeights) -> LayerWeights:
    """Renames a file's counted layers to the model's, kind by kind in the order of their numbers."""
    names: dict[str, str] = {}
    for kind in AUTO_NUMBERED_PATTERNS:
        counted, wanted = (
            sorted(filter(kind.fullmatch, found), key=_name_index) for found in (file_weights, model_layers)
        )
        if set(counted) != set(wanted) and len(counted) == len(wanted):
            names |= zip(counted, wanted, strict=True)
    return {names.get(name, name): variables for name, variables in file_weights.items()}


def _name_index(name: str) -> int:
    """conv2d is the first, conv2d_7 comes after conv2d_1."""
    tail = name.rpartition("_")[2]
    return int(tail) if tail.isdigit() else 0


def _adapt_input_channels(first_layer: keras.Layer, file_weights: LayerWeights) -> tuple[LayerWeights, list[str]]:
    """Sums a kernel [H, W, 3, F] of the layer that sees the image where the model's own has one channel."""
    kernel, *others = file_weights.get(first_layer.name, [np.empty(0)])
    grey, colour = tuple(first_layer.weights[0].shape), kernel.shape
    if len(grey) != 4 or grey[2] != 1 or colour != (*grey[:2], 3, grey[3]):
        return file_weights, []
    return {**file_weights, first_layer.name: [kernel.sum(axis=2, keepdims=True), *others]}, [first_layer.name]


def _compare_layers(model_layers: dict[str, keras.Layer], file_weights: LayerWeights, path: str | Path) -> LoadReport:
    report = LoadReport(
        unused=[name for name in file_weights if name not in model_layers and HEAD_LAYER_PATTERN.fullmatch(name)]
    )
    problems = [
        f"{name}: not in the model" for name in file_weights if name not in model_layers and name not in report.unused
    ]
    for name, layer in model_layers.items():
        want = [tuple(variable.shape) for variable in layer.weights]
        have = [variable.shape for variable in file_weights[name]] if name in file_weights else None
        if have == want:
            report.loaded.append(name)
        elif HEAD_LAYER_PATTERN.fullmatch(name):
            report.newly_initialized.append(name)
        else:
            problems.append(f"{name}: {'not in the file' if have is None else f'{have} in the file'}, model has {want}")
    if problems:
        named = "; ".join(problems[:MAX_LISTED_DIFFERENCES]) + (
            "; ..." if len(problems) > MAX_LISTED_DIFFERENCES else ""
        )
        raise ValueError(
            f"model.weights must fit the model, got {path} with {len(problems)} differences: {named}; "
            "use a file of the same architecture, width and number of channels"
        )
    return report
