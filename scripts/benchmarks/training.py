"""Training throughput of `make train` compared with Keras's `fit`, PyTorch and Keras on JAX, on the same networks.

    python scripts/benchmarks/training.py --report scripts/results/speed.json
    python scripts/benchmarks/training.py --torch PYTHON --jax PYTHON   (interpreters with these libraries)
    python scripts/benchmarks/training.py --models vgg16_inception --rounds 1
    python scripts/benchmarks/training.py --settings   (writes train/runtime/auto_settings.json)
    python scripts/benchmarks/training.py --guard   (compares one ratio with the stored results)
    python scripts/benchmarks/training.py --guard --against before.json   (with those of --report before.json)

Every measurement runs in its own process; the contestants alternate, and the medians over the rounds are compared, with
their range. Ours is `make train` with everything on: tracking, checkpoints, validation, exact input stream; the
baselines get random images in memory. Before the timing every baseline asserts that it has the same network: the same
number of parameters, and the same logits for the same weights. Baselines that are not installed are named and skipped.
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
    """A network, its input, and the steps per epoch: ours runs three epochs, a baseline two."""

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
class TaskContext:
    """Paths and interpreters for measuring a task. network_dir: the exported network, for the baselines."""

    task: Task
    network_dir: Path
    root: Path
    interpreters: dict[str, str]


Contestant = Callable[[TaskContext], dict[str, Any]]


def ours(*settings: str) -> Contestant:
    """Measures `make train` with these overrides; returns the steady-state figures of its summary."""

    def measure(context: TaskContext) -> dict[str, Any]:
        folder = trained(context, "epochs=3", *settings)
        summary = json.loads((folder / "summary.json").read_text())
        return {
            "precision": yaml.safe_load((folder / "config.yaml").read_text())["precision"],
            "images_per_second": summary["train_images_per_second"],
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "data_wait_fraction": summary["data_wait_fraction"],
        }

    return measure


def our_start(context: TaskContext) -> dict[str, Any]:
    """Measures the time from the command until the first step is in the journal."""
    start = time.time()
    folder = trained(context, "epochs=1", "tracking.every_steps=1")
    with (folder / "metrics.jsonl").open() as journal:
        first = next(line for line in map(json.loads, journal) if "train/loss" in line["values"])
    return {"first_step_seconds": first["time"] - start}


def trained(context: TaskContext, *settings: str) -> Path:
    """Trains a run of this task and returns its folder."""
    task = context.task
    folder = Path(tempfile.mkdtemp(dir=context.root))
    overrides = [
        f"model={task.model}", *task.data, f"batch_size={task.batch}", f"steps_per_epoch={task.steps}",
        *settings, *QUIET, f"run_dir={folder}", f"tracking.uri=sqlite:///{context.root / 'mlflow.db'}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "train", *overrides], timeout=LIMIT, **QUIETLY)
    return folder


def baseline(
    name: str, script: str, precision: str, arguments: Callable[[Task], list[str]], **environment: str
) -> Contestant:
    """Measures a program under baselines/, which prints one line of JSON."""

    def measure(context: TaskContext) -> dict[str, Any]:
        command = [
            context.interpreters[name],
            str(BASELINES / script),
            str(context.network_dir),
            *arguments(context.task),
        ]
        start = {"BENCH_BEGUN": str(time.time())}
        done = subprocess.run(command, **QUIETLY | {"env": {**os.environ, **environment, **start}})
        return {"precision": precision, **json.loads(done.stdout.splitlines()[-1])}

    return measure


def keras(backend: str, precision: str, *start: str) -> Contestant:
    """Measures Keras's `fit`. start: the word "start", to measure the time to the first step."""

    def arguments(task: Task) -> list[str]:
        return [task.model, str(task.batch), precision, "2" if start else str(2 * task.steps), *start]

    name = "jax" if backend == "jax" else "keras"
    return baseline(name, "keras_fit.py", precision, arguments, KERAS_BACKEND=backend)


def torch(precision: str, mode: str) -> Contestant:
    return baseline(
        "torch", "torch_steps.py", precision,
        lambda task: [str(task.batch), precision.removeprefix("mixed_"), mode, str(2 * task.steps)],
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
STARTS: dict[str, Contestant] = {  # from starting the command to the end of the first step, same network and batch
    "make train": our_start,
    "Keras fit": keras("tensorflow", BFLOAT16, "start"),
}
SAME = "Keras fit, same precision"
RATIOS = {  # ours is divided by the best of each list, round by round
    "Keras fit, float32": ["Keras fit, float32"],
    SAME: ["Keras fit, float32", "Keras fit, mixed_bfloat16"],
    "PyTorch eager, its best": ["PyTorch eager, float32", "PyTorch eager, bfloat16"],
    "PyTorch, its best": [name for name in CONTESTANTS if name.startswith("PyTorch")],
    "Keras on JAX, its best": [name for name in CONTESTANTS if name.startswith("Keras on JAX")],
}
GUARDED = ("vgg16_inception", "Keras fit, float32")
SLACK = 0.9  # share of the stored ratio that is tolerated as noise
LIMIT = 600  # seconds for one run of ours
QUIETLY: dict[str, Any] = {"cwd": ROOT, "check": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}


# ---------------------------------------------------------------------------------------------------- measurements


def rounds_of(context: TaskContext, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measures every contestant once per round, in an order that reverses from round to round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            measured = CONTESTANTS[name](context)
            results[name].append(measured)
            print(f"{context.task.model:16} {name:28} {measured['images_per_second']:8.1f} images/s", flush=True)
    return results


def starts_of(context: TaskContext, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, contestant in STARTS.items():
            seconds[name].append(contestant(context)["first_step_seconds"])
            print(f"{context.task.model:16} {name:28} {seconds[name][-1]:8.1f} s to the first step", flush=True)
    return seconds


def measure(task: Task, context: TaskContext, names: list[str], rounds: int, rate: dict[str, float]) -> dict[str, Any]:
    """Returns medians, ranges and ratios of one network."""
    macs = json.loads((context.network_dir / "network.json").read_text())["macs"]
    results = rounds_of(context, names, rounds)
    return {
        "model": task.model,
        "side": task.side,
        "batch": task.batch,
        "rows": [row(name, measured, task, macs, rate) for name, measured in results.items()],
        "ratios": ratios(results),
    }


def row(name: str, measured: list[dict[str, Any]], task: Task, macs: int, rate: dict[str, float]) -> dict[str, Any]:
    """Returns one contestant's row. A step costs about three forward passes: one, and two for the gradients."""
    speeds = [figures["images_per_second"] for figures in measured]
    peak_rate = rate.get(measured[0]["precision"].removeprefix("mixed_"))
    return {
        "name": name,
        "precision": measured[0]["precision"],
        "images_per_second": spread(speeds),
        "step_seconds": task.batch / statistics.median(speeds),
        "peak_memory_bytes": statistics.median(figures["peak_memory_bytes"] for figures in measured),
        "share_of_rate": 3 * macs * statistics.median(speeds) / peak_rate if peak_rate else None,
        "data_wait_fraction": measured[0].get("data_wait_fraction"),
    }


def ratios(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Returns ours over the best of each list of baselines, round by round; lists without any result are left out."""
    by_name = {}
    for name, others in RATIOS.items():
        measured = [results[other] for other in others if other in results]
        if name == SAME:
            measured = [other for other in measured if other[0]["precision"] == results["make train"][0]["precision"]]
        if measured:
            rounds = zip(results["make train"], *measured, strict=True)
            speeds = [[figures["images_per_second"] for figures in one_round] for one_round in rounds]
            by_name[name] = spread([ours / max(theirs) for ours, *theirs in speeds])
    return by_name


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


# ------------------------------------------------------------------------------------------------------ auto settings

PLAIN = (FLOAT32, "off", 1.0)  # the reference for the speed-up
# Without XLA, which is not reproducible here and therefore has to be requested.
CANDIDATES = [PLAIN, (BFLOAT16, "off", 1.0), (BFLOAT16, "off", 0.5)]
GPU_CANDIDATES = [("mixed_float16", "off", 1.0)]  # very slow on processors
NETWORKS = ("vgg16", "vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")


def settings(root: Path, models: list[str], rounds: int) -> None:
    """Measures precisions and thread counts on this kind of device, and writes train/runtime/auto_settings.json."""
    from train.config.schema import MIN_IMAGE_SIZE
    from train.runtime import setup

    here = machine()
    kind, tasks = here["capability"], {task.model: task for task in GPU_TASKS if here["gpu"]}
    for model in models:
        side = MIN_IMAGE_SIZE[model]
        task = tasks.get(model, Task(model, side, 1, 64, 9, ("data=digits", f"data.image_size={side}")))
        speeds: dict[tuple, list[float]] = {}
        for _ in range(rounds):
            for candidate in CANDIDATES + (GPU_CANDIDATES if here["gpu"] else []):
                speeds.setdefault(candidate, []).append(
                    speed_of(candidate, TaskContext(task, root, root, {}), here["cores"])
                )
                print(f"{model:20} {candidate!s:34} {speeds[candidate][-1]:8.1f} images/s", flush=True)
        medians = {candidate: statistics.median(values) for candidate, values in speeds.items()}
        best = max(medians, key=lambda candidate: medians[candidate])
        row = dict(zip(("precision", "jit", "cores"), best, strict=True))
        times = medians[best] / medians[PLAIN]
        hardware = f"{here['processor']}, {here['cores']} cores"
        row["why"] = f"measured {times:.2f}x faster than float32 without XLA on {hardware}"
        table = json.loads(setup.AUTO_SETTINGS.read_text()) if setup.AUTO_SETTINGS.exists() else {}
        table.setdefault(kind, {})[model] = row
        setup.AUTO_SETTINGS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def speed_of(candidate: tuple[str, str, float], context: TaskContext, cores: int) -> float:
    """Returns images per second."""
    precision, jit, share = candidate
    overrides = [f"precision={precision}", f"jit={jit}", f"threads={max(1, round(share * cores))}"]
    return ours(*overrides)(context)["images_per_second"]


# ----------------------------------------------------------------------------------------------------------- baselines


def interpreters(torch: str | None, jax: str | None) -> dict[str, str]:
    """Returns the interpreters that have the library of each baseline; prints which are missing."""
    requested = {"keras": ("keras", sys.executable), "torch": ("torch", torch), "jax": ("jax", jax)}
    available = {}
    for name, (module, interpreter) in requested.items():
        python = interpreter or sys.executable
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0:
            available[name] = python
        else:
            print(f"skipped: {name} is not installed for {python}; use --{name} PYTHON", flush=True)
    return available


def installed_contestants(names: list[str], available: dict[str, str]) -> list[str]:
    """Returns the contestants whose library is installed."""
    needs = {"PyTorch": "torch", "Keras on": "jax"}
    return [
        name
        for name in names
        if all(library in available for prefix, library in needs.items() if name.startswith(prefix))
    ]


def machine() -> dict[str, Any]:
    from train.runtime import setup

    gpu = Path("/proc/driver/nvidia/version").exists()
    return {
        "processor": setup.processor_name("tensorflow", "cpu"), "cores": setup.cores(), "gpu": gpu,
        "capability": setup.device_capability("tensorflow", "gpu" if gpu else "cpu"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- report


def table(results: dict[str, Any]) -> str:
    lines = []
    for network in results["networks"]:
        lines.append(f"\n{network['model']} at {network['side']} px, batch {network['batch']}")
        for row in network["rows"]:
            speed = row["images_per_second"]
            share = row["share_of_rate"]
            waited = row["data_wait_fraction"]
            lines.append(
                f"  {row['name']:28} {speed['median']:7.1f} images/s ({speed['least']:.1f} to {speed['most']:.1f})  "
                f"{row['step_seconds'] * 1000:6.0f} ms/step  {row['peak_memory_bytes'] / 2**20:6,.0f} MiB"
                + (f"  {share:.0%} of the matrix rate" if share else "")
                + (f"  {waited:.1%} waiting for data" if waited is not None else "")
            )
        for name, ratio in (network["ratios"] | network.get("starts", {})).items():
            lines.append(f"  / {name:26} {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})")
    return "\n".join(lines)


def check_comparable(here: dict[str, Any], figures: Path) -> None:
    """Raises: ValueError if the stored results are of another kind of device, whose ratios say nothing about this."""
    there = json.loads(figures.read_text())["machine"]["capability"]
    if there != here["capability"]:
        only = f'--models {GUARDED[0]} --only "{GUARDED[1]}" --report before.json'
        raise ValueError(
            f"{figures} was measured on {there}, this is {here['capability']}; measure the earlier commit here with "
            f"{only}, and use --guard --against before.json"
        )


def guard(results: dict[str, Any], figures: Path) -> int:
    """Returns 1 if the guarded ratio is lower than the stored one by more than the noise, else 0."""
    model, name = GUARDED
    stored = json.loads(figures.read_text())
    [before] = [network["ratios"][name]["median"] for network in stored["networks"] if network["model"] == model]
    [now] = [network["ratios"][name]["median"] for network in results["networks"] if network["model"] == model]
    passed = now >= SLACK * before
    print(f"{model} / {name}: {now:.2f}, stored {before:.2f}: {'passed' if passed else f'below {SLACK:g} of it'}")
    return int(not passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="networks, separated by commas")
    parser.add_argument("--only", default="", help="prefix of the contestants to measure besides ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", help="an interpreter with PyTorch and NumPy")
    parser.add_argument("--jax", help="an interpreter with JAX, Keras and this project's requirements")
    parser.add_argument("--settings", action="store_true", help="measure the `auto` settings for this kind of device")
    parser.add_argument("--guard", action="store_true", help="compare one ratio with the stored results")
    parser.add_argument("--against", type=Path, default=FIGURES, help="the results that --guard compares with")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.settings:
        with tempfile.TemporaryDirectory(prefix="bench-") as root:
            settings(Path(root), options.models.split(",") if options.models else list(NETWORKS), options.rounds)
        return 0
    results: dict[str, Any] = {"machine": machine(), "networks": []}
    tasks = GPU_TASKS if results["machine"]["gpu"] else CPU_TASKS
    if options.guard:
        try:
            check_comparable(results["machine"], options.against)
        except ValueError as error:
            parser.error(str(error))
    names = [name for name in CONTESTANTS if name == "make train" or name.startswith(options.only)]
    if options.guard:
        tasks, names = [task for task in tasks if task.model == GUARDED[0]], ["make train", GUARDED[1]]
    if options.models:
        tasks = [task for task in tasks if task.model in options.models.split(",")]
    if not tasks:
        parser.error(f"--models must name some of vgg16, vgg16_inception, inception_v3, got {options.models}")
    available = {"keras": sys.executable} if options.guard else interpreters(options.torch, options.jax)
    rate = json.loads(subprocess.run([sys.executable, str(BASELINES / "flops.py")], **QUIETLY).stdout)
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        for task in tasks:
            context = TaskContext(task, Path(root) / task.model, Path(root), available)
            arguments = [task.model, str(task.side), str(task.channels), str(context.network_dir)]
            subprocess.run([sys.executable, str(BASELINES / "export_network.py"), *arguments], **QUIETLY)
            network = measure(task, context, installed_contestants(names, available), options.rounds, rate)
            if not options.guard and not options.only:
                starts = starts_of(context, options.rounds)
                network["start_seconds"] = {name: spread(seconds) for name, seconds in starts.items()}
                pairs = zip(starts["make train"], starts["Keras fit"], strict=True)
                network["starts"] = {"Keras fit, first step": spread([ours / theirs for ours, theirs in pairs])}
            results["networks"].append(network)
            if options.report:
                options.report.write_text(json.dumps(results | {"rate": rate}, indent=1) + "\n")
    print(table(results))
    return guard(results, options.against) if options.guard else 0


if __name__ == "__main__":
    sys.exit(main())
