"""Throughput and memory of the input pipeline, compared with bare decoding, Keras layers and PyTorch's DataLoader.

    python scripts/benchmarks/data_loading.py --report data.json   (about 25 minutes)
    python scripts/benchmarks/data_loading.py --torch PYTHON   (an interpreter with PyTorch and Pillow)
    python scripts/benchmarks/data_loading.py --images FOLDER   (also your own images: FOLDER/class/*)
    python scripts/benchmarks/data_loading.py --memory --report memory.json   (peak memory, 1,000 to 1,000,000 examples)
    python scripts/benchmarks/data_loading.py --odd FOLDER --report odd.json   (how malformed images are handled)

The images are generated: photo-like JPEGs of 320x240 and 1024x768. Every measurement runs in its own process with the
same number of threads; all contestants alternate, and the table has the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FALL = 1.6  # exponent by which the amplitude falls with the spatial frequency
SIDE, BATCH, CLASSES = 224, 32, 4
SETS = {"320x240": (320, 240, 4096), "1024x768": (1024, 768, 384), "32x32": (32, 32, 20_000)}
SIZES = (1_000, 10_000, 100_000, 1_000_000)
CACHED_BATCH = 256


WHOLE_EPOCH = {"first_batch": 0, "shard": (0, 1), "balanced": False, "class_weights": False}


def config_defaults(group: str, name: str) -> dict[str, Any]:
    """The config's defaults of one option of a group, as arguments of its builder."""
    from train.config import schema

    return schema.options(schema.GROUPS[group][name]())


def load_dataset(name: str, data_dir: Path, **chosen: Any) -> Any:
    """Opens a data set; what is not chosen is as in the config."""
    from train import data

    options = config_defaults("data", name) | chosen
    for key in ("directory", "fingerprint", "cache", "ram_budget", "balanced", "class_weights"):
        del options[key]
    return data.load(name, str(data_dir), **options)


# ------------------------------------------------------------------------------------------------------- contestants


def bare(folder: Path, threads: int) -> Callable[[], Iterable]:
    """Only reads and decodes the files."""
    import tensorflow as tf

    paths = sorted(str(path) for path in folder.glob("*/*"))

    def epoch() -> Any:
        stream = tf.data.Dataset.from_tensor_slices(paths)
        stream = stream.map(lambda path: tf.io.decode_jpeg(tf.io.read_file(path), channels=3), threads)
        return limit_threads(stream, threads).prefetch(2 * BATCH)

    return epoch


def ours(folder: Path, threads: int, name: str, **chosen: Any) -> Callable[[], Iterable]:
    """This project's training batches. chosen: parameters of the augmentation, besides `side` and `batch`."""
    from train.data import pipeline, pixel_cache
    from train.data.augmentation import policy

    side, batch = chosen.pop("side", SIDE), chosen.pop("batch", BATCH)
    augmentation = policy.build(name, **(config_defaults("augment", name) | chosen))
    dataset = load_dataset("folder", folder.parent / "data", image_size=side, root=str(folder), on_leak="warn")
    dataset, _ = pixel_cache.choose_cache(dataset, "auto", 1.0, crops=augmentation.random_resized_crop is not None)
    epochs = iter(range(1000))

    def epoch() -> Any:
        return pipeline.train_batches(
            dataset.train,
            batch_size=batch,
            seed=0,
            epoch=next(epochs),
            augmentation=augmentation,
            num_classes=CLASSES,
            threads=threads,
            **WHOLE_EPOCH,
        )

    return epoch


def keras_layers(folder: Path, threads: int) -> Callable[[], Iterable]:
    """The pipeline of Keras's tutorial: image_dataset_from_directory and random layers."""
    import keras
    import tensorflow as tf

    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomRotation(0.1),
        keras.layers.RandomZoom(0.2),
    ]

    def augment(images: Any, labels: Any) -> Any:
        for layer in layers:
            images = layer(images, training=True)
        return images, labels

    stream = keras.utils.image_dataset_from_directory(
        folder, image_size=(SIDE, SIDE), batch_size=BATCH, seed=0, verbose=False
    )
    return lambda: limit_threads(stream.map(augment, tf.data.AUTOTUNE), threads).prefetch(2)


def torch_loader(folder: Path, threads: int) -> Callable[[], Iterable]:
    """PyTorch's DataLoader with random resized crop and flip by Pillow, one process per thread."""
    import torch  # type: ignore[import-not-found]
    from PIL import Image

    class Files(torch.utils.data.Dataset):  # type: ignore[misc]
        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*/*"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            image, draw = Image.open(self.paths[index]).convert("RGB"), torch.rand(5).tolist()
            area = image.width * image.height * (0.08 + 0.92 * draw[0])
            stretch = (3 / 4) * (16 / 9) ** draw[1]
            width = min(image.width, round((area * stretch) ** 0.5))
            height = min(image.height, round((area / stretch) ** 0.5))
            left, top = int(draw[2] * (image.width - width + 1)), int(draw[3] * (image.height - height + 1))
            box = (left, top, left + width, top + height)
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
            if draw[4] < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), 0

    loader = torch.utils.data.DataLoader(
        Files(), BATCH, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
    )
    return lambda: loader


def limit_threads(stream: Any, threads: int) -> Any:
    """Applies the same thread limits as in our own pipeline."""
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return stream.with_options(options)


Contestant = Callable[[Path, int], Callable[[], Iterable]]
CROP, COLOR = "crop 224, flip", "crop 224, flip, colours"
PHOTOS = ("320x240", "1024x768", "own")
CONTESTANTS: dict[str, tuple[Contestant, tuple[str, ...]]] = {
    "bare decoding": (bare, PHOTOS),
    CROP: (lambda folder, threads: ours(folder, threads, "inception", color=0.0), PHOTOS),
    COLOR: (lambda folder, threads: ours(folder, threads, "inception"), PHOTOS),
    "Keras: flip, rotation, zoom": (keras_layers, PHOTOS),
    "PyTorch DataLoader: crop 224, flip": (torch_loader, PHOTOS),
    "in memory, 32 px: flip, padded crop": (
        lambda folder, threads: ours(folder, threads, "flip_crop", side=32, batch=CACHED_BATCH),
        ("32x32",),
    ),
}
TORCH = "PyTorch DataLoader: crop 224, flip"
TARGETED = "320x240"
TARGETS = (
    (CROP, "bare decoding", 0.70),
    (COLOR, "bare decoding", 0.50),
    (CROP, "Keras: flip, rotation, zoom", 5.0),
    (CROP, TORCH, 1.8),
)


def measure(name: str, folder: Path, threads: int, seconds: float) -> dict[str, float]:
    """Measures one contestant in this process: images per second after a first epoch, and peak memory in bytes."""
    epoch = CONTESTANTS[name][0](folder, threads)
    count(epoch())
    images = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += count(epoch())
    return {"images_per_second": images / (time.perf_counter() - start), "peak_bytes": peak_bytes()}


def count(epoch: Iterable) -> int:
    """Returns the number of images in an epoch; an element with three dimensions is a single image."""
    images = 0
    for element in epoch:
        first = element[0] if isinstance(element, tuple | list) else element
        images += len(first) if first.ndim == 4 else 1
    return images


def peak_bytes() -> int:
    """Returns the peak resident memory of this process and its child processes."""
    return sum(map(_peak_of, [os.getpid(), *_children()]))


def _children() -> list[int]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids]


def _peak_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --------------------------------------------------------------------------------------------------------------- images


def make_images(folder: Path, width: int, height: int, number: int) -> None:
    """Writes photo-like JPEGs of quality 90: noise with the spectrum of photographs, and some flat shapes.

    They take 2.4 bits per pixel at 320x240 and 1.4 at 1024x768. Real photographs resized to these sizes took 1.3 to 2.7
    and 0.7 to 2.0, most of them near the upper end.
    """
    from PIL import Image, ImageDraw

    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class {label}").mkdir(parents=True)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** FALL
    for index in range(number):
        shape = (3, *fall.shape)
        waves = (generator.normal(size=shape) + 1j * generator.normal(size=shape)) * fall
        light = np.fft.irfft2(waves, (height, width)).transpose(1, 2, 0)
        light = light.mean(axis=2, keepdims=True) + 0.3 * light
        pixels = np.clip(128 + 55 * light / light.std(), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y = generator.integers(0, width), generator.integers(0, height)
            box = (x, y, x + generator.integers(4, width // 3), y + generator.integers(4, height // 3))
            draw.ellipse(box, fill=tuple(int(v) for v in generator.integers(0, 256, 3)))
        image.save(folder / f"class {index % CLASSES}" / f"{index:06d}.jpg", quality=90)


# ---------------------------------------------------------------------------------------------------------- comparison


def run_child(arguments: list[str], python: str = sys.executable) -> dict[str, float]:
    """Runs this script in its own process and returns the figures it prints."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all contestants alternately, several times; returns a row for each one and each set of images."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as root:
        for images in (*SETS, "own") if arguments.images else SETS:
            folder = Path(root) / images
            names = [name for name, (_, sets) in CONTESTANTS.items() if images in sets]
            names = [name for name in names if name != TORCH or arguments.torch]
            if not any(arguments.only in name for name in names):
                continue
            if images == "own":
                folder.symlink_to(arguments.images.resolve())
            else:
                make_images(folder, *SETS[images])
            by_name: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name in names:
                    options = ["--one", name, "--folder", str(folder), "--threads", str(arguments.threads)]
                    python = arguments.torch if name == TORCH else sys.executable
                    by_name[name].append(run_child([*options, "--seconds", str(arguments.seconds)], python))
            label = arguments.images.name if images == "own" else images
            rows += [row_of(label, name, results) for name, results in by_name.items()]
            print_rows(rows[-len(names) :])
    return rows


def row_of(images: str, name: str, results: list[dict[str, float]]) -> dict[str, Any]:
    rates = [result["images_per_second"] for result in results]
    return {
        "images": images,
        "name": name,
        "images_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "peak_bytes": statistics.median(result["peak_bytes"] for result in results),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        spread = f"{row['least']:,.0f} to {row['most']:,.0f}"
        print(
            f"{row['images']:>9}  {row['name']:<36} {row['images_per_second']:>9,.0f} images/s ({spread})  "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            flush=True,
        )
    rates = {row["name"]: row["images_per_second"] for row in rows}
    for name, other, target in TARGETS:
        if rows[0]["images"] == TARGETED and {name, other} <= set(rates):
            print(f"{'':>11}{name} / {other}: {rates[name] / rates[other]:.2f} (target: {target})", flush=True)


# -------------------------------------------------------------------------------------------------------------- memory


def make_records(folder: Path, number: int) -> None:
    """Prepares a TFDS data set of `number` small, distinct images, in the folder where `digits` is looked up."""
    import tensorflow_datasets as tfds

    from train.data.digits.digits_dataset_builder import Builder

    builder = Builder(data_dir=str(folder), file_format="tfrecord")
    generator = np.random.default_rng(0)

    def examples() -> Iterable[tuple[int, dict[str, Any]]]:
        for index in range(number):
            pixels = generator.integers(0, 256, (8, 8, 1), np.uint8)
            pixels[0, :4, 0] = np.frombuffer(np.uint32(index).tobytes(), np.uint8)
            yield index, {"image": pixels, "label": index % 10}

    builder._generate_examples = examples
    builder._split_generators = lambda *_: {"train": examples()}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))


def open_and_read(folder: Path) -> dict[str, float]:
    """Opens the data set and reads 200 batches. The second call counts, since the first one indexes all images."""
    from train.data import pipeline, pixel_cache
    from train.data.augmentation import policy

    dataset = load_dataset("digits", folder, image_size=32, channels=1)
    dataset, _ = pixel_cache.choose_cache(dataset, "none", 0.0, crops=False)
    stream = pipeline.train_batches(
        dataset.train,
        batch_size=BATCH,
        seed=0,
        epoch=0,
        augmentation=policy.build("flip_crop", **config_defaults("augment", "flip_crop")),
        num_classes=10,
        **WHOLE_EPOCH,
    )
    for _ in stream.take(200 if len(dataset.train) > 200 * BATCH else 20):
        pass
    return {"peak_bytes": peak_bytes()}


def memory(sizes: Iterable[int]) -> list[dict[str, Any]]:
    """Measures peak memory by number of examples."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bench-data-") as root:
            run_child(["--make-records", str(size), "--folder", root])
            first_peak = run_child(["--read-records", "--folder", root])["peak_bytes"]
            later_peaks = [run_child(["--read-records", "--folder", root])["peak_bytes"] for _ in range(3)]
        peak = statistics.median(later_peaks)
        rows.append({"examples": size, "peak_bytes": peak, "first_peak_bytes": first_peak})
        print(f"{size:>9,} examples: {peak / 2**20:,.0f} MiB, first run {first_peak / 2**20:,.0f} MiB", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------ malformed files


def odd(folder: Path) -> list[dict[str, Any]]:
    """Inspects every file that the folder's `index.json` lists; counts results by the format that Pillow detects."""
    from train.data.ingestion.validation import Limits, inspect

    defaults = config_defaults("data", "folder")
    limits = Limits(**{name: defaults[name] for name in ("max_bytes", "max_pixels", "on_error", "max_skipped")})
    kinds: dict[str, Counter] = {}
    for entry in json.loads((folder / "index.json").read_text()):
        info = inspect((folder / entry["file"]).read_bytes(), 0, limits)
        kind = kinds.setdefault(entry.get("format", "no format"), Counter())
        kind.update(["files", "named" if info.problem else "decoded"])
        print(f"{entry['file']}: {info.problem or f'{info.format} {info.width}x{info.height}'}")
    order = sorted(kinds, key=lambda kind: -kinds[kind]["files"])
    return [{"kind": kind, **{name: kinds[kind][name] for name in ("files", "decoded", "named")}} for kind in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="measure only the image sets with a contestant of this name")
    parser.add_argument("--images", type=Path, help="a folder of your own images, measured as well")
    parser.add_argument("--torch", help="an interpreter with PyTorch and Pillow")
    parser.add_argument("--memory", action="store_true", help="measure memory by number of examples instead")
    parser.add_argument("--odd", type=Path, help="inspect the files listed in this folder's index.json instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of examples for --memory")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    for name in ("--one", "--folder", "--make-records"):  # only for the child processes
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--read-records", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, Path(arguments.folder), arguments.threads, arguments.seconds)))
    elif arguments.make_records:
        make_records(Path(arguments.folder), int(arguments.make_records))
        print("{}")
    elif arguments.read_records:
        print(json.dumps(open_and_read(Path(arguments.folder))))
    else:
        if arguments.odd:
            rows = odd(arguments.odd)
        else:
            rows = memory(arguments.sizes) if arguments.memory else compare(arguments)
        if arguments.report:
            arguments.report.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
