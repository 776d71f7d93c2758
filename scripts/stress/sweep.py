"""Kills a real sweep's launcher at random times, restarts it, and compares the trials with an undisturbed sweep's.

    python scripts/stress/sweep.py --report stress_sweep.json         (20 trials, 10 kills: about 20 minutes)
    python scripts/stress/sweep.py --trials 4 --kills 2 --quick
    python scripts/stress/sweep.py --search                           (ASHA against a grid of the same budget)

The launcher is killed by SIGKILL and the same command is run again. One of the trials cannot write its journal and
fails, one is killed by SIGKILL whenever it runs, as by an out-of-memory killer, and one is stopped by SIGSTOP and
hangs. The last launcher is not killed: it must report these three failures and finish all other trials. Then the three
trials are left undisturbed too, and the command is run once more. Compared are the weights, journal and best epoch of
every trial; and MLflow must have each run once, under one parent.

--quick is for the tests: a network that is built quickly, and a shorter grace period for a trial that hangs. The time
limit follows from the duration of the undisturbed sweep, so that on a slow or busy machine no other trial exceeds it.
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
FAULTY_TRIALS = {"unwritable journal": -2, "killed": -1, "hanging": 0}  # indices of the trials
LAUNCH_SECONDS = 3600
QUICK_GRACE = "from train import __main__; from train.sweep import workers; workers.GRACE_SECONDS = 5.0; "


class Launcher:
    """Runs the sweep's command as a user does."""

    def __init__(self, folder: Path, store: Path, overrides: list[str], *, quick: bool = False):
        self.folder = folder
        program = ["-c", f"{QUICK_GRACE}__main__.main()"] if quick else ["-m", "train"]
        self._command = [
            sys.executable, *program, "-m", *overrides, f"run_dir={folder}", f"tracking.uri=sqlite:///{store}",
            "sweep.parallel=2", "tracking.wait_seconds=600",
        ]  # fmt: skip
        self.output = folder.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                self._command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run_to_end(self) -> tuple[int, str]:
        """Returns the exit code and the output of this launch."""
        start = self.output.stat().st_size if self.output.exists() else 0
        exit_code = self.start().wait(LAUNCH_SECONDS)
        return exit_code, self.output.read_bytes()[start:].decode()


def trial_processes(folder: Path) -> list[int]:
    """Returns the running trial processes of this sweep, found by their command lines."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(argument.startswith(f"sweep.trial='{folder}/trials/") for argument in arguments):
            pids.append(int(path.name))
    return pids


def trial_number(pid: int) -> int | None:
    """Returns the number of the trial that a process runs."""
    try:
        match = re.search(r"/trials/(\d+)\.json", Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return None
    return int(match[1]) if match else None


def disturb(folder: Path, killed: int, hanging: int) -> None:
    """Kills the one trial and stops the other if they are running."""
    for pid in trial_processes(folder):
        number = trial_number(pid)
        if number in (killed, hanging):
            try:
                os.kill(pid, signal.SIGKILL if number == killed else signal.SIGSTOP)
            except ProcessLookupError:
                continue


def stress_sweep(root: Path, trials: int, kills: int, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """Returns the report. Exits the program if a requirement is not met."""
    overrides = [*(QUICK if quick else SMALL), f"seed=range({trials})"]
    reference = Launcher(root / "untouched", root / "untouched.db", overrides)
    start = time.perf_counter()
    exit_code, output = reference.run_to_end()
    require(exit_code == 0, output)
    reference_seconds = time.perf_counter() - start
    print(f"undisturbed: {trials} trials in {reference_seconds:.0f} s", flush=True)

    draw = random.Random(seed)
    # Two trials at a time: this is twice the duration of a trial.
    minutes = max(4 * reference_seconds / trials, 20 if quick else 60) / 60
    overrides.append(f"sweep.minutes={minutes:.2f}")
    launcher = Launcher(root / "killed", root / "killed.db", overrides, quick=quick)
    failing, killed, hanging = (index % trials for index in FAULTY_TRIALS.values())
    (launcher.folder / f"{failing:03d}" / "metrics.jsonl").mkdir(parents=True)
    survivors = 0
    for number in range(kills):
        process = launcher.start()
        deadline = time.monotonic() + draw.uniform(3, 2 * reference_seconds / kills)
        while time.monotonic() < deadline and process.poll() is None:
            disturb(launcher.folder, killed, hanging)
            time.sleep(0.2)
        running = len(trial_processes(launcher.folder))
        process.kill()
        process.wait()
        time.sleep(draw.choice((0, 0, 8)))  # the next launcher may find trials that are still exiting
        survivors += len(trial_processes(launcher.folder)) > 0
        print(f"kill {number + 1}: {running} trials were running", flush=True)
    process = launcher.start()
    while process.poll() is None:
        disturb(launcher.folder, killed, hanging)
        time.sleep(0.2)
    output = launcher.output.read_text().rpartition("resuming sweep ")[2]
    failures = [line for line in output.splitlines() if line.startswith("failed: ")]
    require(process.returncode == 1 and len(failures) == 3, output)
    (launcher.folder / f"{failing:03d}" / "metrics.jsonl").rmdir()
    exit_code, output = launcher.run_to_end()
    require(exit_code == 0, output)
    identical = sum(
        comparable_result(reference.folder / f"{number:03d}") == comparable_result(launcher.folder / f"{number:03d}")
        for number in range(trials)
    )
    runs, children = count_mlflow_runs(root / "killed.db")
    require(identical == trials, f"{identical} of {trials} trials are identical")
    require((runs, children) == (trials + 1, trials), f"{runs} runs in MLflow, {children} of them below the sweep's")
    return {
        "trials": trials, "kills": kills, "found_alive": survivors, "identical": identical, "runs_in_mlflow": runs,
        "told": [strip_paths(line, root) for line in failures], "untouched_seconds": reference_seconds,
    }  # fmt: skip


def strip_paths(line: str, root: Path) -> str:
    """Removes the paths of this machine from a line."""
    return re.sub(r" \(\S+\)$", "", line).replace(f"{root}/", "")


def comparable_result(run: Path) -> Any:
    """Returns what must be identical in two runs of a trial."""
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


def count_mlflow_runs(store: Path) -> tuple[int, int]:
    """Returns the number of runs in MLflow, and of those with the sweep's run as parent."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parents = {run.info.run_id for run in runs if run.data.tags.get("kind") == "sweep"}
    return len(runs), sum(run.data.tags.get("mlflow.parentRunId") in parents for run in runs)


def require(condition: bool, output: str) -> None:
    if not condition:
        raise SystemExit(f"requirement not met:\n{output[-4000:]}")


# ------------------------------------------------------------------------------------------------- comparing searches


def epochs_trained(sweep: Path) -> int:
    """Returns the number of trained epochs, repeated ones included."""
    steps = [
        int((run / "heartbeat").read_text().split()[0]) for run in sweep.glob("[0-9]*") if (run / "heartbeat").exists()
    ]
    return round(sum(steps) / STEPS)


STEPS = 40  # per epoch of digits
SPACE = {
    "grid": ["optimizer.learning_rate=0.0003,0.003,0.03,0.3", "label_smoothing=0,0.1", "sweep.search=grid"],
    "asha": [
        "optimizer.learning_rate=tag(log,interval(0.0003,0.3))", "label_smoothing=interval(0,0.2)", "sweep.search=asha",
        "sweep.trials=27",
    ],
}  # fmt: skip


def compare_searches(root: Path, epochs: int) -> list[dict[str, Any]]:
    """Returns the best accuracy and the trained epochs of each search."""
    rows = []
    for name, space in SPACE.items():
        overrides = ["model=vgg16_inception", "model.width=0.25", f"epochs={epochs}", *space]
        launcher = Launcher(root / name, root / f"{name}.db", [*overrides, "sweep.minutes=60"])
        exit_code, output = launcher.run_to_end()
        require(exit_code == 0, output)
        best = next(line for line in output.splitlines() if line.startswith("best: "))
        validation, test = (float(number) for number in re.findall(r"accuracy ([\d.]+)", best))
        rows.append({"search": name, "epochs": epochs_trained(launcher.folder), "validation": validation, "test": test})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="at least 4")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--quick", action="store_true", help="the short version that the tests run")
    parser.add_argument("--search", action="store_true", help="compare ASHA with a grid instead")
    parser.add_argument("--epochs", type=int, default=9, help="epochs of a full trial with --search")
    parser.add_argument("--report", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stress-sweep-") as root:
        if arguments.search:
            results: Any = compare_searches(Path(root), arguments.epochs)
        else:
            results = stress_sweep(Path(root), arguments.trials, arguments.kills, arguments.seed, quick=arguments.quick)
    print(json.dumps(results, indent=1))
    if arguments.report:
        arguments.report.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
