"""`make predict` and `make serve`: images classified by the network of a run."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.commands import ROOT, Done, message, run_command
from support.shared import Finished
from train.config.serialization import RUN_FORMAT_VERSION
from train.predict import expand_paths, predict, top_classes
from train.serve import ServedModel
from train.tracking.run_dir import open_run_dir

HEAVY = (
    "mlflow",
    "matplotlib",
    "tensorflow_datasets",
    "hydra",
    "sklearn",
    "train.run.train_and_evaluate",
    "train.training.loop",
    "optuna",
    "pandas",
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first forty test digits in several folders, and files that are not valid images."""
    folder = tmp_path_factory.mktemp("pictures")
    from support.image_folders import load_digits

    test = load_digits(ROOT / "data", image_size=32).test
    for index in range(40):
        path = folder / "digits" / str(index % 3) / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(test.read([index])[0])
    (folder / "broken").mkdir()
    (folder / "broken/text.png").write_text("no picture")
    (folder / "broken/short.png").write_bytes(test.read([0])[0][:60])
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "broken/whole.png")
    (folder / "broken/.hidden").write_text("left out")
    return folder


def ask(run: Path, images: str, *words: str) -> Done:
    return run_command(sys.executable, "-m", "train.predict", f"run={run}", f"images={images}", *words)


def lines_of(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def test_predictions_match_the_evaluation(finished: Finished, pictures: Path):
    done = ask(finished.path, str(pictures / "digits"), "output=jsonl", "top=10")
    assert done.code == 0, done.err
    rows = (finished.path / "evaluation/test/predictions.csv").read_text().splitlines()[1:41]
    by_name = {Path(line["image"]).stem: line["predictions"] for line in lines_of(done)}
    assert len(by_name) == 40
    assert list(by_name) == sorted(by_name, key=lambda name: (int(name) % 3, name))  # folder by folder
    for number, row in enumerate(rows):
        _, _, predicted, confidence, _ = row.split(",")
        best, *others = by_name[f"{number:02}"]
        assert best["class"] == predicted
        assert best["probability"] == pytest.approx(float(confidence), abs=2e-6)
        assert sum(one["probability"] for one in (best, *others)) == pytest.approx(1, abs=1e-5)


def test_broken_image_is_named_and_stops_nothing(finished: Finished, pictures: Path):
    done = ask(finished.path, f"{pictures / 'broken'},{pictures / 'digits/0/00.png'}", "top=2")
    assert done.code == 1
    errors = done.err.strip().splitlines()
    assert [re.sub(r"^error: .*/", "", line).split(":")[0] for line in errors] == ["short.png", "text.png"]
    assert "not an image in a supported format" in errors[1]
    header, *rows = done.out.splitlines()
    assert header.split() == ["image", "1.", "2."]
    assert [Path(row.split()[0]).name for row in rows] == ["whole.png", "00.png"]
    assert all(re.fullmatch(r"\S+ +\d [01]\.\d{4}  \d [01]\.\d{4}", row) for row in rows)


@pytest.mark.slow
def test_onnx_predicts_without_tensorflow(shipped: tuple[Done, Path], pictures: Path):
    run = shipped[1]
    code = (
        "import sys; from train.predict import predict; "
        f"code = predict(['run={run}', 'images={pictures / 'digits'}', 'output=jsonl', 'runtime=onnx']); "
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    done = run_command(sys.executable, "-c", code)
    assert done.code == 0, done.err
    assert "'tensorflow'" not in done.err
    assert "'keras'" not in done.err
    by_keras = lines_of(ask(run, str(pictures / "digits"), "output=jsonl"))
    for one, other in zip(lines_of(done), by_keras, strict=True):
        assert one["image"] == other["image"]
        assert one["predictions"][0]["probability"] == pytest.approx(other["predictions"][0]["probability"], abs=0.02)


def test_nothing_of_training_tracking_or_plotting_is_imported(finished: Finished, pictures: Path):
    code = (
        "import sys; from train.predict import predict; "
        f"predict(['run={finished.path}', 'images={pictures / 'digits/0/00.png'}']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules and sys.modules[name]], file=sys.stderr)"
    )
    done = run_command(sys.executable, "-c", code)
    assert done.code == 0, done.err
    assert done.err.strip().splitlines()[-1] == "[]"


@pytest.mark.slow
def test_grad_cam_is_drawn_on_request(finished: Finished, pictures: Path, tmp_path: Path):
    done = ask(finished.path, str(pictures / "digits/0"), f"attention={tmp_path / 'new' / 'seen.png'}")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "new/seen.png") as image:
        assert image.width > 400


def test_folders_patterns_and_files_are_expanded(pictures: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pictures)
    assert len(list(expand_paths("digits"))) == 40
    assert len(list(expand_paths("digits/*/0*.png"))) == 10
    assert [path.name for path in expand_paths("broken,digits/0/00.png")] == [
        "short.png",
        "text.png",
        "whole.png",
        "00.png",
    ]
    (pictures / "a,b.png").write_bytes(b"")
    assert list(expand_paths("a,b.png")) == [Path("a,b.png")]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["images="], "images is missing; use images=PATH"),
        (["images=nothing*"], "no such file or folder: nothing*; images takes files, folders and patterns"),
        (["images=https://example.org/a.png"], "images must be local files, got https://example.org/a.png"),
        (["images=README.md", "run=nowhere"], "nowhere is not a run folder with saved weights"),
        (["images=README.md", "top=0"], "top must be at least 1, got 0; use e.g. top=5"),
        (["images=README.md", "output=xml"], "output must be one of table, jsonl, got xml"),
        (["images=README.md", "runtime=caffe"], "runtime must be one of keras, onnx, got caffe"),
        (["images=README.md", "runtime=onnx", "attention=x.png"], "attention needs runtime=keras, got runtime=onnx"),
        (["images=README.md", "attention=folder"], "attention must end in .png, got folder"),
        (["images=" + ",".join(["a" * 200] * 30)], "no such file or folder: aaa"),
    ],
)
def test_invalid_prediction_request_is_rejected(overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert expected in message(predict, overrides)


@pytest.mark.slow
def test_outdated_export_is_not_used(shipped: tuple[Done, Path], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(shipped[1], run, symlinks=True)
    model_info = json.loads((run / "best/model.json").read_text())
    (run / "best/model.json").write_text(json.dumps(model_info | {"epoch": 99}))
    error = message(predict, [f"run={run}", f"images={run / 'augmented.png'}", "runtime=onnx"])
    assert "/export/onnx/model.onnx was exported from an older model than the run's best; run make export" in error


def test_unreadable_weights_are_named(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    (run / "best/model.keras").write_bytes(b"PK nothing")
    done = ask(run, str(run / "augmented.png"))
    assert done.code == 2
    assert done.err.startswith(f"error: cannot load the weights in {run}/best/model.keras")


def test_file_names_of_any_bytes_stay_in_their_line(finished: Finished, tmp_path: Path):
    pixels = (finished.path / "augmented.png").read_bytes()
    for name in (b"new\nline.png", b"byte\xff.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(pixels)
    done = ask(finished.path, str(tmp_path))
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 3
    assert "new\\nline.png" in done.out


def test_missing_onnx_export_is_reported(finished: Finished):
    error = message(predict, [f"run={finished.path}", f"images={finished.path / 'augmented.png'}", "runtime=onnx"])
    assert "/export/onnx/model.onnx, which does not exist; run make export run=" in error


def test_equal_probabilities_are_ranked_by_their_class():
    assert top_classes(np.array([0.25, 0.25, 0.5]), ["a", "b", "c"], 2) == [("c", 0.5), ("a", 0.25)]


# -------------------------------------------------------------------------------------------------------------- serve


@contextmanager
def server(run: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "train.serve", f"run={run}", f"port={port}"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
        yield f"{address}/invocations"
    finally:
        process.terminate()
        process.wait(30)


def post(address: str, body: Any) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.mark.slow
def test_server_gives_the_predictions_of_predict(finished: Finished, pictures: Path):
    paths = sorted((pictures / "digits").rglob("*.png"))[:5]
    expected = lines_of(ask(finished.path, str(pictures / "digits"), "output=jsonl", "top=10"))[:5]
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    arrays = [np.asarray(Image.open(path))[..., None].tolist() for path in paths]
    with server(finished.path) as address:
        table = {"dataframe_split": {"columns": ["image"], "data": [[text] for text in encoded]}}
        for body in ({"inputs": encoded}, {"inputs": arrays}, {"inputs": {"images": arrays}}, table):
            status, text = post(address, body)
            assert status == 200, text
            for prediction, wanted in zip(json.loads(text)["predictions"], expected, strict=True):
                assert prediction["class"] == wanted["predictions"][0]["class"]
                for one in wanted["predictions"]:
                    assert prediction["probabilities"][one["class"]] == pytest.approx(one["probability"], abs=1e-5)
        large = base64.b64encode(png_of(4000, 3000)).decode()
        assert post(address, {"inputs": [large]})[0] == 200
        for body, why in (
            (b"{", "valid JSON"),
            ({"what": 1}, "exactly one of the input fields"),
            ({"inputs": []}, "got none"),
            ({"inputs": ["nonsense!"]}, "input 0 cannot be read: Only base64 data is allowed"),
            (
                {"inputs": [base64.b64encode(b"text").decode()]},
                "input 0 cannot be read: not an image in a supported format",
            ),
            ({"inputs": [[[[300]]]]}, "whole numbers in 0..255"),
            ({"inputs": [[[[0.5]]]]}, "whole numbers in 0..255"),
            ({"inputs": [[[[1, 2, 3]]]]}, "with C = 1, got shape"),
            ({"inputs": [base64.b64encode(png_of(8000, 7000)).decode()]}, "more than the limit of 50,000,000"),
        ):
            status, text = post(address, body)
            assert (status, why in text) == (400, True), text
        assert post(address, {"inputs": encoded})[0] == 200  # the server still runs


def png_of(width: int, height: int) -> bytes:
    import io

    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, "PNG")
    return data.getvalue()


def test_invalid_serve_request_is_rejected(finished: Finished, tmp_path: Path):
    assert run_command(sys.executable, "-m", "train.serve", f"run={tmp_path}").err.startswith(
        f"error: {tmp_path} is not a run folder with saved weights"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_command(sys.executable, "-m", "train.serve", f"run={finished.path}", f"port={port}")
    assert f"error: cannot listen on port {port}" in done.err


def test_array_without_image_shape_is_rejected(finished: Finished):
    served = ServedModel(finished.path)
    assert served.decode_images(np.zeros((2, 9, 7, 1), np.int64)).shape == (2, 32, 32, 1)
    assert "with C = 1, got shape [2, 3]" in message(served.decode_images, np.zeros((2, 3)))


def test_run_of_a_newer_version_is_rejected(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    identity = json.loads((run / "run.json").read_text())
    assert identity["format_version"] == RUN_FORMAT_VERSION
    (run / "run.json").write_text(json.dumps(identity | {"format_version": RUN_FORMAT_VERSION + 1}))
    expected = f"run {run} was written by a newer version (format {RUN_FORMAT_VERSION + 1}, "
    assert expected in message(predict, [f"run={run}", f"images={run / 'augmented.png'}"])
    assert expected in message(open_run_dir, run)
