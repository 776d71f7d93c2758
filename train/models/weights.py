"""Loads weights from files into models, and builds models without weights."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
from keras.src.backend.common import global_state

log = logging.getLogger(__name__)

MAX_LISTED_DIFFERENCES = 5  # in the error message
IMAGENET = "imagenet"
KERAS_APPLICATIONS = {"vgg16": "VGG16", "inception_v3": "InceptionV3", "inception_resnet_v2": "InceptionResNetV2"}
FILE_SUFFIXES = (".weights.h5", ".h5", ".keras")
# Layers that depend on the classes or the image size: for a new task they differ in shape or are absent.
HEAD_LAYER_PATTERN = re.compile(r"(fc1|fc2|predictions|aux_.*)")
# Names that Keras numbers: they depend on what else the process that wrote the file had built.
AUTO_NUMBERED_PATTERNS = tuple(re.compile(rf"{kind}(_\d+)?") for kind in ("conv2d", "batch_normalization"))
# Where Keras 3 stores a layer's variables; the state of dropout's generator is stored deeper and is not a weight.
LAYER_PATH_PATTERN = re.compile(r"layers/[^/]+/vars")

LayerWeights = dict[str, list[np.ndarray]]  # layer name -> its variables' values, in the layer's own order


@contextmanager
def without_weights() -> Iterator[None]:
    """Builds models whose variables have shapes but no values, for counting and as templates.

    A network of 138 million parameters then takes hundredths of a second instead of seconds, and no memory. Such a
    model can be inspected, but not called, and its variables cannot be read.
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras keeps a list of uninitialised variables and would initialise them with the next model; it has no public
        # way to clear it. Where these contexts are nested, the outer one has nothing to initialise either.
        global_state.set_global_attribute("uninitialized_variables", [])


@dataclass
class LoadReport:
    """The names of the layers that were loaded from a file, and of those that were not."""

    loaded: list[str] = field(default_factory=list)
    # Heads that are missing in the file or have another shape there; they keep their initial values.
    newly_initialized: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # heads that only the file has
    adapted: list[str] = field(default_factory=list)  # loaded layers whose colour kernel was summed for grey images

    def summary(self) -> str:
        """Formats the report in one line."""
        parts = [f"{len(self.loaded)} layers loaded, {self.loaded[0]} to {self.loaded[-1]}"]
        if self.adapted:
            parts.append(f"{', '.join(self.adapted)} summed over the three colour channels")
        if self.newly_initialized:
            parts.append(f"newly initialised: {', '.join(self.newly_initialized)}")
        if self.unused:
            parts.append(f"unused in file: {', '.join(self.unused)}")
        return f"weights: {'; '.join(parts)}"


def load(model: keras.Model, path: str | Path, *, load_heads: bool = True) -> LoadReport:
    """Copies the weights in a local file into `model`, layer by layer, by name.

    `path` is `imagenet`, for the weights that Keras publishes, or ends in `.weights.h5`, `.h5` (weights or a whole
    model, as keras.applications publishes them) or `.keras`.
    Where the file's names are numbered by Keras (`conv2d_7`) and differ from the model's, layers are matched by their
    order, as Keras itself does. A first convolution for colour images is summed over its channels for grey images: its
    output is that for an image with equal channels (nearly so in vgg16, whose mean differs by channel). Heads (`fc1`,
    `fc2`, `predictions`, `aux_...`) that differ keep their initial values, as all heads do if `load_heads` is False;
    the report names them.

    Raises:
        ValueError: no such file, another format, or a trunk that differs from the model's in any layer; the model is
            unchanged then.
    """
    file_weights = imagenet_weights(model.name) if str(path) == IMAGENET else read_weights_file(path := Path(path))
    model_layers = {layer.name: layer for layer in _layers_with_weights(model)}
    if not load_heads:
        file_weights = {name: values for name, values in file_weights.items() if not HEAD_LAYER_PATTERN.fullmatch(name)}
    file_weights = _rename_auto_numbered(model_layers, file_weights)
    file_weights, adapted = _adapt_input_channels(next(iter(model_layers.values())), file_weights)
    report = _compare_layers(model_layers, file_weights, path)
    report.adapted = adapted
    for name in report.loaded:
        model_layers[name].set_weights(file_weights[name])
    log.info("%s, from %s", report.summary(), path)
    return report


def imagenet_weights(name: str) -> LayerWeights:
    """Returns the ImageNet weights that Keras publishes for an architecture, without classifier; cached in ~/.keras.

    Raises:
        ValueError: Keras publishes none for it, or the download fails.
    """
    if name not in KERAS_APPLICATIONS:
        raise ValueError(
            f"model.weights=imagenet exists for {', '.join(KERAS_APPLICATIONS)}, not for {name}; use null or a file"
        )
    try:
        published = getattr(keras.applications, KERAS_APPLICATIONS[name])(weights=IMAGENET, include_top=False)
    except Exception as error:  # Keras raises a bare Exception
        raise ValueError(
            f"cannot download the weights for model.weights=imagenet: {' '.join(str(error).split())}; download that "
            "file on a machine with a network connection, and use model.weights=PATH"
        ) from error
    return {layer.name: layer.get_weights() for layer in published.layers if layer.weights}


def read_weights_file(path: Path) -> LayerWeights:
    """Returns the weights in a file by layer name.

    Raises:
        ValueError: no such file, or an unknown format.
    """
    if not path.name.endswith(FILE_SUFFIXES):
        raise ValueError(
            f"model.weights must end in {', '.join(FILE_SUFFIXES)}, got {path}; use a file that Keras wrote"
        )
    if not path.is_file():
        raise ValueError(f"model.weights={path} does not exist; use the path of a file on this machine")
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as member:
                return _read_hdf5(member, archive.getinfo("model.weights.h5").file_size)
        return _read_hdf5(path, path.stat().st_size)
    except (OSError, KeyError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read model.weights={path} ({reason}); use an undamaged file that Keras wrote"
        ) from error


def _read_hdf5(file: Path | IO[bytes], size: int) -> LayerWeights:
    with h5py.File(file, "r") as root:
        group = root.get("model_weights", root)  # a whole model in the old format stores them one level down
        read_array = SafeArrayReader(size)
        if "layer_names" in group.attrs:
            return _read_legacy_hdf5(group, read_array)
        return _read_keras3_hdf5(root, read_array)


@dataclass
class SafeArrayReader:
    """Reads arrays from an untrusted file: only those stored in it, and at most `bytes_left` bytes in total."""

    bytes_left: int

    def __call__(self, group: h5py.Group, name: str) -> np.ndarray:
        """Reads one array. Raises: ValueError if it is stored elsewhere, or is larger than the file."""
        item = group[name]
        if not isinstance(item, h5py.Dataset) or item.file != group.file or item.external or item.is_virtual:
            raise ValueError(f"{name} is not an array stored in the file")
        self.bytes_left -= item.nbytes
        if self.bytes_left < 0:
            raise ValueError(f"{name} is larger than the file")
        return np.asarray(item)


def _read_legacy_hdf5(group: h5py.Group, read_array: SafeArrayReader) -> LayerWeights:
    """Reads the format of Keras 1, 2 and keras.applications: a group for each layer, variables listed by name."""
    values = {}
    for name in map(_to_str, group.attrs["layer_names"]):
        variables = [read_array(group[name], _to_str(variable)) for variable in group[name].attrs["weight_names"]]
        if variables:
            values[name] = variables
    return values


def _read_keras3_hdf5(root: h5py.File, read_array: SafeArrayReader) -> LayerWeights:
    """Reads the format of Keras 3: a group for each layer, its name in an attribute, variables numbered in `vars`."""
    values: LayerWeights = {}

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if LAYER_PATH_PATTERN.fullmatch(path) and len(item):
            variables = [read_array(item, key) for key in sorted(item, key=int)]
            values[_to_str(item.attrs["name"])] = variables

    root.visititems(visit)
    return values


def _to_str(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _layers_with_weights(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model.layers if layer.weights]


def _rename_auto_numbered(model_layers: dict[str, keras.Layer], file_weights: LayerWeights) -> LayerWeights:
    """Renames the file's auto-numbered layers to the model's, kind by kind in the order of their numbers."""
    names: dict[str, str] = {}
    for kind in AUTO_NUMBERED_PATTERNS:
        in_file, in_model = (
            sorted(filter(kind.fullmatch, layer_names), key=_name_index) for layer_names in (file_weights, model_layers)
        )
        if set(in_file) != set(in_model) and len(in_file) == len(in_model):
            names |= zip(in_file, in_model, strict=True)
    return {names.get(name, name): variables for name, variables in file_weights.items()}


def _name_index(name: str) -> int:
    """Returns the number at the end of a name: 0 for conv2d, 7 for conv2d_7."""
    tail = name.rpartition("_")[2]
    return int(tail) if tail.isdigit() else 0


def _adapt_input_channels(first_layer: keras.Layer, file_weights: LayerWeights) -> tuple[LayerWeights, list[str]]:
    """Sums the first layer's kernel [H, W, 3, F] over its channels if the model's own has one channel."""
    kernel, *others = file_weights.get(first_layer.name, [np.empty(0)])
    model_shape = tuple(first_layer.weights[0].shape)
    if len(model_shape) != 4 or model_shape[2] != 1 or kernel.shape != (*model_shape[:2], 3, model_shape[3]):
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
        expected = [tuple(variable.shape) for variable in layer.weights]
        actual = [variable.shape for variable in file_weights[name]] if name in file_weights else None
        if actual == expected:
            report.loaded.append(name)
        elif HEAD_LAYER_PATTERN.fullmatch(name):
            report.newly_initialized.append(name)
        else:
            in_file = "not in the file" if actual is None else f"{actual} in the file"
            problems.append(f"{name}: {in_file}, {expected} in the model")
    if problems:
        named = "; ".join(problems[:MAX_LISTED_DIFFERENCES]) + (
            "; ..." if len(problems) > MAX_LISTED_DIFFERENCES else ""
        )
        raise ValueError(
            f"model.weights={path} does not fit the model; mismatched layers ({len(problems)}): {named}; "
            "use a file of the same architecture, width and number of channels"
        )
    return report
