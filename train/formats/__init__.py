"""Export formats by name: how each is written, and loaded by its own runtime.

FORMATS["onnx"].write(bundle, directory / "model.onnx")
predict = load_predictor("onnx", directory / "model.onnx")   (imports ONNX Runtime and nothing of this project)
predict(images)                                              (uint8 [N, H, W, C] -> float32 [N, classes])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.formats import converters
from train.formats.converters import ExportBundle
from train.formats.runtimes import FILE_NAMES, PREDICTOR_LOADERS, load_predictor
from train.formats.usage_snippets import RUNTIME_PACKAGES, usage_snippet

__all__ = [
    "FILE_NAMES",
    "FORMATS",
    "PREDICTOR_LOADERS",
    "QUANTIZATIONS",
    "RUNTIME_PACKAGES",
    "ExportBundle",
    "Format",
    "load_predictor",
    "resolve_formats",
    "usage_snippet",
]  # fmt: skip

QUANTIZATIONS = ("none", "float16", "int8")
OPTIONAL_EXTRA = "export"


@dataclass(frozen=True)
class Format:
    """An export format. packages: modules that it needs of the extra `export`. quantizations: those it supports."""

    write: Callable[[ExportBundle, Path], None]
    packages: tuple[str, ...] = ()
    quantizations: tuple[str, ...] = ("none",)


FORMATS: dict[str, Format] = {
    "keras": Format(converters.write_keras),
    "saved_model": Format(converters.write_saved_model),
    "onnx": Format(converters.write_onnx, ("onnx", "tf2onnx", "onnxruntime"), QUANTIZATIONS),
    "tflite": Format(converters.write_tflite, ("ai_edge_litert",), QUANTIZATIONS),
}


def resolve_formats(name: str, quantize: str) -> list[str]:
    """Returns the formats that `name` selects: a key of FORMATS, or all that support the quantization.

    Raises: ValueError for an unknown format, one that does not support the quantization, or missing packages.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize}")
    supporting = [key for key, export_format in FORMATS.items() if quantize in export_format.quantizations]
    if name not in FORMATS and name != "all":
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, all, got {name}")
    if name != "all" and name not in supporting:
        raise ValueError(f"quantize={quantize} needs format={' or '.join(supporting)}, got format={name}")
    selected = supporting if name == "all" else [name]
    for key in selected:
        missing = [package for package in FORMATS[key].packages if not _is_installed(package)]
        if missing:
            raise ValueError(
                f"format={key} needs {', '.join(FORMATS[key].packages)}; not installed: {', '.join(missing)}; "
                f"install the extra {OPTIONAL_EXTRA}: .venv/bin/python -m uv pip install --python .venv/bin/python "
                f"-r requirements/{OPTIONAL_EXTRA}.lock"
            )
    return selected


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
