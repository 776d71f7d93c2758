"""Files that a network is given away in, each by its name: how it is written, and read by its own runtime.

FORMATS["onnx"].write(content, place / "model.onnx")
predict = read("onnx", place / "model.onnx")        (imports ONNX Runtime and nothing of this project)
predict(images)                                      (uint8 [N, H, W, C] -> float32 [N, classes])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """packages: modules of the extra `export` that it needs. quantizations: those that it knows."""

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
    """The formats that are meant. name: one of FORMATS, or all: those that know the quantization.

    Raises: ValueError for what is none of them, or has not got its packages.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize}")
    able = [known for known, one in FORMATS.items() if quantize in one.quantizations]
    if name not in FORMATS and name != "all":
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, all, got {name}")
    if name != "all" and name not in able:
        raise ValueError(f"quantize={quantize} must go with format={' or '.join(able)}, got format={name}")
    chosen = able if name == "all" else [name]
    for one in chosen:
        missing = [package for package in FORMATS[one].packages if not _is_installed(package)]
        if missing:
            raise ValueError(
                f"format={one} must have {', '.join(FORMATS[one].packages)}, got no {', '.join(missing)}; "
                f"install the extra {OPTIONAL_EXTRA}: .venv/bin/python -m uv pip install --python .venv/bin/python "
                f"-r requirements/{OPTIONAL_EXTRA}.lock"
            )
    return chosen


def _is_installed(package: str) -> Any:
    return importlib.util.find_spec(package)
