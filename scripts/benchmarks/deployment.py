"""What comes of a network that is given away: accuracy, size and speed in every format, `make predict`, `make serve`.

    python scripts/benchmarks/deployment.py --formats --report scripts/results/export.json   (25 minutes)
    python scripts/benchmarks/deployment.py --predict --report scripts/results/predict.json   (3 minutes)
    python scripts/benchmarks/deployment.py --serve --report scripts/results/serve.json   (1 minute)

The runs that it needs are made first, short ones on digits.
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
# The least that answers: it loads the same file, reads the same picture, and says the same.
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
begun = time.perf_counter()
for _ in range(int(sys.argv[2])):
    model.predict_on_batch(images)
print(32 * int(sys.argv[2]) / (time.perf_counter() - begun))
"""


def trained(place: Path, *words: str) -> Path:
    run = place / "run"
    own = [f"run_dir={run}", f"tracking.uri=sqlite:///{place / 'mlflow.db'}"]
    command("train", *SHORT, *words, *own)
    return run


def command(module: str, *words: str) -> str:
    """What it printed on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def formats(report: Path | None) -> list[dict[str, Any]]:
    """Every network in every format, but those that the report has."""
    rows = json.loads(report.read_text()) if report and report.exists() else []
    for model in [name for name in MODELS if name not in {row["model"] for row in rows}]:
        with tempfile.TemporaryDirectory(prefix="ship-") as place:
            run = trained(Path(place), f"model={model}")
            for quantize in QUANTIZATIONS:
                words = [f"run={run}", "format=all", f"quantize={quantize}", "export.max_accuracy_drop=1"]
                print(command("train.export", *words), flush=True)
            summaries = [json.loads(path.read_text()) for path in (run / "export").glob("*/summary.json")]
            rows += [{"model": model, **summary} for summary in sorted(summaries, key=lambda one: one["time"])]
        write(report, rows)
    return rows


def write(report: Path | None, found: Any) -> None:
    if report:
        report.write_text(json.dumps(found, indent=1) + "\n")


def predict(_report: Path | None) -> dict[str, Any]:
    """The first answer beside a bare script's, taking turns, medians of five; then 2,000 pictures."""
    with tempfile.TemporaryDirectory(prefix="ship-") as place:
        run = trained(Path(place), "model=vgg16_inception")
        command("train.export", f"run={run}", "format=onnx")
        picture, folder = picture_in(Path(place)), Path(place) / "many"
        folder.mkdir()
        for number in range(2000):
            os.link(picture, folder / f"{number}.png")
        ours = [sys.executable, "-m", "train.predict", f"run={run}", f"images={picture}"]
        bare = [sys.executable, "-c", BARE, str(run / "best/model.keras"), str(picture)]
        took: dict[str, list[float]] = {"predict": [], "bare": [], "onnx": []}
        for _ in range(5):
            for name, words in (("bare", bare), ("predict", ours), ("onnx", [*ours, "runtime=onnx"])):
                took[name].append(seconds(words))
        first = {name: statistics.median(values) for name, values in took.items()}
        batches = ["-c", MANY, str(run / "best/model.keras"), "63"]
        alone = float(subprocess.check_output([sys.executable, *batches]))
        many = [*ours[:-1], f"images={folder}", "output=jsonl"]
        throughput = {name: seconds([*many, f"runtime={name}"]) for name in ("keras", "onnx")}
    return {
        "first_answer_seconds": first,
        "ratio": first["predict"] / first["bare"],
        "bare_images_per_second": alone,
        "images_per_second": {
            "keras": 1999 / (throughput["keras"] - first["predict"]),
            "onnx": 1999 / (throughput["onnx"] - first["onnx"]),
        },
    }


def seconds(words: list[str]) -> float:
    begun = time.perf_counter()
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(words, cwd=ROOT, env=quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def picture_in(place: Path) -> Path:
    import numpy as np
    from PIL import Image

    path = place / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return path


def serve(_report: Path | None) -> dict[str, Any]:
    """Eight clients for half a minute, each with one picture a request."""
    with tempfile.TemporaryDirectory(prefix="ship-") as place:
        run = trained(Path(place), "model=vgg16_inception")
        body = json.dumps({"inputs": [base64.b64encode(picture_in(Path(place)).read_bytes()).decode()]}).encode()
        with served(run) as address:
            post(address, body)
            taken: list[float] = []
            wrong: list[str] = []
            until = time.monotonic() + SECONDS
            clients = [
                threading.Thread(target=client, args=(address, body, until, taken, wrong)) for _ in range(CLIENTS)
            ]
            for one in clients:
                one.start()
            for one in clients:
                one.join()
    edges = statistics.quantiles(taken, n=100)
    return {
        "clients": CLIENTS, "seconds": SECONDS, "requests": len(taken), "errors": len(wrong),
        "p50_ms": 1000 * edges[49], "p99_ms": 1000 * edges[98],
    }  # fmt: skip


def client(address: str, body: bytes, until: float, taken: list[float], wrong: list[str]) -> None:
    while time.monotonic() < until:
        begun = time.perf_counter()
        try:
            post(address, body)
        except (OSError, urllib.error.HTTPError) as fault:
            wrong.append(str(fault))
        taken.append(time.perf_counter() - begun)


def post(address: str, body: bytes) -> bytes:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@contextmanager
def served(run: Path) -> Iterator[str]:
    """`make serve`; where it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "train.serve", f"run={run}", f"port={port}"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    parser.add_argument("--report", type=Path, help="where the figures are written, as JSON")
    options = parser.parse_args()
    found = options.part(options.report)
    print(json.dumps(found, indent=1))
    write(options.report, found)


if __name__ == "__main__":
    main()
