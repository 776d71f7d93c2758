"""Measures deployment: accuracy, size and speed of every export format, `make predict` and `make serve`.

    python scripts/benchmarks/deployment.py --formats --report scripts/results/export.json   (25 minutes)
    python scripts/benchmarks/deployment.py --predict --report scripts/results/predict.json   (3 minutes)
    python scripts/benchmarks/deployment.py --serve --report scripts/results/serve.json   (1 minute)

Each starts with the short runs on digits that it needs.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vgg16", "vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")
QUANTIZATIONS = ("none", "float16", "int8")
SHORT = ["epochs=4", "evaluate.report=false", "tracking.log_model=false", "tracking.wait_seconds=300"]
CLIENTS, SECONDS = 8, 30
# The minimal script: it loads the same file, reads the same image and prints the same class.
BARE = """
import sys, keras, numpy
from PIL import Image
model = keras.models.load_model(sys.argv[1])
side = model.input_shape[1]
image = numpy.atleast_3d(numpy.asarray(Image.open(sys.argv[2]).convert("L").resize((side, side))))
print(keras.ops.softmax(model(image[None])).numpy()[0].argmax())
"""
MANY = """
import sys, time, keras, numpy
model = keras.models.load_model(sys.argv[1])
images = numpy.zeros((32, *model.input_shape[1:]), "uint8")
model.predict_on_batch(images)
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    model.predict_on_batch(images)
print(32 * int(sys.argv[2]) / (time.perf_counter() - start))
"""


def train(root: Path, *overrides: str) -> Path:
    run = root / "run"
    command("train", *SHORT, *overrides, f"run_dir={run}", f"tracking.uri=sqlite:///{root / 'mlflow.db'}")
    return run


def command(module: str, *arguments: str) -> str:
    """Runs a module and returns its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def formats(report: Path | None) -> list[dict[str, Any]]:
    """Exports every network in every format, except networks that the report has."""
    rows = json.loads(report.read_text()) if report and report.exists() else []
    for model in [name for name in MODELS if name not in {row["model"] for row in rows}]:
        with tempfile.TemporaryDirectory(prefix="deployment-") as root:
            run = train(Path(root), f"model={model}")
            for quantize in QUANTIZATIONS:
                overrides = [f"run={run}", "format=all", f"quantize={quantize}", "export.max_accuracy_drop=1"]
                print(command("train.export", *overrides), flush=True)
            summaries = [json.loads(path.read_text()) for path in (run / "export").glob("*/summary.json")]
            rows += [{"model": model, **summary} for summary in sorted(summaries, key=lambda summary: summary["time"])]
        write(report, rows)
    return rows


def write(report: Path | None, results: Any) -> None:
    if report:
        report.write_text(json.dumps(results, indent=1) + "\n")


def predict(_report: Path | None) -> dict[str, Any]:
    """Times the first answer of `make predict` against a minimal script (medians of five), and 2,000 images."""
    with tempfile.TemporaryDirectory(prefix="deployment-") as root:
        run = train(Path(root), "model=vgg16_inception")
        command("train.export", f"run={run}", "format=onnx")
        image = write_image(Path(root))
        folder = Path(root) / "many"
        folder.mkdir()
        for number in range(2000):
            os.link(image, folder / f"{number}.png")
        ours = [sys.executable, "-m", "train.predict", f"run={run}", f"images={image}"]
        bare = [sys.executable, "-c", BARE, str(run / "best/model.keras"), str(image)]
        durations: dict[str, list[float]] = {"predict": [], "bare": [], "onnx": []}
        for _ in range(5):
            for name, arguments in (("bare", bare), ("predict", ours), ("onnx", [*ours, "runtime=onnx"])):
                durations[name].append(seconds(arguments))
        first = {name: statistics.median(values) for name, values in durations.items()}
        batches = ["-c", MANY, str(run / "best/model.keras"), "63"]
        bare_rate = float(subprocess.check_output([sys.executable, *batches]))
        many = [*ours[:-1], f"images={folder}", "output=jsonl"]
        many_seconds = {name: seconds([*many, f"runtime={name}"]) for name in ("keras", "onnx")}
    return {
        "first_answer_seconds": first,
        "ratio": first["predict"] / first["bare"],
        "bare_images_per_second": bare_rate,
        "images_per_second": {
            "keras": 1999 / (many_seconds["keras"] - first["predict"]),
            "onnx": 1999 / (many_seconds["onnx"] - first["onnx"]),
        },
    }


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(command, cwd=ROOT, env=quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def write_image(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    path = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return path


def serve(_report: Path | None) -> dict[str, Any]:
    """Loads `make serve` with eight clients for half a minute, one image per request."""
    with tempfile.TemporaryDirectory(prefix="deployment-") as root:
        run = train(Path(root), "model=vgg16_inception")
        body = json.dumps({"inputs": [base64.b64encode(write_image(Path(root)).read_bytes()).decode()]}).encode()
        with server(run) as url:
            post(url, body)
            latencies: list[float] = []
            errors: list[str] = []
            deadline = time.monotonic() + SECONDS
            clients = [
                threading.Thread(target=client, args=(url, body, deadline, latencies, errors)) for _ in range(CLIENTS)
            ]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
    percentiles = statistics.quantiles(latencies, n=100)
    return {
        "clients": CLIENTS, "seconds": SECONDS, "requests": len(latencies), "errors": len(errors),
        "p50_ms": 1000 * percentiles[49], "p99_ms": 1000 * percentiles[98],
    }  # fmt: skip


def client(url: str, body: bytes, deadline: float, latencies: list[float], errors: list[str]) -> None:
    while time.monotonic() < deadline:
        start = time.perf_counter()
        try:
            post(url, body)
        except (OSError, urllib.error.HTTPError) as error:
            errors.append(str(error))
        latencies.append(time.perf_counter() - start)


def post(url: str, body: bytes) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


@contextmanager
def server(run: Path) -> Iterator[str]:
    """Runs `make serve`; yields the URL of its invocations."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-m", "train.serve", f"run={run}", f"port={port}"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    for part in (formats, predict, serve):
        which.add_argument(f"--{part.__name__}", dest="part", action="store_const", const=part, help=part.__doc__)
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    results = options.part(options.report)
    print(json.dumps(results, indent=1))
    write(options.report, results)


if __name__ == "__main__":
    main()
