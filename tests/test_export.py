"""`make export`: in every format the exported model gives the measured predictions, and its card says so."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from support.commands import ROOT, Done, message, run_command
from support.exports import ship
from support.shared import Finished
from train import formats, models
from train.cli.arguments import parse
from train.config.composition import compose
from train.config.schema import Distributed
from train.config.serialization import Redactor, to_dict
from train.data.decode import decode, resize
from train.export import Export, export, load_config, rejection_reason
from train.models.deployment import deployment_model, preprocessing_model, to_float32
from train.tracking.run_dir import RunDir

TEST_EXAMPLES = 340
QUICK = ("onnx", "tflite")  # need no TensorFlow


def summary_of(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "export" / name / "summary.json").read_text())


@pytest.mark.parametrize(("side", "channels", "fraction"), [(32, 1, 1.0), (64, 3, 0.875), (75, 3, 1.0)])
def test_exported_graph_resizes_like_the_pipeline(side: int, channels: int, fraction: float):
    graph, random = preprocessing_model(side, channels, fraction), np.random.default_rng(0)
    for height, width in ((side, side), (100, 61), (37, 200), (1, 1), (side + 1, side)):
        image = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        actual, expected = np.asarray(graph(image[None]))[0], resize(image, side, fraction).astype(float)
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= 1  # a half may be rounded up here and down there
        assert (actual != expected).mean() < 0.003


def test_network_of_any_precision_is_exported_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = models.inference_model(models.build("vgg16_inception", (32, 32, 3), 10, width=0.05))
    finally:
        keras.config.set_dtype_policy("float32")
    copy = to_float32(network)
    assert "mixed_bfloat16" in {layer.dtype_policy.name for layer in network.layers}
    assert {layer.dtype_policy.name for layer in copy.layers} == {"float32"}
    assert all(np.array_equal(one, other) for one, other in zip(network.weights, copy.weights, strict=True))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    probabilities = np.asarray(deployment_model(network, 1.0)(images))
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.allclose(probabilities, np.asarray(keras.ops.softmax(network(images))), atol=0.02)
    assert not np.array_equal(probabilities, np.asarray(keras.ops.softmax(network(images))))  # negative control


@pytest.mark.slow
@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_gives_the_predictions_of_the_run(name: str, shipped: tuple[Done, Path]):
    done, run = shipped
    assert done.code == 0, done.err
    summary, scores = summary_of(run, name), json.loads((run / "evaluation/test/scores.json").read_text())
    assert summary["examples"] == TEST_EXAMPLES
    assert summary["run_accuracy"] == pytest.approx(scores["accuracy"])
    assert abs(summary["accuracy"] - scores["accuracy"]) <= 1 / TEST_EXAMPLES  # the run computed in bfloat16
    assert summary["largest_difference"] < 1e-5
    file = run / "export" / name / formats.FILE_NAMES[name]
    held = [one.stat().st_size for one in ([file] if file.is_file() else file.rglob("*")) if one.is_file()]
    assert summary["bytes"] == sum(held)
    assert summary["images_per_second"] > 0
    assert not list((run / "export").glob(".*"))
    assert (run / "export" / name / "classes.txt").read_text().split() == [str(digit) for digit in range(10)]


def fenced(card: str, language: str) -> str:
    return card.split(f"```{language}\n")[1].split("```")[0]


def by_the_card(python: Path | str, folder: Path, place: Path) -> None:
    """The usage snippet of the model card, run in the folder of the export, gives the predictions of the run."""
    lines = fenced((folder / "README.md").read_text(), "python")
    assert len(lines.splitlines()) == 5
    image = np.random.default_rng(3).integers(0, 256, (61, 40), dtype=np.uint8)
    Image.fromarray(image).save(place / "three.png")
    program = f"path = {str(place / 'three.png')!r}\n{lines}"
    done = subprocess.run([python, "-I", "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predicted, share = done.stdout.split()
    wanted = formats.load_predictor("keras", folder.parent / "keras/model.keras")(image[None, :, :, None])[0]
    assert predicted == str(wanted.argmax())
    assert float(share) == pytest.approx(wanted.max(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in formats.FORMATS]
)
def test_usage_snippet_of_the_model_card_works(name: str, shipped: tuple[Done, Path], tmp_path: Path):
    by_the_card(sys.executable, shipped[1] / "export" / name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", formats.FORMATS)
def test_usage_snippet_needs_only_the_packages_of_the_model_card(name: str, shipped: tuple[Done, Path], tmp_path: Path):
    """uv installs them in seconds if it exists, since setup has filled its cache."""
    folder, place = shipped[1] / "export" / name, tmp_path / "fresh"
    install = fenced((folder / "README.md").read_text(), "sh").split()
    assert install[:2] == ["pip", "install"]
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python, uv = str(place / "bin/python"), Path(sys.executable).with_name("uv")
    quickly = [str(uv), *install, "--python", python, "--system-certs", "--quiet"]
    installed = run_command(*(quickly if uv.exists() else [python, "-m", *install]), timeout=900)
    assert installed.code == 0, installed.err
    by_the_card(place / "bin/python", folder, tmp_path)


@pytest.mark.slow
def test_model_card_names_its_origin(shipped: tuple[Done, Path]):
    run = shipped[1]
    card, summary = (run / "export/onnx/README.md").read_text(), summary_of(run, "onnx")
    run_summary = json.loads((run / "summary.json").read_text())
    for fact in (run_summary["data_fingerprint"], run_summary["run_id"], run_summary["config_hash"], summary["sha256"]):
        assert fact in card
    low, high = summary["accuracy_interval"]
    assert f"{summary['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, 340 examples)" in card


@pytest.mark.slow
def test_export_is_recorded_in_mlflow(shipped: tuple[Done, Path]):
    from mlflow import MlflowClient

    run = shipped[1]
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    [mlflow_run] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    for name in formats.FORMATS:
        assert mlflow_run.data.metrics[f"export/{name}/accuracy"] == summary_of(run, name)["accuracy"]
    files = {artifact.path for artifact in client.list_artifacts(mlflow_run.info.run_id, "export/tflite")}
    assert files == {"export/tflite/README.md", "export/tflite/summary.json"}


def encoded(image: np.ndarray, kind: str, mode: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image, mode).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_encoded_images_are_decoded_like_in_the_pipeline(channels: int):
    random, background = np.random.default_rng(0), (10, 200, 90)
    for kind, mode, depth in (
        ("PNG", "RGBA", 4),
        ("PNG", "RGB", 3),
        ("PNG", "L", 1),
        ("JPEG", "RGB", 3),
        ("JPEG", "L", 1),
    ):
        smooth = np.add.outer(np.arange(40), np.arange(30))[..., None] * np.arange(1, depth + 1)
        image = (smooth + random.integers(0, 30, smooth.shape)).astype(np.uint8).squeeze()
        data = encoded(image, kind, mode)
        decoded = formats.converters._decode_image(data, channels, background).numpy().astype(int)
        expected = decode(data, channels, background, max_pixels=None)
        assert np.abs(decoded - expected).max() <= 1, (kind, mode)


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        pytest.param("tflite", "int8", marks=pytest.mark.slow),
        pytest.param("tflite", "float16", marks=pytest.mark.slow),
        pytest.param("onnx", "int8", marks=pytest.mark.slow),
        pytest.param("onnx", "float16", marks=pytest.mark.slow),
    ],
)
def test_quantized_export_is_smaller_and_reports_its_loss(
    name: str, quantize: str, finished: Finished, shipped: tuple[Done, Path], tmp_path: Path
):
    overrides = (f"format={name}", f"quantize={quantize}", "export.max_accuracy_drop=0.05")
    done, run = ship(tmp_path, finished.path, *overrides)
    assert done.code == 0, done.err
    summary, whole = summary_of(run, f"{name}-{quantize}"), summary_of(shipped[1], name)
    assert summary["bytes"] < 0.8 * whole["bytes"]
    assert 10 * whole["largest_difference"] < summary["largest_difference"] < 0.2
    assert abs(summary["accuracy"] - summary["run_accuracy"]) <= 0.05
    if quantize == "int8":
        coarse, precise = kinds_of(name, run / "export" / f"{name}-int8" / formats.FILE_NAMES[name])
        assert coarse > 10
        assert precise <= 1  # the input of the network


def kinds_of(name: str, file: Path) -> tuple[int, int]:
    """The number of 8-bit tensors: in total, and of the resizing."""
    if name == "tflite":
        from ai_edge_litert.interpreter import Interpreter

        tensors = Interpreter(str(file)).get_tensor_details()
        few = [tensor["name"] for tensor in tensors if tensor["dtype"] == np.int8]
    else:
        import onnx

        few = [name for node in onnx.load(file).graph.node if node.op_type == "QuantizeLinear" for name in node.output]
    return len(few), sum("preprocessing" in one for one in few)


BROKEN = """
import sys
from dataclasses import replace
from train import export, formats

def zeros(content, path):
    content.model.set_weights([0 * weight for weight in content.model.get_weights()])
    content.model.save(path)

def fails(content, path):
    raise RuntimeError("no such operation")

formats.FORMATS["keras"] = replace(formats.FORMATS["keras"], write=zeros)
formats.FORMATS["saved_model"] = replace(formats.FORMATS["saved_model"], write=fails)
del formats.FORMATS["onnx"], formats.FORMATS["tflite"]
sys.exit(export.export(sys.argv[1:]))
"""


@pytest.mark.slow
def test_broken_conversion_is_discarded_and_stops_no_other(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    (run / "export/keras").mkdir(parents=True)  # an earlier export
    paths = [f"run={run}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    done = run_command(sys.executable, "-c", BROKEN, *paths, "format=all")
    assert done.code == 1
    assert "rejected: accuracy drops by 0." in done.out
    assert "rejected: the export failed" in done.out
    assert "error: saved_model: RuntimeError: no such operation" in done.err
    assert list((run / "export").iterdir()) == []


def test_rejection_reasons_of_an_export():
    good = {"accuracy": 0.9, "run_accuracy": 0.91, "largest_difference": 0.1}
    assert rejection_reason(good, 0.02) == ""
    assert rejection_reason(good | {"accuracy": 0.5}, 0.02) == "accuracy drops by 0.4100, more than 0.02"
    assert rejection_reason(good | {"largest_difference": float("nan")}, 1) == "output contains NaN or infinity"


def test_unfinished_run_is_not_exported(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    for status in ("interrupted", "failed"):
        (run / "summary.json").write_text(json.dumps(finished.summary | {"status": status}))
        assert f"run {run} is not finished (status: {status}); run make resume run={run}" in message(
            export, [f"run={run}"]
        )
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["format=caffe"], "format must be one of keras, saved_model, onnx, tflite, all, got caffe"),
        (["quantize=int4"], "quantize must be one of none, float16, int8, got int4"),
        (["format=keras", "quantize=int8"], "quantize=int8 needs format=onnx or tflite, got format=keras"),
        (["export.max_accuracy_drop=nan"], "export.max_accuracy_drop must be a finite number, got nan; use e.g. "),
        (["export.max_accuracy_drop=2"], "export.max_accuracy_drop must be at least 0 and at most 1, got 2.0"),
        (["export.max_accuracy_drop=little"], "export.max_accuracy_drop must be a number, got little"),
        (["run=nowhere"], "nowhere is not a run folder; use e.g. run=runs/latest"),
    ],
)
def test_invalid_export_is_rejected(overrides: list[str], expected: str):
    assert expected in message(export, overrides)


PROCESSES = ["distributed.processes=2", "distributed.index=1", "distributed.coordinator=node1:4711"]


@pytest.mark.parametrize("typed", [["devices=2"], PROCESSES])
def test_run_on_several_devices_is_exported_on_one(typed: list[str], tmp_path: Path):
    config = compose(["model=vgg16", "backend=jax", "device=cpu", *typed])
    run_dir = RunDir(tmp_path, "a")
    run_dir.write_yaml("config.yaml", to_dict(config, Redactor()))
    run_dir.best.mkdir()
    run_dir.write_json("best/model.json", {"input": {"shape": [32, 32, 3]}, "validation": {}, "data_fingerprint": "b"})
    loaded = load_config(run_dir, [])
    assert (loaded.backend, loaded.device, loaded.devices, loaded.jit) == ("tensorflow", "cpu", "1", "off")
    assert loaded.distributed == Distributed()


def test_run_from_before_a_fixed_key_existed_is_exported(tmp_path: Path):
    stored = to_dict(compose(["model=vgg16"]), Redactor())
    del stored["distributed"]
    run_dir = RunDir(tmp_path, "a")
    run_dir.write_yaml("config.yaml", stored)
    run_dir.best.mkdir()
    run_dir.write_json("best/model.json", {"input": {"shape": [32, 32, 3]}, "validation": {}, "data_fingerprint": "b"})
    assert load_config(run_dir, []).jit == "off"


def test_data_is_not_a_key_of_export(finished: Finished):
    for word in ("data=folder", "data.crop_fraction=0.5", "evaluate.views=ten_crop", "model.width=1"):
        key = word.partition("=")[0]
        assert f'unknown key "{key}"; valid keys: run, format, quantize, export.max_accuracy_drop, data.root, ' in (
            message(export, [f"run={finished.path}", word])
        )


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else True)
    error = message(export, ["format=onnx"])
    assert "format=onnx needs onnx, tf2onnx, onnxruntime; not installed: tf2onnx; install the extra export" in error
    assert parse(Export, ["export.max_accuracy_drop=0.5"]).max_accuracy_drop == 0.5


def test_extra_lists_the_packages_of_the_formats():
    locked = (ROOT / "requirements/export.lock").read_text()
    for one in formats.FORMATS.values():
        for package in one.packages:
            assert f"\n{package.replace('_', '-')}==" in f"\n{locked}"


@pytest.mark.slow
def test_exported_model_resizes_larger_images_like_the_pipeline(shipped: tuple[Done, Path]):
    """The exported file resizes a larger image like the pipeline."""
    run = shipped[1]
    image = np.add.outer(2 * np.arange(90), np.arange(50)).astype(np.uint8)[..., None]
    read = formats.load_predictor("onnx", run / "export/onnx/model.onnx")
    small = resize(image, 32, crop_fraction=1)
    assert np.allclose(read(image[None]), read(small[None]), atol=1e-3)
    assert not np.allclose(read(image[None]), read(small[None, ::-1].copy()), atol=1e-3)
