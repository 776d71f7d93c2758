"""Kills real runs at drawn instants, lets them go on, and compares them with runs that nobody touched.

    python scripts/stress/runs.py --kills 200 --report torture.json
    python scripts/stress/runs.py --kills 20 --forget seeds      (a control: has to find differences)
    python scripts/stress/runs.py --kills 1 --forget seeds,metrics --cases float32      (several, one after the other)

Every life is started through the command line and ends by SIGKILL: at a drawn step, some milliseconds after one, or at
a stage of starting, going on, rolling back or writing (journal, best weights, checkpoint). Some lives end by SIGTERM in
between, which are not counted. Between two lives the machine is sometimes made to look as if it had gone down, too: a
torn last line in the journal, a damaged newest checkpoint. A run counts if it was killed at least once after a
checkpoint and inside an epoch. It must do no more steps again than there can be since the last checkpoint that was
written, after no single death and in all, so that starting over can't pass. What is compared: the hash of the
weights, every tensor of the last checkpoint, every line of the journal, the MLflow run with its metric history, the
best weights and what was measured on them, the summary, the config. Times and rates are not.
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
KEPT = {
    "checkpoint.every_steps": INTERVAL, "tracking.every_steps": 4, "tracking.log_model": "false",
    "evaluate.report": "false", "tracking.wait_seconds": 600,
}  # fmt: skip
KILLS_PER_RUN = 8
WRITING = INTERVAL  # steps that training may do while a checkpoint is being written: then it waits for the next one
LIFE_SECONDS = 900
AFTER_SECONDS = 60  # how long the processes of a run may outlive the one that leads

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
    "rollback": {  # the rising rate is too much in step 11, after the first checkpoint
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

OWN = ("run_dir", "tracking.uri", "distributed.coordinator")  # a run's own, which no other has
SUMMARY = (
    "status", "config_hash", "data_fingerprint", "epochs", "steps", "best_epoch", "validation", "rollbacks", "changes",
    "stopped_early",     "parameters", "macs",
)  # fmt: skip
SAVING = ("begun", "written", "arrays", "manifest", "renamed", "pruned", "done")
BEST = ("model", "card", "turned")
STARTING = ("life/begun", "life/settled", "life/ground")

# What a control takes out of every checkpoint, by the names of its arrays.
FORGET: dict[str, Callable[[str], bool]] = {
    "seeds": lambda name: "seed_generator" in name,
    "optimizer": lambda name: name.startswith("optimizer/") and "iteration" not in name,
    "metrics": lambda name: name.startswith("metrics/"),
    "statistics": lambda name: "moving_" in name,
}


@dataclass
class Trial:
    """One run with its lives."""

    case: str
    number: int
    kills: list[str] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)  # steps that were lost by each death
    stops: int = 0
    forget: str | None = None  # what each of its checkpoints loses, in a control
    damaged: int = 0
    torn: int = 0
    counts: bool = False  # killed at least once after a checkpoint and inside an epoch
    steps: int = 0
    steps_executed: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass
class Ended:
    """What a run left: all that two equal runs have in common."""

    steps: int
    steps_executed: int
    parts: dict[str, Any]


class Torturer:
    """Draws, kills, compares."""

    def __init__(self, place: Path, seed: int):
        self.place, self.seed = place, seed
        self._references: dict[str, Ended] = {}
        self._locks = {case: threading.Lock() for case in CASES}

    def reference(self, case: str) -> Ended:
        """The run that nobody touches, once per case."""
        with self._locks[case]:
            if case not in self._references:
                folder = self.place / f"{case} untouched"
                code, tail = self._live(case, folder, self._words(case, folder), None, None)
                if code != 0:
                    raise RuntimeError(f"the untouched run of {case} ended with {code}\n{tail}")
                self._references[case] = ended(folder)
            return self._references[case]

    def trial(self, case: str, number: int, kills: int, forget: str | None) -> Trial:
        """A run that dies `kills` times, if it does not come to its end before."""
        untouched = self.reference(case)
        trial = Trial(case, number, forget=forget)
        draw = random.Random(f"{self.seed}/{case}/{number}")
        folder = self.place / " ".join(filter(None, (case, str(number), forget)))
        damaged = False
        while True:
            begun = (folder / "run.json").exists()
            again = begun and draw.random() < 0.7  # both commands go on
            words = ["-m", "train.resume", f"run={folder}"] if again else self._words(case, folder)
            fault = stop = None
            if len(trial.kills) < kills:
                if trial.kills and saved_step(folder) < untouched.steps - 1 and draw.random() < 0.1:
                    stop = min(saved_step(folder) + draw.randint(1, INTERVAL), untouched.steps - 1)
                else:
                    fault = self._draw(draw, folder, untouched.steps, trial)
            start, before = saved_step(folder, skip=damaged), read_heartbeat(folder / "heartbeat")[0]
            index = draw.randrange(processes(case)) if fault and fault.startswith("step:") else 0
            code, tail = self._live(case, folder, words, fault, stop, index)
            died_at = start + read_heartbeat(folder / "heartbeat")[0] - before
            if code == 0:
                break
            if code == -9 and fault:
                trial.kills.append(fault)
                inside = fault.startswith("step:") and int(fault.split(":")[1]) % STEPS != 0
                trial.counts |= inside and saved_step(folder) > 0
                damaged = self._make_worse(draw, folder, trial)
            elif code == 143 and stop:
                trial.stops += 1
                damaged = False
            else:
                trial.differences.append(f"a life ended with {code}: {tail}")
                return trial
            trial.redone.append(died_at - saved_step(folder, skip=damaged))
            most = 0 if stop else (2 if damaged else 1) * INTERVAL + WRITING
            if trial.redone[-1] > most + untouched.steps_executed - untouched.steps:  # what it rolls back itself
                trial.differences.append(f"{trial.redone[-1]} steps are lost after {fault or 'SIGTERM'}, see {folder}")
        self._compare(trial, untouched, ended(folder), folder)
        if not trial.differences:
            shutil.rmtree(folder)
        return trial

    def _words(self, case: str, folder: Path) -> list[str]:
        keys = SMALL | KEPT | CASES[case] | {"run_dir": f"'{folder}'", "tracking.uri": f"'sqlite:///{folder}.db'"}
        return ["-m", "train", *(f"{name}={value}" for name, value in keys.items())]

    def _live(
        self, case: str, folder: Path, words: list[str], fault: str | None, stop: int | None, index: int = 0
    ) -> tuple[int, str]:
        """One life; how it ended and its last words. `stop`: so many steps later it gets a SIGTERM.

        index: of the process that has the fault, where there are several; if that is not the one that leads, that it
        was killed is how the life ended, and the others have to end, too.
        """
        if processes(case) > 1:
            words = [*words, f"distributed.coordinator=127.0.0.1:{free_port()}"]
        begun, before = time.monotonic(), read_heartbeat(folder / "heartbeat")[0]
        with tempfile.TemporaryFile("w+") as told:
            process, *others = [
                subprocess.Popen(
                    [sys.executable, *words, *([f"distributed.index={number}"] if number else [])],
                    cwd=ROOT,
                    env={**os.environ, **({FAULT_VARIABLE: fault} if fault and number == index else {})},
                    stdout=told,
                    stderr=told,
                )
                for number in range(processes(case))
            ]
            while process.poll() is None and time.monotonic() - begun < LIFE_SECONDS:
                time.sleep(0.02)
                if stop and read_heartbeat(folder / "heartbeat")[0] - before >= stop - saved_step(folder):
                    process.terminate()
                    stop = None
            if process.poll() is None:
                process.kill()
                return process.wait(), f"it did not end within {LIFE_SECONDS} seconds: {folder}"
            codes = [process.returncode, *(other.wait(AFTER_SECONDS) for other in others)]
            told.seek(0)
            return codes[index], told.read()[-2000:] + str(folder)

    def _draw(self, draw: random.Random, folder: Path, steps: int, trial: Trial) -> str:
        """A fault for the next life: over steps rather than over time, or at a stage of writing."""
        at = saved_step(folder)
        kind = draw.random()
        if trial.forget or (not trial.counts and kind < 0.7) or kind < 0.5:
            step = min(at + draw.randint(1, 2 * INTERVAL), steps - 1)
            if not trial.counts:  # one that makes the run count; in a control surely, after a written checkpoint
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

    def _make_worse(self, draw: random.Random, folder: Path, trial: Trial) -> bool:
        """What the death of a machine, rather than of a process, may do besides; whether a checkpoint is damaged."""
        journal, saved = folder / "metrics.jsonl", checkpoints(folder)
        if trial.forget:
            if saved:
                forget(saved[-1], FORGET[trial.forget])
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

    def _compare(self, trial: Trial, untouched: Ended, found: Ended, folder: Path) -> None:
        for name, part in untouched.parts.items():
            if part != found.parts[name]:
                trial.differences.append(f"{name} differs, see {folder}")
        summary = json.loads((folder / "summary.json").read_text())
        trial.steps, trial.steps_executed = summary["steps"], summary["steps_executed"]
        again = untouched.steps_executed - untouched.steps  # by rollbacks
        # On a busy machine a death may come while the checkpoint is still being written: the one before it counts.
        most = untouched.steps_executed + (len(trial.kills) + trial.damaged) * (INTERVAL + WRITING + again)
        if trial.steps_executed > most:
            trial.differences.append(f"{trial.steps_executed} steps were executed, at most {most} are allowed")


# ---------------------------------------------------------------------------------------------- what lies in a folder


def processes(case: str) -> int:
    return CASES[case].get("distributed.processes", 1)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("epoch-*"))


def saved_step(folder: Path, *, skip: bool = False) -> int:
    """The step of the newest checkpoint, or with `skip` of the one before; 0 if there is none."""
    saved = checkpoints(folder)[: -1 if skip else None]
    if not saved:
        return 0
    epoch, batch = (int(word) for word in saved[-1].name.split("-")[1:4:2])
    return epoch * STEPS + batch


def damage(path: Path, draw: random.Random) -> None:
    """Flips a bit, or cuts the end off."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(content)


def forget(path: Path, chosen: Callable[[str], bool]) -> None:
    """Sets the chosen arrays of a checkpoint to nought, and signs it again."""
    try:
        saved = checkpoint.read_checkpoint(path)
    except checkpoint.CorruptCheckpointError:
        return
    arrays = {name: np.zeros_like(value) if chosen(name) else value for name, value in saved.arrays.items()}
    shutil.rmtree(path)
    writer = checkpoint.CheckpointManager(path.parent, keep=9)
    writer.save(path.name, arrays, saved.metadata)
    writer.close()


def ended(folder: Path) -> Ended:
    """Everything that has to be the same in two equal runs."""
    summary = json.loads((folder / "summary.json").read_text())
    config, saved = flatten(yaml.safe_load((folder / "config.yaml").read_text())), checkpoints(folder)[-1]
    return Ended(
        summary["steps"],
        summary["steps_executed"],
        {
            "the hash of the weights": summary["weights_sha256"],
            "the last checkpoint": json.loads((saved / checkpoint.MANIFEST).read_text())["arrays_sha256"],
            "the summary": {name: summary[name] for name in SUMMARY},
            "the config": {name: value for name, value in config.items() if name not in OWN},
            "the test": summary["test"],
            "the journal": [
                (*comparable(json.loads(line)), json.loads(line).get("branch"))
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            ],
            "the best weights": weights(folder / "best/model.keras"),
            "the card of the best weights": json.loads((folder / "best/model.json").read_text()),
            "the history in MLflow": history(f"sqlite:///{folder}.db"),
        },
    )


def weights(path: Path) -> str:
    """SHA-256 over the arrays of a stored model; the file itself holds times."""
    digest = hashlib.sha256()

    def add(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            digest.update(name.encode() + node[()].tobytes())

    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(add)
    return digest.hexdigest()


def history(uri: str) -> dict[str, Any]:
    """Status and metrics of the one run in a store: steps and values, of times and rates the steps alone."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    [run] = runs  # a run that goes on stays the same run
    found: dict[str, Any] = {
        "status": run.info.status,
        "parameters": {name: value for name, value in run.data.params.items() if name not in OWN},
        "tags": {name: run.data.tags.get(name) for name in ("config_hash", "data_fingerprint", "weights_sha256")},
        "data sets": [used.dataset.digest for used in run.inputs.dataset_inputs],
    }
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        found[name] = sorted((p.step, "" if name in NONDETERMINISTIC else repr(p.value)) for p in points)
    return found


# ---------------------------------------------------------------------------------------------------------- the whole


def torture(place: Path, cases: list[str], options: argparse.Namespace) -> list[Trial]:
    """The trials; with controls those of each, one after the other."""
    torturer, trials = Torturer(place, options.seed), []
    before = earlier(options.report) if options.go_on else []
    for forget in options.forget or [None]:
        done = [trial for trial in before if trial.forget == forget]
        trials += until_killed(torturer, cases, options, forget, done)
    return trials


def until_killed(
    torturer: Torturer, cases: list[str], options: argparse.Namespace, forget: str | None, before: list[Trial]
) -> list[Trial]:
    """Trials, some at a time, until so many kills have been counted."""
    trials = [trial for trial in before if not trial.differences]
    waiting = [(trial.case, trial.number) for trial in before if trial.differences]
    turn = threading.Lock()
    begun = {case: max((trial.number for trial in before if trial.case == case), default=0) for case in cases}

    def next_one() -> tuple[str, int] | None:
        with turn:
            counted = sum(len(trial.kills) for trial in trials if trial.counts)
            fresh = [case for case in cases if not begun[case]]
            again = sorted((case for case in cases if case not in SLOW), key=lambda case: begun[case])
            if waiting:
                return waiting.pop(0)
            if not fresh and (counted >= options.kills or not again):
                return None
            case = (fresh or again)[0]
            begun[case] += 1
            return case, begun[case]

    def work() -> None:
        while chosen := next_one():
            trial = torturer.trial(*chosen, min(KILLS_PER_RUN, options.kills), forget)
            with turn:
                trials.append(trial)
                tell(trial)

    with ThreadPoolExecutor(options.workers) as pool:
        for worker in [pool.submit(work) for _ in range(options.workers)]:
            worker.result()
    return trials


def listed(words: str) -> list[str]:
    return words.split(",")


def earlier(report: Path) -> list[Trial]:
    """The trials of a report."""
    return [Trial(**trial) for trial in json.loads(report.read_text())["trials"]]


def tell(trial: Trial) -> None:
    verdict = "identical" if not trial.differences else "DIFFERING: " + "; ".join(trial.differences)
    print(
        f"{time.strftime('%H:%M:%S')} {trial.case} {trial.number}{' without ' + trial.forget if trial.forget else ''}: "
        f"{len(trial.kills)} kills "
        f"({', '.join(trial.kills)}), {trial.steps_executed} steps for {trial.steps}: {verdict}",
        flush=True,
    )


def summarise(trials: list[Trial], seconds: float) -> dict[str, Any]:
    """Kills by case and in all; a kill is identical if what became of its run is."""
    counted = [trial for trial in trials if trial.counts or trial.differences]

    def figures(some: list[Trial]) -> dict[str, int]:
        identical = sum(len(trial.kills) for trial in some if not trial.differences)
        kills = sum(len(trial.kills) for trial in some)
        return {"runs": len(some), "kills": kills, "identical": identical, "differing": kills - identical}

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
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    names = ", ".join(FORGET)
    parser.add_argument("--forget", type=listed, help=f"the control: what every checkpoint loses, of {names}")
    parser.add_argument("--report", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--go-on", action="store_true", help="keep the report's identical trials, do the others again")
    options = parser.parse_args()
    if options.go_on and not (options.report and options.report.exists()):
        parser.error("--go-on needs a --report that is there")
    cases = listed(options.cases)
    if unknown := set(options.forget or ()) - set(FORGET):
        parser.error(f"--forget must be of {names}; got {min(unknown)}")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--cases must be of {', '.join(CASES)}; got {unknown[0]}")
    begun = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="torture-"))
    trials = torture(place, cases, options)
    spent = json.loads(options.report.read_text())["seconds"] if options.go_on else 0
    report = summarise(trials, spent + time.monotonic() - begun)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    for case, row in report["cases"].items():
        print(f"{case:24} runs {row['runs']:3}  kills {row['kills']:4}  identical {row['identical']:4}  "
              f"differing {row['differing']:4}")  # fmt: skip
    print(f"kills {report['kills']} / identical {report['identical']} / differing {report['differing']}")
    if report["differing"]:
        print(f"what differs is kept in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
