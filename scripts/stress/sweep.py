"""Kills a real sweep's launcher at drawn instants, starts it again, and compares its trials with an untouched sweep's.

    python scripts/stress/sweep.py --report torture_sweep.json        (20 trials, 10 kills: about 20 minutes)
    python scripts/stress/sweep.py --trials 4 --kills 2 --quick
    python scripts/stress/sweep.py --search                           (ASHA beside a grid of the same budget)

The launcher is killed by SIGKILL and the same words are typed again. Of the trials one can't write its journal and
fails, one is killed by SIGKILL whenever it is seen, as by a kernel that lacks memory, and one is stopped by SIGSTOP
and hangs. The last start is let alone: it has to tell three failures and leave everything else finished. Then the
three are let alone, too, and the words are typed once more. What is compared: every trial's weights, journal, best
epoch; and that MLflow has each run once, below one parent.

--quick is for the tests: a network that is soon built, and a launcher that gives a trial that hangs less time. How long
that is follows from the untouched sweep, so that a slow or busy machine takes nobody else for hanging.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.tracking.journal import comparable, read_journal

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model=vgg16_inception", "model.width=0.1", "epochs=2", "steps_per_epoch=15", "batch_size=16",
    "checkpoint.every_steps=6", "precision=float32",
]  # fmt: skip
QUICK = [*SMALL[1:], "model=vgg16"]
HOSTILE = {"a journal that can't be written": -2, "killed": -1, "hanging": 0}  # which of the trials
LAUNCH_SECONDS = 3600
QUICK_GRACE = "from train import __main__; from train.sweep import workers; workers.GRACE_SECONDS = 5.0; "


class Launcher:
    """The sweep's command, as a person types it."""

    def __init__(self, folder: Path, store: Path, words: list[str], *, quick: bool = False):
        self.folder = folder
        program = ["-c", f"{QUICK_GRACE}__main__.main()"] if quick else ["-m", "train"]
        self._command = [
            sys.executable, *program, "-m", *words, f"run_dir={folder}", f"tracking.uri=sqlite:///{store}",
            "sweep.parallel=2", "tracking.wait_seconds=600",
        ]  # fmt: skip
        self.output = folder.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                self._command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def to_the_end(self) -> tuple[int, str]:
        """The exit code, and what this start has printed."""
        before = self.output.stat().st_size if self.output.exists() else 0
        code = self.start().wait(LAUNCH_SECONDS)
        return code, self.output.read_bytes()[before:].decode()


def processes_of(folder: Path) -> list[int]:
    """Trials of this sweep that live, by their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.startswith(f"sweep.trial='{folder}/trials/") for word in words):
            found.append(int(place.name))
    return found


def number_of(process: int) -> int | None:
    """The number of the trial that a process runs."""
    try:
        found = re.search(r"/trials/(\d+)\.json", Path(f"/proc/{process}/cmdline").read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def annoy(folder: Path, killed: int, hanging: int) -> None:
    """What happens to two of the trials whenever they are seen."""
    for process in processes_of(folder):
        number = number_of(process)
        if number in (killed, hanging):
            try:
                os.kill(process, signal.SIGKILL if number == killed else signal.SIGSTOP)
            except ProcessLookupError:
                continue


def torture(place: Path, trials: int, kills: int, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """The report. Ends the program if something is not as it has to be."""
    words = [*(QUICK if quick else SMALL), f"seed=range({trials})"]
    untouched = Launcher(place / "untouched", place / "untouched.db", words)
    start = time.perf_counter()
    code, said = untouched.to_the_end()
    require(code == 0, said)
    usual = time.perf_counter() - start
    print(f"untouched: {trials} trials in {usual:.0f} s", flush=True)

    draw = random.Random(seed)
    minutes = max(4 * usual / trials, 20 if quick else 60) / 60  # two at a time: twice as long as a trial takes
    words.append(f"sweep.minutes={minutes:.2f}")
    launcher = Launcher(place / "tortured", place / "tortured.db", words, quick=quick)
    failing, killed, hanging = (which % trials for which in HOSTILE.values())
    (launcher.folder / f"{failing:03d}" / "metrics.jsonl").mkdir(parents=True)
    survivors = 0
    for number in range(kills):
        process = launcher.start()
        deadline = time.monotonic() + draw.uniform(3, 2 * usual / kills)
        while time.monotonic() < deadline and process.poll() is None:
            annoy(launcher.folder, killed, hanging)
            time.sleep(0.2)
        alive = len(processes_of(launcher.folder))
        process.kill()
        process.wait()
        time.sleep(draw.choice((0, 0, 8)))  # the next start may find trials that are still on their way out
        survivors += len(processes_of(launcher.folder)) > 0
        print(f"kill {number + 1}: {alive} trials were running", flush=True)
    process = launcher.start()
    while process.poll() is None:
        annoy(launcher.folder, killed, hanging)
        time.sleep(0.2)
    said = launcher.output.read_text().rpartition("going on with a sweep")[2]
    told = [line for line in said.splitlines() if line.startswith("failed: ")]
    require(process.returncode == 1 and len(told) == 3, said)
    (launcher.folder / f"{failing:03d}" / "metrics.jsonl").rmdir()
    code, said = launcher.to_the_end()
    require(code == 0, said)
    same = sum(
        result(untouched.folder / f"{number:03d}") == result(launcher.folder / f"{number:03d}")
        for number in range(trials)
    )
    runs, children = recorded(place / "tortured.db")
    require(same == trials, f"{same} of {trials} trials are the same")
    require((runs, children) == (trials + 1, trials), f"{runs} runs in MLflow, {children} of them below the sweep's")
    return {
        "trials": trials, "kills": kills, "found_alive": survivors, "identical": same, "runs_in_mlflow": runs,
        "told": [cut(line, place) for line in told], "untouched_seconds": usual,
    }  # fmt: skip


def cut(line: str, place: Path) -> str:
    """Without the paths of this machine."""
    return re.sub(r" \(\S+\)$", "", line).replace(f"{place}/", "")


def result(run: Path) -> Any:
    """All of a trial's that has to be the same."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [comparable(line) for line, _ in read_journal(run / "metrics.jsonl")]
    return (
        summary["status"],
        summary["weights_sha256"],
        summary["best_epoch"],
        summary["validation"],
        summary["steps"],
        lines,
    )


def recorded(store: Path) -> tuple[int, int]:
    """Runs in MLflow, and how many of them are children."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parents = {run.info.run_id for run in runs if run.data.tags.get("kind") == "sweep"}
    return len(runs), sum(run.data.tags.get("mlflow.parentRunId") in parents for run in runs)


def require(fine: bool, said: str) -> None:
    if not fine:
        raise SystemExit(f"not as it has to be:\n{said[-4000:]}")


# ------------------------------------------------------------------------------------------------- searches compared


def spent(sweep: Path) -> int:
    """Epochs that were trained, those that were done again included."""
    steps = [
        int((run / "heartbeat").read_text().split()[0]) for run in sweep.glob("[0-9]*") if (run / "heartbeat").exists()
    ]
    return round(sum(steps) / STEPS)


STEPS = 40  # of digits, per epoch
SPACE = {
    "grid": ["optimizer.learning_rate=0.0003,0.003,0.03,0.3", "label_smoothing=0,0.1", "sweep.search=grid"],
    "asha": [
        "optimizer.learning_rate=tag(log,interval(0.0003,0.3))", "label_smoothing=interval(0,0.2)", "sweep.search=asha",
        "sweep.trials=27",
    ],
}  # fmt: skip


def searches(place: Path, epochs: int) -> list[dict[str, Any]]:
    """Best accuracy and epochs spent by each."""
    rows = []
    for name, words in SPACE.items():
        common = ["model=vgg16_inception", "model.width=0.25", f"epochs={epochs}", *words]
        launcher = Launcher(place / name, place / f"{name}.db", [*common, "sweep.minutes=60"])
        code, said = launcher.to_the_end()
        require(code == 0, said)
        best = next(line for line in said.splitlines() if line.startswith("best: "))
        found = [float(number) for number in re.findall(r"accuracy ([\d.]+)", best)]
        rows.append({"search": name, "epochs": spent(launcher.folder), "validation": found[0], "test": found[1]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="at least 4")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--quick", action="store_true", help="what the tests do")
    parser.add_argument("--search", action="store_true", help="compare ASHA with a grid instead")
    parser.add_argument("--epochs", type=int, default=9, help="of a whole trial of --search")
    parser.add_argument("--report", type=Path, help="where the figures are written, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-sweep-") as place:
        if arguments.search:
            found: Any = searches(Path(place), arguments.epochs)
        else:
            found = torture(Path(place), arguments.trials, arguments.kills, arguments.seed, quick=arguments.quick)
    print(json.dumps(found, indent=1))
    if arguments.report:
        arguments.report.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
