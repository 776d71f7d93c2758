"""Converters: write a deployment model (train.models.deployment) as a file of each format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras
    import onnx
    import tensorflow as tf

NEVER_QUANTIZED = ("preprocessing", "probabilities")  # parts of node names that keep float32
LUMA_WEIGHTS = (19595, 38470, 7471)  # ITU-R 601-2 in units of 1/65,536, as Pillow rounds them
CLASSES = "classes"


@dataclass(frozen=True)
class ExportBundle:
    """The contents of an export. classes: in the order of the output. background: RGB behind transparent pixels.

    quantize: none, float16 or int8. calibration_images: uint8 [N, H, W, C], for the ranges of int8 activations.
    """

    model: keras.Model
    classes: Sequence[str]
    background: Sequence[int]
    quantize: str
    calibration_images: np.ndarray


def write_keras(bundle: ExportBundle, path: Path) -> None:
    bundle.model.save(path)


# ---------------------------------------------------------------------------------------------------------- TensorFlow


def write_saved_model(bundle: ExportBundle, path: Path) -> None:
    """Writes a SavedModel with the signatures `serving_default`, of images, and `encoded`, of JPEG or PNG strings [N].

    Both return `probabilities` and `classes`, the names in the same order, each [N, classes].
    """
    import tensorflow as tf
    from keras.export import ExportArchive

    model = bundle.model
    channels = model.input_shape[-1]
    names = tf.constant(list(bundle.classes))

    def with_classes(probabilities: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": probabilities, CLASSES: tf.tile(names[None], [tf.shape(probabilities)[0], 1])}

    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return with_classes(model(images, training=False))

    def encoded(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        output_spec = tf.TensorSpec([len(bundle.classes)], tf.float32)
        probabilities = tf.map_fn(
            lambda data: model(_decode_image(data, channels, bundle.background)[None], training=False)[0],
            encoded,
            fn_output_signature=output_spec,
        )
        return with_classes(probabilities)

    archive = ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, [tf.TensorSpec(model.input_shape, tf.uint8, "images")])
    archive.add_endpoint("encoded", encoded, [tf.TensorSpec([None], tf.string, "encoded")])
    archive.write_out(str(path), verbose=False)


def _decode_image(data: tf.Tensor, channels: int, background: Sequence[int]) -> tf.Tensor:
    """Decodes a string to uint8 [H, W, channels], bit-identical to train.data.decode for upright images."""
    import tensorflow as tf

    def png() -> tf.Tensor:
        pixels = tf.cast(tf.io.decode_png(data, channels=4), tf.int32)
        alpha = pixels[..., 3:]
        blended = pixels[..., :3] * alpha + tf.constant(list(background)) * (255 - alpha)
        return (blended + 127) // 255

    def jpeg() -> tf.Tensor:
        return tf.cast(tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"), tf.int32)

    colour = tf.cond(tf.io.is_jpeg(data), jpeg, png)
    if channels == 1:
        colour = (tf.reduce_sum(colour * tf.constant(LUMA_WEIGHTS), axis=-1, keepdims=True) + 32768) // 65536
    return tf.cast(colour, tf.uint8)


# ---------------------------------------------------------------------------------------------------------------- ONNX


def write_onnx(bundle: ExportBundle, path: Path) -> None:
    """Writes an ONNX file: input `images`, output `probabilities`, the classes as JSON in the metadata `classes`."""
    import onnx

    bundle.model.export(path, format="onnx", verbose=False)
    graph = onnx.load(path)
    _rename_output(graph, "probabilities")
    if bundle.quantize == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        graph = convert_float_to_float16(graph, keep_io_types=True, node_block_list=_unquantized_onnx_nodes(graph))
    if bundle.quantize == "int8":
        graph = _quantize_onnx_int8(graph, bundle.calibration_images)
    onnx.helper.set_model_props(graph, {CLASSES: json.dumps(list(bundle.classes))})
    onnx.save(graph, path)


def _unquantized_onnx_nodes(graph: onnx.ModelProto) -> list[str]:
    """Returns the names of the nodes that NEVER_QUANTIZED covers."""
    return [node.name for node in graph.graph.node if any(part in node.name for part in NEVER_QUANTIZED)]


def _rename_output(graph: onnx.ModelProto, name: str) -> None:
    [output] = graph.graph.output
    for node in graph.graph.node:
        for edges in (node.input, node.output):
            edges[:] = [name if edge == output.name else edge for edge in edges]
    output.name = name


def _quantize_onnx_int8(graph: onnx.ModelProto, calibration_images: np.ndarray) -> onnx.ModelProto:
    """Quantizes weights and activations to int8, except what NEVER_QUANTIZED covers."""
    import onnx
    from onnxruntime import quantization as onnx_quantization

    class Images(onnx_quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration_images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.batches, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "int8.onnx"
        onnx_quantization.quantize_static(
            graph, path, Images(), per_channel=True, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=_unquantized_onnx_nodes(graph),
        )  # fmt: skip
        return onnx.load(path)


# -------------------------------------------------------------------------------------------------------------- TFLite


def write_tflite(bundle: ExportBundle, path: Path) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as directory:
        bundle.model.export(directory, format="tf_saved_model", verbose=False)

        def make_converter() -> tf.lite.TFLiteConverter:
            converter = tf.lite.TFLiteConverter.from_saved_model(directory)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
            if bundle.quantize != "none":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if bundle.quantize == "float16":
                converter.target_spec.supported_types = [tf.float16]
            return converter

        path.write_bytes(
            _quantize_tflite_int8(make_converter, bundle.calibration_images)
            if bundle.quantize == "int8"
            else make_converter().convert()
        )


def _quantize_tflite_int8(
    make_converter: Callable[[], tf.lite.TFLiteConverter], calibration_images: np.ndarray
) -> bytes:
    """Quantizes weights and activations to int8, except what NEVER_QUANTIZED covers."""
    import tensorflow as tf

    float_converter = make_converter()
    float_converter.optimizations = []
    int8_converter = make_converter()
    int8_converter.representative_dataset = lambda: ([image[None]] for image in calibration_images)
    options = tf.lite.experimental.QuantizationDebugOptions(
        denylisted_nodes=_unquantized_tflite_nodes(float_converter.convert())
    )
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=int8_converter, debug_dataset=int8_converter.representative_dataset, debug_options=options
    )
    return debugger.get_nondebug_quantized_model()


def _unquantized_tflite_nodes(model_bytes: bytes) -> list[str]:
    """Returns, by output tensor, the nodes that NEVER_QUANTIZED covers and the model's output, named otherwise."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model_bytes)
    names = [tensor["name"] for tensor in interpreter.get_tensor_details()]
    outputs = [output["name"] for output in interpreter.get_output_details()]
    return [name for name in names if name in outputs or any(part in name for part in NEVER_QUANTIZED)]
