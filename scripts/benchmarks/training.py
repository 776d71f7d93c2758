"""How fast training is: ours as people run it, Keras's `fit`, PyTorch, Keras on JAX; the same networks, side by side.

    python scripts/benchmarks/training.py --report scripts/results/speed.json
    python scripts/benchmarks/training.py --torch PYTHON --jax PYTHON   (interpreters that have them)
    python scripts/benchmarks/training.py --models vgg16_inception --rounds 1
    python scripts/benchmarks/training.py --settings   (makes train/runtime/auto_settings.json)
    python scripts/benchmarks/training.py --guard   (one ratio, against the kept figures)

Every measurement is a process of its own; they take turns, round by round, and medians are compared, with the range of
the rounds beside them. Ours is `make train` with everything on: tracking, checkpoints, validation, exact stream; the
others get random images in memory. Before anything is timed every peer asserts that it has the same network: as many
parameters, and for the same values the same logits. A peer that is not installed is named and left out.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ROOT / "scripts" / "benchmarks" / "baselines"
FIGURES = ROOT / "scripts" / "results" / "speed.json"
FLOAT32, BFLOAT16 = "float32", "mixed_bfloat16"
QUIET = [
    "evaluate.test=false",
    "evaluate.report=false",
    "tracking.log_model=false",
    "tracking.wait_seconds=0",
    "checkpoint.keep=1",
]


@dataclass(frozen=True)
class Task:
    """A network, how it is fed, and how long: steps of a peer, three epochs of as many in ours."""

    model: str
    side: int
    channels: int
    batch: int
    steps: int
    data: tuple[str, ...]


CPU_TASKS = [
    Task("vgg16", 32, 1, 64, 19, ("data=digits",)),
    Task("vgg16_inception", 32, 1, 64, 19, ("data=digits",)),
    Task("inception_v3", 75, 1, 64, 19, ("data=digits", "data.image_size=75")),
]
GPU_TASKS = [
    Task("vgg16", 224, 1, 128, 9, ("data=digits", "data.image_size=224")),
    Task("inception_v3", 299, 1, 128, 9, ("data=digits", "data.image_size=299")),
]


@dataclass(frozen=True)
class Place:
    """Where a round of a task is measured. given: the network as the peers get it."""

    task: Task
    given: Path
    root: Path
    interpreters: dict[str, str]


Contestant = Callable[[Place], dict[str, Any]]


def ours(*settings: str) -> Contestant:
    """`make train` as it is typed, with these words; its steady state as it reports it itself."""

    def measure(place: Place) -> dict[str, Any]:
        folder = trained(place, "epochs=3", *settings)
        summary = json.loads((folder / "summary.json").read_text())
        return {
            "precision": yaml.safe_load((folder / "config.yaml").read_text())["precision"],
            "images_per_second": summary["train_images_per_second"],
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "data_wait_fraction": summary["data_wait_fraction"],
        }

    return measure


def our_start(place: Place) -> dict[str, Any]:
    """Until the first step is in the journal."""
    begun = time.time()
    folder = trained(place, "epochs=1", "tracking.every_steps=1")
    with (folder / "metrics.jsonl").open() as journal:
        first = next(line for line in map(json.loads, journal) if "train/loss" in line["values"])
    return {"first_step_seconds": first["time"] - begun}


def trained(place: Place, *settings: str) -> Path:
    """The folder of a run of this task."""
    task, folder = place.task, Path(tempfile.mkdtemp(dir=place.root))
    words = [
        f"model={task.model}", *task.data, f"batch_size={task.batch}", f"steps_per_epoch={task.steps}",
        *settings, *QUIET, f"run_dir={folder}", f"tracking.uri=sqlite:///{place.root / 'mlflow.db'}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "train", *words], timeout=LIMIT, **QUIETLY)
    return folder


def peer(
    name: str, script: str, precision: str, arguments: Callable[[Task], list[str]], **environment: str
) -> Contestant:
    """A program that prints one line of JSON."""

    def measure(place: Place) -> dict[str, Any]:
        command = [place.interpreters[name], str(BASELINES / script), str(place.given), *arguments(place.task)]
        begun = {"BENCH_BEGUN": str(time.time())}
        done = subprocess.run(command, **QUIETLY | {"env": {**os.environ, **environment, **begun}})
        return {"precision": precision, **json.loads(done.stdout.splitlines()[-1])}

    return measure


def keras(backend: str, precision: str, *start: str) -> Contestant:
    """`start`: that word, for the time to the first step."""

    def arguments(task: Task) -> list[str]:
        return [task.model, str(task.batch), precision, "2" if start else str(2 * task.steps), *start]

    name = "jax" if backend == "jax" else "keras"
    return peer(name, "keras_fit.py", precision, arguments, KERAS_BACKEND=backend)


def torch(precision: str, way: str) -> Contestant:
    return peer(
        "torch", "torch_steps.py", precision,
        lambda task: [str(task.batch), precision.removeprefix("mixed_"), way, str(2 * task.steps)],
    )  # fmt: skip


CONTESTANTS: dict[str, Contestant] = {
    "make train": ours(),
    "make train, float32": ours(f"precision={FLOAT32}"),
    "Keras fit, float32": keras("tensorflow", FLOAT32),
    "Keras fit, mixed_bfloat16": keras("tensorflow", BFLOAT16),
    "PyTorch eager, float32": torch(FLOAT32, "eager"),
    "PyTorch eager, bfloat16": torch(BFLOAT16, "eager"),
    "PyTorch compiled, float32": torch(FLOAT32, "compiled"),
    "PyTorch compiled, bfloat16": torch(BFLOAT16, "compiled"),
    "Keras on JAX, float32": keras("jax", FLOAT32),
    "Keras on JAX, mixed_bfloat16": keras("jax", BFLOAT16),
}
STARTS: dict[str, Contestant] = {  # from typing the command to the end of the first step, of the same network and batch
    "make train": our_start,
    "Keras fit": keras("tensorflow", BFLOAT16, "start"),
}
SAME = "Keras fit, same precision"
RATIOS = {  # what is compared with what: the best of the second list, round by round
    "Keras fit, float32": ["Keras fit, float32"],
    SAME: ["Keras fit, float32", "Keras fit, mixed_bfloat16"],
    "PyTorch eager, its best": ["PyTorch eager, float32", "PyTorch eager, bfloat16"],
    "PyTorch, its best": [name for name in CONTESTANTS if name.startswith("PyTorch")],
    "Keras on JAX, its best": [name for name in CONTESTANTS if name.startswith("Keras on JAX")],
}
GUARDED = ("vgg16_inception", "Keras fit, float32")
SLACK = 0.9  # of the kept ratio, for noise
LIMIT = 600  # seconds, of one run of ours
QUIETLY: dict[str, Any] = {"cwd": ROOT, "check": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}


# ---------------------------------------------------------------------------------------------------- measurements


def rounds_of(place: Place, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every contestant once per round, in an order that turns around from round to round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            measured = CONTESTANTS[name](place)
            found[name].append(measured)
            print(f"{place.task.model:16} {name:28} {measured['images_per_second']:8.1f} images/s", flush=True)
    return found


def starts_of(place: Place, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, contestant in STARTS.items():
            found[name].append(contestant(place)["first_step_seconds"])
            print(f"{place.task.model:16} {name:28} {found[name][-1]:8.1f} s to the first step", flush=True)
    return found


def measure(task: Task, place: Place, names: list[str], rounds: int, rate: dict[str, float]) -> dict[str, Any]:
    """Medians, ranges and ratios of one network."""
    macs = json.loads((place.given / "network.json").read_text())["macs"]
    found = rounds_of(place, names, rounds)
    return {
        "model": task.model,
        "side": task.side,
        "batch": task.batch,
        "rows": [row(name, measured, task, macs, rate) for name, measured in found.items()],
        "ratios": ratios(found),
    }


def row(name: str, measured: list[dict[str, Any]], task: Task, macs: int, rate: dict[str, float]) -> dict[str, Any]:
    """What one contestant did. An update takes the forward pass and about two more, for the gradients."""
    speeds = [one["images_per_second"] for one in measured]
    best = rate.get(measured[0]["precision"].removeprefix("mixed_"))
    return {
        "name": name,
        "precision": measured[0]["precision"],
        "images_per_second": spread(speeds),
        "step_seconds": task.batch / statistics.median(speeds),
        "peak_memory_bytes": statistics.median(one["peak_memory_bytes"] for one in measured),
        "share_of_rate": 3 * macs * statistics.median(speeds) / best if best else None,
        "data_wait_fraction": measured[0].get("data_wait_fraction"),
    }


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Ours over the best of each list of others, round by round; a list of which nobody was there is left out."""
    told = {}
    for name, others in RATIOS.items():
        there = [found[other] for other in others if other in found]
        if name == SAME:
            there = [other for other in there if other[0]["precision"] == found["make train"][0]["precision"]]
        if there:
            rounds = zip(found["make train"], *there, strict=True)
            speeds = [[one["images_per_second"] for one in together] for together in rounds]
            told[name] = spread([own / max(theirs) for own, *theirs in speeds])
    return told


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


# --------------------------------------------------------------------------------------------------- what `auto` means

PLAIN = (FLOAT32, "off", 1.0)  # what the others are compared with
# Without XLA: there it can't give the same bits twice, so that it is for those who ask for it.
CANDIDATES = [PLAIN, (BFLOAT16, "off", 1.0), (BFLOAT16, "off", 0.5)]
GPU_CANDIDATES = [("mixed_float16", "off", 1.0)]  # very slow on processors
NETWORKS = ("vgg16", "vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")


def settings(root: Path, models: list[str], rounds: int) -> None:
    """Measures precision, XLA and threads for this kind of device, and writes train/runtime/auto_settings.json."""
    from train.config.schema import MIN_IMAGE_SIZE
    from train.runtime import setup

    here = machine()
    device = "gpu" if here["gpu"] else "cpu"
    kind, tasks = setup.device_capability("tensorflow", device), {task.model: task for task in GPU_TASKS if here["gpu"]}
    for model in models:
        side = MIN_IMAGE_SIZE[model]
        task = tasks.get(model, Task(model, side, 1, 64, 9, ("data=digits", f"data.image_size={side}")))
        speeds: dict[tuple, list[float]] = {}
        for _ in range(rounds):
            for candidate in CANDIDATES + (GPU_CANDIDATES if here["gpu"] else []):
                speeds.setdefault(candidate, []).append(speed_of(candidate, Place(task, root, root, {}), here["cores"]))
                print(f"{model:20} {candidate!s:34} {speeds[candidate][-1]:8.1f} images/s", flush=True)
        medians = {candidate: statistics.median(found) for candidate, found in speeds.items()}
        best = max(medians, key=lambda candidate: medians[candidate])
        row = dict(zip(("precision", "jit", "cores"), best, strict=True))
        times = medians[best] / medians[PLAIN]
        row["why"] = f"{times:.2f} times as fast as float32 without XLA on {here['processor']}, {here['cores']} cores"
        table = json.loads(setup.AUTO_SETTINGS.read_text()) if setup.AUTO_SETTINGS.exists() else {}
        table.setdefault(kind, {})[model] = row
        setup.AUTO_SETTINGS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def speed_of(candidate: tuple[str, str, float], place: Place, cores: int) -> float:
    """Images per second."""
    precision, jit, share = candidate
    words = [f"precision={precision}", f"jit={jit}", f"threads={max(1, round(share * cores))}"]
    return ours(*words)(place)["images_per_second"]


# ------------------------------------------------------------------------------------------------------------ peers


def interpreters(torch: str | None, jax: str | None) -> dict[str, str]:
    """By peer, those that are there; what is missing is said."""
    wanted = {"keras": ("keras", sys.executable), "torch": ("torch", torch), "jax": ("jax", jax)}
    found = {}
    for name, (module, interpreter) in wanted.items():
        python = interpreter or sys.executable
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0:
            found[name] = python
        else:
            print(f"left out: {name} is not installed for {python}; use --{name} PYTHON", flush=True)
    return found


def there(names: list[str], found: dict[str, str]) -> list[str]:
    """The contestants whose peer is installed."""
    needs = {"PyTorch": "torch", "Keras on": "jax"}
    return [name for name in names if all(peer in found for start, peer in needs.items() if name.startswith(start))]


def machine() -> dict[str, Any]:
    from train.runtime import setup

    gpu = Path("/proc/driver/nvidia/version").exists()
    return {"processor": setup.processor_name("tensorflow", "cpu"), "cores": setup.cores(), "gpu": gpu}


# ------------------------------------------------------------------------------------------------------------- told


def table(found: dict[str, Any]) -> str:
    lines = []
    for network in found["networks"]:
        lines.append(f"\n{network['model']} at {network['side']} px, batch {network['batch']}")
        for row in network["rows"]:
            speed = row["images_per_second"]
            share, waited = row["share_of_rate"], row["data_wait_fraction"]
            lines.append(
                f"  {row['name']:28} {speed['median']:7.1f} images/s ({speed['least']:.1f} to {speed['most']:.1f})  "
                f"{row['step_seconds'] * 1000:6.0f} ms/step  {row['peak_memory_bytes'] / 2**20:6,.0f} MiB"
                + (f"  {share:.0%} of the matrix rate" if share else "")
                + (f"  {waited:.1%} waiting for data" if waited is not None else "")
            )
        for name, ratio in (network["ratios"] | network.get("starts", {})).items():
            lines.append(f"  / {name:26} {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
    return "\n".join(lines)


def guard(found: dict[str, Any]) -> int:
    """Whether the guarded ratio is still what it was, within the noise."""
    model, name = GUARDED
    kept = json.loads(FIGURES.read_text())
    [before] = [network["ratios"][name]["median"] for network in kept["networks"] if network["model"] == model]
    [now] = [network["ratios"][name]["median"] for network in found["networks"] if network["model"] == model]
    fine = now >= SLACK * before
    print(f"{model} / {name}: {now:.2f}, kept {before:.2f}: {'fine' if fine else f'below {SLACK:g} of it'}")
    return int(not fine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="of the networks, separated by commas")
    parser.add_argument("--only", default="", help="contestants whose name starts so, and ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", help="an interpreter that has PyTorch and NumPy")
    parser.add_argument("--jax", help="an interpreter that has JAX, Keras and what this project needs")
    parser.add_argument("--settings", action="store_true", help="measure what `auto` is to mean on such a machine")
    parser.add_argument("--guard", action="store_true", help="compare one ratio with the kept figures")
    parser.add_argument("--report", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    if options.settings:
        with tempfile.TemporaryDirectory(prefix="bench-") as root:
            settings(Path(root), options.models.split(",") if options.models else list(NETWORKS), options.rounds)
        return 0
    found: dict[str, Any] = {"machine": machine(), "networks": []}
    tasks = GPU_TASKS if found["machine"]["gpu"] else CPU_TASKS
    if options.guard and found["machine"]["gpu"]:
        parser.error("--guard compares with figures of a processor, got a machine with a GPU; use --report and compare")
    names = [name for name in CONTESTANTS if name == "make train" or name.startswith(options.only)]
    if options.guard:
        tasks, names = [task for task in tasks if task.model == GUARDED[0]], ["make train", GUARDED[1]]
    if options.models:
        tasks = [task for task in tasks if task.model in options.models.split(",")]
    if not tasks:
        parser.error(f"--models must name some of vgg16, vgg16_inception, inception_v3, got {options.models}")
    peers = {"keras": sys.executable} if options.guard else interpreters(options.torch, options.jax)
    rate = json.loads(subprocess.run([sys.executable, str(BASELINES / "flops.py")], **QUIETLY).stdout)
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        for task in tasks:
            place = Place(task, Path(root) / task.model, Path(root), peers)
            given = [task.model, str(task.side), str(task.channels), str(place.given)]
            subprocess.run([sys.executable, str(BASELINES / "export_network.py"), *given], **QUIETLY)
            network = measure(task, place, there(names, peers), options.rounds, rate)
            if not options.guard and not options.only:
                starts = starts_of(place, options.rounds)
                network["start_seconds"] = {name: spread(seconds) for name, seconds in starts.items()}
                pairs = zip(starts["make train"], starts["Keras fit"], strict=True)
                network["starts"] = {"Keras fit, first step": spread([own / other for own, other in pairs])}
            found["networks"].append(network)
            if options.report:
                options.report.write_text(json.dumps(found | {"rate": rate}, indent=1) + "\n")
    print(table(found))
    return guard(found) if options.guard else 0


if __name__ == "__main__":
    sys.exit(main())
