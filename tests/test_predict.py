"""`make predict` and `make serve`: a run's network asked about pictures."""

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
from test_export import shipped  # noqa: F401 (a fixture)

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
    """Forty of the first test digits in several folders, and three files that are no pictures."""
    place = tmp_path_factory.mktemp("pictures")
    from train import data

    test = data.load("digits", str(ROOT / "data"), image_size=32, channels=1).test
    for index in range(40):
        path = place / "digits" / str(index % 3) / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(test.read([index])[0])
    (place / "broken").mkdir()
    (place / "broken/text.png").write_text("no picture")
    (place / "broken/short.png").write_bytes(test.read([0])[0][:60])
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(place / "broken/whole.png")
    (place / "broken/.hidden").write_text("left out")
    return place


def ask(run: Path, images: str, *words: str) -> Done:
    return run_command(sys.executable, "-m", "train.predict", f"run={run}", f"images={images}", *words)


def lines_of(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def test_it_says_what_the_evaluation_said(finished: Finished, pictures: Path):
    done = ask(finished.path, str(pictures / "digits"), "output=jsonl", "top=10")
    assert done.code == 0, done.err
    rows = (finished.path / "evaluation/test/predictions.csv").read_text().splitlines()[1:41]
    by_name = {Path(line["image"]).stem: line["predictions"] for line in lines_of(done)}
    assert len(by_name) == 40
    assert list(by_name) == sorted(by_name, key=lambda name: (int(name) % 3, name))  # folder by folder
    for number, row in enumerate(rows):
        _, _, said, confidence, _ = row.split(",")
        best, *others = by_name[f"{number:02}"]
        assert best["class"] == said
        assert best["probability"] == pytest.approx(float(confidence), abs=2e-6)
        assert sum(one["probability"] for one in (best, *others)) == pytest.approx(1, abs=1e-5)


def test_what_is_broken_is_named_and_stops_nothing(finished: Finished, pictures: Path):
    done = ask(finished.path, f"{pictures / 'broken'},{pictures / 'digits/0/00.png'}", "top=2")
    assert done.code == 1
    errors = done.err.strip().splitlines()
    assert [re.sub(r"^error: .*/", "", line).split(":")[0] for line in errors] == ["short.png", "text.png"]
    assert "no image of a known format" in errors[1]
    header, *rows = done.out.splitlines()
    assert header.split() == ["image", "1.", "2."]
    assert [Path(row.split()[0]).name for row in rows] == ["whole.png", "00.png"]
    assert all(re.fullmatch(r"\S+ +\d [01]\.\d{4}  \d [01]\.\d{4}", row) for row in rows)


def test_onnx_answers_without_tensorflow(shipped: tuple[Done, Path], pictures: Path):  # noqa: F811
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
def test_attention_is_drawn_on_request(finished: Finished, pictures: Path, tmp_path: Path):
    done = ask(finished.path, str(pictures / "digits/0"), f"attention={tmp_path / 'new' / 'seen.png'}")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "new/seen.png") as image:
        assert image.width > 400


def test_folders_patterns_and_files_are_found(pictures: Path, monkeypatch: pytest.MonkeyPatch):
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
    ("words", "said"),
    [
        (["images="], "images must be files, folders or patterns, got none"),
        (["images=nothing*"], "images must be files, folders or patterns, got nothing*, where nothing is"),
        (["images=https://example.org/a.png"], "images must be on this machine, got https://example.org/a.png"),
        (["images=README.md", "run=nowhere"], "run must be the folder of a run that has weights, got nowhere"),
        (["images=README.md", "top=0"], "top must be at least 1, got 0"),
        (["images=README.md", "output=xml"], "output must be one of table, jsonl, got xml"),
        (["images=README.md", "runtime=caffe"], "runtime must be one of keras, onnx, got caffe"),
        (["images=README.md", "runtime=onnx", "attention=x.png"], "attention must go with runtime=keras"),
        (["images=README.md", "attention=folder"], "attention must be a file to draw, got folder"),
        (["images=" + ",".join(["a" * 200] * 30)], "images must be files, folders or patterns, got aaa"),
    ],
)
def test_what_can_not_be_asked(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert said in message(predict, words)


def test_an_export_of_an_older_network_does_not_answer(shipped: tuple[Done, Path], tmp_path: Path):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(shipped[1], run, symlinks=True)
    card = json.loads((run / "best/model.json").read_text())
    (run / "best/model.json").write_text(json.dumps(card | {"epoch": 99}))
    said = message(predict, [f"run={run}", f"images={run / 'augmented.png'}", "runtime=onnx"])
    assert "runtime=onnx must have the run's best network, got an older one" in said


def test_weights_that_can_not_be_read_are_named(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    (run / "best/model.keras").write_bytes(b"PK nothing")
    done = ask(run, str(run / "augmented.png"))
    assert done.code == 2
    assert done.err.startswith(f"error: run must have weights that can be read, got {run}/best/model.keras")


def test_names_of_any_bytes_stay_in_their_line(finished: Finished, tmp_path: Path):
    pixels = (finished.path / "augmented.png").read_bytes()
    for name in (b"new\nline.png", b"byte\xff.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(pixels)
    done = ask(finished.path, str(tmp_path))
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 3
    assert "new\\nline.png" in done.out


def test_onnx_that_was_not_exported(finished: Finished):
    said = message(predict, [f"run={finished.path}", f"images={finished.path / 'augmented.png'}", "runtime=onnx"])
    assert "runtime=onnx must have the exported file, got no" in said
    assert "make export run=" in said


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
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.mark.slow
def test_the_server_answers_as_predict_does(finished: Finished, pictures: Path):
    paths = sorted((pictures / "digits").rglob("*.png"))[:5]
    told = lines_of(ask(finished.path, str(pictures / "digits"), "output=jsonl", "top=10"))[:5]
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    arrays = [np.asarray(Image.open(path))[..., None].tolist() for path in paths]
    with server(finished.path) as address:
        table = {"dataframe_split": {"columns": ["image"], "data": [[text] for text in encoded]}}
        for body in ({"inputs": encoded}, {"inputs": arrays}, {"inputs": {"images": arrays}}, table):
            status, text = post(address, body)
            assert status == 200, text
            for said, wanted in zip(json.loads(text)["predictions"], told, strict=True):
                assert said["class"] == wanted["predictions"][0]["class"]
                for one in wanted["predictions"]:
                    assert said["probabilities"][one["class"]] == pytest.approx(one["probability"], abs=1e-5)
        large = base64.b64encode(png_of(4000, 3000)).decode()
        assert post(address, {"inputs": [large]})[0] == 200
        for body, why in (
            (b"{", "valid JSON"),
            ({"what": 1}, "exactly one of the input fields"),
            ({"inputs": []}, "got none"),
            ({"inputs": ["nonsense!"]}, "number 0: Only base64 data is allowed"),
            ({"inputs": [base64.b64encode(b"text").decode()]}, "number 0: no image of a known format"),
            ({"inputs": [[[[300]]]]}, "whole numbers in 0..255"),
            ({"inputs": [[[[0.5]]]]}, "whole numbers in 0..255"),
            ({"inputs": [[[[1, 2, 3]]]]}, "C = 1, got one of shape"),
            ({"inputs": [base64.b64encode(png_of(8000, 7000)).decode()]}, "more than the limit of 50,000,000"),
        ):
            status, text = post(address, body)
            assert (status, why in text) == (400, True), text
        assert post(address, {"inputs": encoded})[0] == 200  # it lives


def png_of(width: int, height: int) -> bytes:
    import io

    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, "PNG")
    return data.getvalue()


def test_what_can_not_be_served(finished: Finished, tmp_path: Path):
    assert run_command(sys.executable, "-m", "train.serve", f"run={tmp_path}").err.startswith(
        "error: run must be the folder of a run that has weights, got "
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_command(sys.executable, "-m", "train.serve", f"run={finished.path}", f"port={port}")
    assert f"error: port must be free, got {port}" in done.err


def test_arrays_that_have_other_numbers_are_refused(finished: Finished):
    served = ServedModel(finished.path)
    assert served.decode_images(np.zeros((2, 9, 7, 1), np.int64)).shape == (2, 32, 32, 1)
    assert "C = 1, got one of shape [2, 3]" in message(served.decode_images, np.zeros((2, 3)))


def test_a_run_of_a_newer_version_is_refused(finished: Finished, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run, symlinks=True)
    identity = json.loads((run / "run.json").read_text())
    assert identity["format_version"] == RUN_FORMAT_VERSION
    (run / "run.json").write_text(json.dumps(identity | {"format_version": RUN_FORMAT_VERSION + 1}))
    said = f"run {run} was written by a newer version of this project (run format {RUN_FORMAT_VERSION + 1}, "
    assert said in message(predict, [f"run={run}", f"images={run / 'augmented.png'}"])
    assert said in message(open_run_dir, run)
