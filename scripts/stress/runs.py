"""Kills real runs at random times, resumes them, and compares them with undisturbed runs.

    python scripts/stress/runs.py --kills 200 --report stress.json
    python scripts/stress/runs.py --kills 20 --forget seeds      (a control: must find differences)
    python scripts/stress/runs.py --kills 1 --forget seeds,metrics --cases float32      (several controls in turn)

Every attempt is started on the command line and ends by SIGKILL: at a random step, some milliseconds after one, or at
a stage of starting, resuming, rolling back or writing (journal, best weights, checkpoint). A few attempts end by
SIGTERM and are not counted. Between two attempts a crash of the machine is sometimes simulated: a torn last line in the
journal, a corrupt newest checkpoint. A run counts if it was killed at least once after a checkpoint and inside an
epoch. Both after each kill and in total, it may repeat no more steps than can follow the last checkpoint, so that
starting over does not pass. Compared are the hash of the weights, every tensor of the last checkpoint, every line of
the journal, the MLflow run with its metric history, the best weights and their metrics, the summary and the config;
but not times and rates.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from train.config.serialization import flatten
from train.storage.fault_injection import FAULT_VARIABLE
from train.tracking.journal import NONDETERMINISTIC, comparable
from train.tracking.run_dir import read_heartbeat
from train.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS, EPOCHS, INTERVAL = 15, 3, 6
SMALL = {"model.width": 0.1, "batch_size": 16, "steps_per_epoch": STEPS, "epochs": EPOCHS, "threads": 1}
TRACKING = {
    "checkpoint.every_steps": INTERVAL, "tracking.every_steps": 4, "tracking.log_model": "false",
    "evaluate.report": "false", "tracking.wait_seconds": 600,
}  # fmt: skip
KILLS_PER_RUN = 8
WRITING = INTERVAL  # steps that training may do while a checkpoint is written: then it waits before the next one
ATTEMPT_SECONDS = 900
AFTER_SECONDS = 60  # how long the other processes of a run may outlive the leader

CASES: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "mixed_bfloat16": {"precision": "mixed_bfloat16", "threads": 2},
    "mixed_float16": {"precision": "mixed_float16", "optimizer": "adamw"},
    "averaged weights": {"ema": 0.9},
    "accumulated gradients": {"gradient_accumulation": 4, "gradient_clip": 10},
    "dropout and augmentation": {"model": "vgg16", "model.head": "fc", "augment": "flip_crop", "optimizer": "rmsprop"},
    "early stopping": {
        "epochs": 9,
        "early_stopping.metric": "validation/loss",
        "early_stopping.patience_epochs": 2,
        "early_stopping.min_delta": 1.5,
    },
    "rollback": {  # the rising learning rate diverges in step 11, after the first checkpoint
        "model": "vgg16", "precision": "float32", "optimizer.learning_rate": 1.0, "schedule.warmup_epochs": 3,
        "on_divergence": "rollback", "rollback.learning_rate_factor": 0.2,
    },
    "inception_v1": {"model": "inception_v1"},
    "everything at once": {
        "model": "inception_v1", "ema": 0.8, "gradient_accumulation": 2, "precision": "mixed_float16",
        "augment": "flip_crop", "optimizer": "adamw", "optimizer.weight_decay": 0.05, "schedule": "exponential",
    },
    "inception_v3": {"model": "inception_v3", "batch_size": 8, "model.width": 0.05},
    "inception_resnet_v2": {"model": "inception_resnet_v2", "batch_size": 8, "model.width": 0.05},
    "two processes": {
        "model": "vgg16", "model.width": 0.05, "precision": "float32", "backend": "jax", "device": "cpu",
        "distributed.processes": 2,
    },
}  # fmt: skip
SLOW = ("inception_v3", "inception_resnet_v2", "two processes")  # once each; the others in turn

PER_RUN_KEYS = ("run_dir", "tracking.uri", "distributed.coordinator")  # these differ between equal runs
SUMMARY = (
    "status", "config_hash", "data_fingerprint", "epochs", "steps", "best_epoch", "validation", "rollbacks", "changes",
    "stopped_early", "parameters", "macs",
)  # fmt: skip
SAVING = ("begun", "written", "arrays", "manifest", "renamed", "pruned", "done")
BEST = ("model", "card", "turned")
STARTING = ("life/begun", "life/settled", "life/ground")

# Which arrays a control sets to zero in every checkpoint, by their names.
FORGET: dict[str, Callable[[str], bool]] = {
    "seeds": lambda name: "seed_generator" in name,
    "optimizer": lambda name: name.startswith("optimizer/") and "iteration" not in name,
    "metrics": lambda name: name.startswith("metrics/"),
    "statistics": lambda name: "moving_" in name,
}


@dataclass
class Trial:
    """One run with its kills."""

    case: str
    number: int
    kills: list[str] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)  # steps lost by each kill
    stops: int = 0
    forget: str | None = None  # in a control, what is set to zero in each checkpoint
    damaged: int = 0
    torn: int = 0
    counts: bool = False  # killed at least once after a checkpoint and inside an epoch
    steps: int = 0
    steps_executed: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass
class RunResult:
    """The comparable results of a run: everything that is identical in two equal runs."""

    steps: int
    steps_executed: int
    parts: dict[str, Any]


class StressTest:
    """Kills and resumes runs, and compares them with the undisturbed run of the same case."""

    def __init__(self, root: Path, seed: int):
        self.root = root
        self.seed = seed
        self._references: dict[str, RunResult] = {}
        self._locks = {case: threading.Lock() for case in CASES}

    def reference(self, case: str) -> RunResult:
        """Returns the result of the case's undisturbed run, which is run once."""
        with self._locks[case]:
            if case not in self._references:
                folder = self.root / f"{case} untouched"
                exit_code, output = self._run_attempt(case, folder, self._arguments(case, folder), None, None)
                if exit_code != 0:
                    raise RuntimeError(f"the undisturbed run of {case} failed with exit code {exit_code}\n{output}")
                self._references[case] = read_result(folder)
            return self._references[case]

    def trial(self, case: str, number: int, kills: int, forget: str | None) -> Trial:
        """Kills a run `kills` times, or until it finishes, and compares it with the reference."""
        reference = self.reference(case)
        trial = Trial(case, number, forget=forget)
        draw = random.Random(f"{self.seed}/{case}/{number}")
        folder = self.root / " ".join(filter(None, (case, str(number), forget)))
        damaged = False
        while True:
            has_started = (folder / "run.json").exists()
            use_resume = has_started and draw.random() < 0.7  # both commands resume the run
            arguments = ["-m", "train.resume", f"run={folder}"] if use_resume else self._arguments(case, folder)
            fault = stop = None
            if len(trial.kills) < kills:
                if trial.kills and saved_step(folder) < reference.steps - 1 and draw.random() < 0.1:
                    stop = min(saved_step(folder) + draw.randint(1, INTERVAL), reference.steps - 1)
                else:
                    fault = self._draw(draw, folder, reference.steps, trial)
            start = saved_step(folder, skip=damaged)
            heartbeat = read_heartbeat(folder / "heartbeat")[0]
            index = draw.randrange(processes(case)) if fault and fault.startswith("step:") else 0
            exit_code, output = self._run_attempt(case, folder, arguments, fault, stop, index)
            died_at = start + read_heartbeat(folder / "heartbeat")[0] - heartbeat
            if exit_code == 0:
                break
            if exit_code == -9 and fault:
                trial.kills.append(fault)
                inside = fault.startswith("step:") and int(fault.split(":")[1]) % STEPS != 0
                trial.counts |= inside and saved_step(folder) > 0
                damaged = self._simulate_crash(draw, folder, trial)
            elif exit_code == 143 and stop:
                trial.stops += 1
                damaged = False
            else:
                trial.differences.append(f"an attempt ended with exit code {exit_code}: {output}")
                return trial
            trial.redone.append(died_at - saved_step(folder, skip=damaged))
            max_lost = 0 if stop else (2 if damaged else 1) * INTERVAL + WRITING
            if trial.redone[-1] > max_lost + reference.steps_executed - reference.steps:  # steps of its own rollbacks
                trial.differences.append(f"{trial.redone[-1]} steps were lost by {fault or 'SIGTERM'}, see {folder}")
        self._compare(trial, reference, read_result(folder), folder)
        if not trial.differences:
            shutil.rmtree(folder)
        return trial

    def _arguments(self, case: str, folder: Path) -> list[str]:
        keys = SMALL | TRACKING | CASES[case] | {"run_dir": f"'{folder}'", "tracking.uri": f"'sqlite:///{folder}.db'"}
        return ["-m", "train", *(f"{name}={value}" for name, value in keys.items())]

    def _run_attempt(
        self, case: str, folder: Path, arguments: list[str], fault: str | None, stop: int | None, index: int = 0
    ) -> tuple[int, str]:
        """Runs one attempt. Returns its exit code and the end of its output. stop: SIGTERM at this step.

        index: the process that gets the fault and whose exit code is returned, where there are several processes; all
        others must exit too.
        """
        if processes(case) > 1:
            arguments = [*arguments, f"distributed.coordinator=127.0.0.1:{free_port()}"]
        start = time.monotonic()
        heartbeat = read_heartbeat(folder / "heartbeat")[0]
        with tempfile.TemporaryFile("w+") as output:
            process, *others = [
                subprocess.Popen(
                    [sys.executable, *arguments, *([f"distributed.index={number}"] if number else [])],
                    cwd=ROOT,
                    env={**os.environ, **({FAULT_VARIABLE: fault} if fault and number == index else {})},
                    stdout=output,
                    stderr=output,
                )
                for number in range(processes(case))
            ]
            while process.poll() is None and time.monotonic() - start < ATTEMPT_SECONDS:
                time.sleep(0.02)
                if stop and read_heartbeat(folder / "heartbeat")[0] - heartbeat >= stop - saved_step(folder):
                    process.terminate()
                    stop = None
            if process.poll() is None:
                process.kill()
                return process.wait(), f"it did not exit within {ATTEMPT_SECONDS} seconds: {folder}"
            codes = [process.returncode, *(other.wait(AFTER_SECONDS) for other in others)]
            output.seek(0)
            return codes[index], output.read()[-2000:] + str(folder)

    def _draw(self, draw: random.Random, folder: Path, steps: int, trial: Trial) -> str:
        """Draws a fault for the next attempt: at a step (not a time), or at a stage of writing."""
        last_saved = saved_step(folder)
        kind = draw.random()
        if trial.forget or (not trial.counts and kind < 0.7) or kind < 0.5:
            step = min(last_saved + draw.randint(1, 2 * INTERVAL), steps - 1)
            if not trial.counts:  # a step that makes the run count; in a control surely after a complete checkpoint
                first = INTERVAL + (WRITING if trial.forget else 3)
                step = draw.choice([s for s in range(first, 3 * INTERVAL) if s % STEPS])
            delay = f":{draw.uniform(0, 0.06):.4f}" if draw.random() < 0.5 else ""
            return f"step:{step}{delay}"
        if kind < 0.78:
            return f"save/{draw.choice(SAVING)}:1"
        if kind < 0.85:
            return f"best/{draw.choice(BEST)}:1"
        if kind < 0.93:
            return f"{draw.choice(STARTING)}:1"
        return draw.choice(["rollback:1"] if trial.case == "rollback" else ["journal:1", "journal:2", "journal:3"])

    def _simulate_crash(self, draw: random.Random, folder: Path, trial: Trial) -> bool:
        """Sometimes does the damage of a machine's crash. Returns whether a checkpoint was damaged."""
        journal = folder / "metrics.jsonl"
        saved = checkpoints(folder)
        if trial.forget:
            if saved:
                zero_arrays(saved[-1], FORGET[trial.forget])
            return False
        if journal.exists() and draw.random() < 0.25:
            with journal.open("ab") as file:
                file.write(b'{"epoch": 1, "step": 21, "time": 17')
            trial.torn += 1
        if len(saved) > 1 and draw.random() < 0.12:
            damage(saved[-1] / draw.choice([checkpoint.ARRAYS, checkpoint.MANIFEST]), draw)
            trial.damaged += 1
            return True
        return False

    def _compare(self, trial: Trial, reference: RunResult, result: RunResult, folder: Path) -> None:
        for name, part in reference.parts.items():
            if part != result.parts[name]:
                trial.differences.append(f"{name} differs, see {folder}")
        summary = json.loads((folder / "summary.json").read_text())
        trial.steps, trial.steps_executed = summary["steps"], summary["steps_executed"]
        repeated = reference.steps_executed - reference.steps  # by rollbacks
        # On a busy machine a kill may come while the checkpoint is still being written: the previous one counts.
        max_steps = reference.steps_executed + (len(trial.kills) + trial.damaged) * (INTERVAL + WRITING + repeated)
        if trial.steps_executed > max_steps:
            trial.differences.append(f"{trial.steps_executed} steps were executed, at most {max_steps} are allowed")


# --------------------------------------------------------------------------------------------------------- run folders


def processes(case: str) -> int:
    return CASES[case].get("distributed.processes", 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("epoch-*"))


def saved_step(folder: Path, *, skip: bool = False) -> int:
    """Returns the step of the newest checkpoint, or with `skip` of the one before; 0 if there is none."""
    saved = checkpoints(folder)[: -1 if skip else None]
    if not saved:
        return 0
    epoch, batch = (int(word) for word in saved[-1].name.split("-")[1:4:2])
    return epoch * STEPS + batch


def damage(path: Path, draw: random.Random) -> None:
    """Flips a random bit of a file, or truncates it."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        del data[draw.randrange(len(data)) :]
    path.write_bytes(data)


def zero_arrays(path: Path, selects: Callable[[str], bool]) -> None:
    """Sets the selected arrays of a checkpoint to zero, and updates its checksums."""
    try:
        saved = checkpoint.read_checkpoint(path)
    except checkpoint.CorruptCheckpointError:
        return
    arrays = {name: np.zeros_like(value) if selects(name) else value for name, value in saved.arrays.items()}
    shutil.rmtree(path)
    writer = checkpoint.CheckpointManager(path.parent, keep=9)
    writer.save(path.name, arrays, saved.metadata)
    writer.close()


def read_result(folder: Path) -> RunResult:
    """Reads everything that must be identical in two equal runs."""
    summary = json.loads((folder / "summary.json").read_text())
    config = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    saved = checkpoints(folder)[-1]
    return RunResult(
        summary["steps"],
        summary["steps_executed"],
        {
            "the hash of the weights": summary["weights_sha256"],
            "the last checkpoint": json.loads((saved / checkpoint.MANIFEST).read_text())["arrays_sha256"],
            "the summary": {name: summary[name] for name in SUMMARY},
            "the config": {name: value for name, value in config.items() if name not in PER_RUN_KEYS},
            "the test": summary["test"],
            "the journal": [
                (*comparable(json.loads(line)), json.loads(line).get("branch"))
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            ],
            "the best weights": weights(folder / "best/model.keras"),
            "model.json of the best weights": json.loads((folder / "best/model.json").read_text()),
            "the history in MLflow": history(f"sqlite:///{folder}.db"),
        },
    )


def weights(path: Path) -> str:
    """Returns the SHA-256 over the arrays of a stored model; the file itself contains timestamps."""
    digest = hashlib.sha256()

    def add(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            digest.update(name.encode() + node[()].tobytes())

    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(add)
    return digest.hexdigest()


def history(uri: str) -> dict[str, Any]:
    """Returns status and metric histories of the single run in a store; of times and rates only the steps."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    [run] = runs  # a resumed run stays the same MLflow run
    record: dict[str, Any] = {
        "status": run.info.status,
        "parameters": {name: value for name, value in run.data.params.items() if name not in PER_RUN_KEYS},
        "tags": {name: run.data.tags.get(name) for name in ("config_hash", "data_fingerprint", "weights_sha256")},
        "data sets": [used.dataset.digest for used in run.inputs.dataset_inputs],
    }
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        record[name] = sorted((p.step, "" if name in NONDETERMINISTIC else repr(p.value)) for p in points)
    return record


# -------------------------------------------------------------------------------------------------------------- trials


def run_all(root: Path, cases: list[str], options: argparse.Namespace) -> list[Trial]:
    """Runs all trials; with several controls, those of each in turn."""
    stress_test = StressTest(root, options.seed)
    trials = []
    previous = read_report(options.report) if options.go_on else []
    for forget in options.forget or [None]:
        done = [trial for trial in previous if trial.forget == forget]
        trials += run_until_killed(stress_test, cases, options, forget, done)
    return trials


def run_until_killed(
    stress_test: StressTest, cases: list[str], options: argparse.Namespace, forget: str | None, previous: list[Trial]
) -> list[Trial]:
    """Runs trials in parallel until `options.kills` kills have been counted."""
    trials = [trial for trial in previous if not trial.differences]
    waiting = [(trial.case, trial.number) for trial in previous if trial.differences]
    lock = threading.Lock()
    started = {case: max((trial.number for trial in previous if trial.case == case), default=0) for case in cases}

    def next_trial() -> tuple[str, int] | None:
        with lock:
            counted = sum(len(trial.kills) for trial in trials if trial.counts)
            not_started = [case for case in cases if not started[case]]
            repeatable = sorted((case for case in cases if case not in SLOW), key=lambda case: started[case])
            if waiting:
                return waiting.pop(0)
            if not not_started and (counted >= options.kills or not repeatable):
                return None
            case = (not_started or repeatable)[0]
            started[case] += 1
            return case, started[case]

    def work() -> None:
        while case_and_number := next_trial():
            trial = stress_test.trial(*case_and_number, min(KILLS_PER_RUN, options.kills), forget)
            with lock:
                trials.append(trial)
                print_trial(trial)

    with ThreadPoolExecutor(options.workers) as pool:
        for worker in [pool.submit(work) for _ in range(options.workers)]:
            worker.result()
    return trials


def split_names(text: str) -> list[str]:
    return text.split(",")


def read_report(report: Path) -> list[Trial]:
    """Returns the trials of a report."""
    return [Trial(**trial) for trial in json.loads(report.read_text())["trials"]]


def print_trial(trial: Trial) -> None:
    verdict = "identical" if not trial.differences else "DIFFERING: " + "; ".join(trial.differences)
    print(
        f"{time.strftime('%H:%M:%S')} {trial.case} {trial.number}{' without ' + trial.forget if trial.forget else ''}: "
        f"{len(trial.kills)} kills "
        f"({', '.join(trial.kills)}), {trial.steps_executed} steps for {trial.steps}: {verdict}",
        flush=True,
    )


def summarise(trials: list[Trial], seconds: float) -> dict[str, Any]:
    """Counts kills by case and in total; a kill is identical if its run is identical to the reference."""
    counted = [trial for trial in trials if trial.counts or trial.differences]

    def figures(selected: list[Trial]) -> dict[str, int]:
        identical = sum(len(trial.kills) for trial in selected if not trial.differences)
        kills = sum(len(trial.kills) for trial in selected)
        return {"runs": len(selected), "kills": kills, "identical": identical, "differing": kills - identical}

    return {
        **figures(counted),
        "not_counted": len(trials) - len(counted),
        "torn_journals": sum(trial.torn for trial in counted),
        "damaged_checkpoints": sum(trial.damaged for trial in counted),
        "sigterms": sum(trial.stops for trial in counted),
        "most_steps_lost": max((lost for trial in counted for lost in trial.redone), default=0),
        "seconds": round(seconds),
        "cases": {
            case: figures([trial for trial in counted if trial.case == case])
            for case in dict.fromkeys(trial.case for trial in counted)
        },
        "trials": [vars(trial) for trial in trials],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kills")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    names = ", ".join(FORGET)
    parser.add_argument(
        "--forget", type=split_names, help=f"controls: set these arrays to zero in every checkpoint ({names})"
    )
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    parser.add_argument("--go-on", action="store_true", help="keep the report's identical trials, repeat the others")
    options = parser.parse_args()
    if options.go_on and not (options.report and options.report.exists()):
        parser.error("--go-on needs the --report of an earlier call")
    cases = split_names(options.cases)
    if unknown := set(options.forget or ()) - set(FORGET):
        parser.error(f"--forget must be one of {names}; got {min(unknown)}")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--cases must be one of {', '.join(CASES)}; got {unknown[0]}")
    start = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="stress-"))
    trials = run_all(root, cases, options)
    previous_seconds = json.loads(options.report.read_text())["seconds"] if options.go_on else 0
    report = summarise(trials, previous_seconds + time.monotonic() - start)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    for case, row in report["cases"].items():
        print(f"{case:24} runs {row['runs']:3}  kills {row['kills']:4}  identical {row['identical']:4}  "
              f"differing {row['differing']:4}")  # fmt: skip
    print(f"kills {report['kills']} / identical {report['identical']} / differing {report['differing']}")
    if report["differing"]:
        print(f"the differing runs are kept in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
