"""Trains the same small runs on two commits and reports whether any bit of the results differs.

    python scripts/compare_commits.py BEFORE [AFTER]                   (AFTER: HEAD unless given)
    python scripts/compare_commits.py main --workdir /tmp/compare      (keeps checkouts, run folders and results)
    python scripts/compare_commits.py HEAD~3 HEAD --cases rollback,jax

Run it after a change that must not alter results: moved code, renamed code, a refactoring. Each commit is checked out
into a clone of its own with an environment of its own (`make setup`), so that `python -m train` imports the code of
that commit and nothing else. Uncommitted changes are not seen. Every case runs on both sides with the same overrides,
in fresh processes on this machine.

Compared, exactly: the figures of summary.json (with the SHA-256 of the weights and the test and validation metrics),
every line of the journal metrics.jsonl, names and contents of all arrays of the last checkpoint, the SHA-256 in its
manifest, names and contents of all arrays of best/model.keras. Not compared: what LEFT_OUT lists (times, rates,
memory, IDs), the config, MLflow, plots. A different hash of the config is mentioned, but is no difference: a new key
changes it. Names of metrics and figures may differ between the commits as the tables below say; differences are
printed with the new names.

With --workdir, results are kept by commit, overrides, Python version and processor (the lock files of the commit fix
the library versions), so that later comparisons with the same BEFORE run only the other side. If both commits are the
same, the second side always runs: this shows that the runs are reproducible at all.

The exit code is 0 if all cases are equal, else 1. A run that fails, on either side, is a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

# ------------------------------------------------------------------------------- names that differ between the commits

# Metrics, old -> new. `train/loss` exists in both vocabularies with different meanings (with and without the auxiliary
# losses), so a journal is renamed as a whole, and only if it uses the old names: they contain `main_`.
OLD_METRIC = "main_"
RENAMED_METRICS = {
    "train/loss": "train/total_loss",
    "train/main_loss": "train/loss",
    "train/main_accuracy": "train/accuracy",
    "validation/main_accuracy": "validation/accuracy",
    "validation/main_top5_accuracy": "validation/top5_accuracy",
}

# Figures of summary.json, old -> new. The old form's `best`, whose epoch counts from 0, becomes `best_epoch`, which
# counts from 1, and `validation` (see `normalize_summary`).
RENAMED_FIGURES = {"lives": "attempts"}

# ------------------------------------------------------------------------------------------------ what is not compared

# Metrics of the journal and figures of the summary that differ between equal runs: by the last part of their names.
LEFT_OUT = {
    "images_per_second", "train_images_per_second", "data_wait_fraction", "checkpoint_stall_seconds",  # rates
    "peak_memory_bytes",
    "time", "run_id", "config_hash",
    "accuracy_interval",  # follows from accuracy and examples, which are compared, by a method that may change
}  # fmt: skip
COMPARED_BEST = ("accuracy", "loss")  # of the best weights on the validation split: what both forms have

# ---------------------------------------------------------------------------------------------------------------- cases

COMMON = {
    "model.width": 0.1, "batch_size": 8, "steps_per_epoch": 8, "epochs": 2, "threads": 1, "precision": "float32",
    "evaluate.report": "false", "tracking.log_model": "false", "tracking.every_steps": 3,
    "tracking.wait_seconds": 600,  # the process that feeds MLflow must not outlive its run
}  # fmt: skip
FAULT = "INCEPTION_FAULT"  # environment variable that makes a process kill itself, POINT:NUMBER


@dataclass(frozen=True)
class Case:
    """A run. Words in braces stand for files: {weights}, {teacher}, {images}.

    processes: how many train together. kill_at_step: it is killed there and resumed. base: the case whose run it starts
    from. required_metric: must be in the journal, or the case did not exercise what it is for.
    """

    overrides: dict[str, Any]
    processes: int = 1
    kill_at_step: int | None = None
    base: str | None = None
    required_metric: str | None = None
    left_out: tuple[str, ...] = ()

    def words(self) -> list[str]:
        return [f"{name}={value}" for name, value in (COMMON | self.overrides).items()]


CASES = {
    "vgg16": Case({
        "model": "vgg16", "model.head": "fc", "optimizer": "sgd", "schedule": "cosine", "augment": "flip_crop",
        "label_smoothing": 0.2, "data.class_weights": "true", "evaluate.views": "mirror",
    }),
    "vgg16_inception": Case({
        "model": "vgg16_inception", "optimizer": "adamw", "optimizer.weight_decay": 0.05, "schedule": "exponential",
        "gradient_clip": 5, "tracking.gradients": "true",
    }),
    "inception_v1": Case({
        "model": "inception_v1", "optimizer": "rmsprop", "schedule": "step", "label_smoothing": 0,
        "data.train_per_class": 20,
    }),
    "inception_v3": Case({
        "model": "inception_v3", "model.width": 0.05, "steps_per_epoch": 6, "precision": "mixed_bfloat16",
        "schedule": "constant", "optimizer.nesterov": "false",
    }),
    "inception_resnet_v2": Case({
        "model": "inception_resnet_v2", "model.width": 0.05, "steps_per_epoch": 6, "model.head": "max",
        "optimizer": "adamw", "seed": 3,
    }),
    "ema_accumulation": Case({
        "model": "vgg16_inception", "model.width": 0.05, "precision": "mixed_float16", "ema": 0.8,
        "gradient_accumulation": 4, "optimizer": "adamw", "epochs": 3, "early_stopping.metric": "validation/loss",
        "early_stopping.patience_epochs": 1, "early_stopping.min_delta": 100,
    }),
    "fine_tune": Case({
        "model": "vgg16_inception", "model.weights": "'{weights}'", "epochs": 3, "fine_tune.layer_decay": 0.9,
        "fine_tune.stages": "[{{epochs:1,from_part:head,learning_rate_factor:1.0}},"
                            "{{epochs:1,from_part:block4,learning_rate_factor:0.5}},"
                            "{{epochs:1,from_part:all,learning_rate_factor:0.1}}]",
    }, base="vgg16_inception"),
    "distillation": Case({  # the config names the folder of the teacher, which is another on each side
        "model": "vgg16", "model.width": 0.05, "distill.teacher": "'{teacher}'",
    }, base="vgg16_inception", left_out=("config_hash",)),
    "augmentation": Case({
        "model": "vgg16", "augment": "randaugment", "augment.mixup": 0.2, "augment.cutmix": 1.0, "augment.erase": 0.5,
        "data.balanced": "true", "batch_size": 16,
    }),
    "image_folder": Case({
        "model": "inception_v1", "model.width": 0.05, "model.batch_norm": "false", "data": "folder",
        "data.root": "'{images}'", "data.image_size": 32, "data.cache": "none", "augment": "inception",
        "evaluate.views": "ten_crop",
    }),
    "rollback": Case({  # the rising rate is too high in step 11, after the first checkpoint
        "model": "vgg16", "batch_size": 16, "steps_per_epoch": 15, "epochs": 3, "optimizer.learning_rate": 1.0,
        "schedule.warmup_epochs": 3, "checkpoint.every_steps": 6, "on_divergence": "rollback",
        "rollback.learning_rate_factor": 0.2,
    }, required_metric="rollback/number"),
    "jax": Case({"model": "vgg16_inception", "model.width": 0.05, "backend": "jax", "device": "cpu"}),
    "jax_two_processes": Case({
        "model": "vgg16", "model.width": 0.05, "backend": "jax", "device": "cpu", "distributed.processes": 2,
    }, processes=2),
    "killed_and_resumed": Case({  # how many steps are repeated depends on how soon a checkpoint is on disk
        "model": "vgg16_inception", "model.width": 0.05, "ema": 0.9, "checkpoint.every_steps": 3,
    }, kill_at_step=13, left_out=("steps_executed",)),
}  # fmt: skip

RUN_SECONDS = 900  # how long one run may take
EXIT_SECONDS = 60  # how long the other processes of a run may outlive the first
WEIGHTS = "best/model.keras"
STORE = "mlflow.db"
IMAGES = (3, 16, 40)  # of the image folder: classes, files per class, pixels per side


class CompareError(RuntimeError):
    """The comparison itself is impossible; one line."""


class BaseRunError(CompareError):
    """A run that another case starts from failed."""


# ----------------------------------------------------------------------------------------------- what a run has left


@dataclass
class Result:
    """What is compared of a run. Arrays by name: dtype, shape and SHA-256; failure: its last line, if it failed."""

    failure: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    journal: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str | None = None
    manifest_sha256: str | None = None
    checkpoint_arrays: dict[str, str] = field(default_factory=dict)
    best_arrays: dict[str, str] = field(default_factory=dict)


def read_result(run_dir: Path) -> Result:
    """What a finished run has left in its folder. Raises: OSError, ValueError or KeyError if a file is missing."""
    checkpoint = max((run_dir / "checkpoints").glob("epoch-*"))
    with np.load(checkpoint / "arrays.npz", allow_pickle=False) as arrays:
        checkpoint_arrays = {name: describe_array(arrays[name]) for name in arrays.files}
    return Result(
        summary=json.loads((run_dir / "summary.json").read_text()),
        journal=[json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()],
        checkpoint=checkpoint.name,
        manifest_sha256=json.loads((checkpoint / "manifest.json").read_text()).get("arrays_sha256"),
        checkpoint_arrays=checkpoint_arrays,
        best_arrays=read_keras_arrays(run_dir / WEIGHTS),
    )


def read_keras_arrays(path: Path) -> dict[str, str]:
    """The arrays of a .keras file; the file itself contains times."""
    arrays: dict[str, str] = {}

    def add(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            arrays[name] = describe_array(node[()])

    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(add)
    return arrays


def describe_array(value: Any) -> str:
    array = np.asarray(value)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------------------------- comparison


def compare(before: Result, after: Result, left_out: tuple[str, ...] = ()) -> list[str]:
    """Every difference in one line each, those that explain most first. left_out: figures of the summary."""
    failures = [
        f"{side} failed: {result.failure}"
        for side, result in (("BEFORE", before), ("AFTER", after))
        if result.failure is not None
    ]
    if failures:
        return failures
    journals = normalize_journal(before.journal), normalize_journal(after.journal)
    summaries = [
        {name: text for name, text in normalize_summary(result.summary, journal).items() if name not in left_out}
        for result, journal in zip((before, after), journals, strict=True)
    ]
    files = [{"name": str(result.checkpoint), "SHA-256": str(result.manifest_sha256)} for result in (before, after)]
    return [
        *compare_journals(*journals),
        *compare_tables("summary: ", *summaries),
        *compare_tables("checkpoint: ", before.checkpoint_arrays, after.checkpoint_arrays),
        *compare_tables("best weights: ", before.best_arrays, after.best_arrays),
        *compare_tables("checkpoint: ", *files),
    ]


def compare_journals(before: list[dict[str, str]], after: list[dict[str, str]]) -> Iterator[str]:
    for number, lines in enumerate(zip(before, after, strict=False), 1):
        yield from compare_tables(f"journal line {number}: ", *lines)
    if len(before) != len(after):
        yield f"journal: {len(before)} lines -> {len(after)} lines"


def compare_tables(prefix: str, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield f"{prefix}{name} {before.get(name, '(missing)')} -> {after.get(name, '(missing)')}"


def normalize_journal(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Every line as name -> text in the new vocabulary, without what differs between equal runs."""
    is_old = any(name.rpartition("/")[2].startswith(OLD_METRIC) for line in lines for name in line["values"])
    return [normalize_line(line, RENAMED_METRICS if is_old else {}) for line in lines]


def normalize_line(line: dict[str, Any], renamed: dict[str, str]) -> dict[str, str]:
    """Texts, since NaN equals nothing; JSON writes floats as repr does.

    A total loss that equals the loss (no auxiliary heads) is left out: one vocabulary may not write it at all.
    """
    values = {renamed.get(name, name): json.dumps(value) for name, value in line["values"].items()}
    if values.get("train/total_loss") == values.get("train/loss"):
        values.pop("train/total_loss", None)
    position = {name: json.dumps(value) for name, value in line.items() if name != "values"}
    return {name: text for name, text in (position | values).items() if is_compared(name)}


def normalize_summary(summary: dict[str, Any], journal: list[dict[str, str]]) -> dict[str, str]:
    """Dotted name -> text, in the new form. journal: normalized; the old form takes the validation loss from there."""
    figures = {RENAMED_FIGURES.get(name, name): value for name, value in summary.items()}
    best = figures.pop("best", None)
    if best:
        from_zero = "validation_main_accuracy" in best
        figures["best_epoch"] = best["epoch"] + (1 if from_zero else 0)
        figures["validation"] = {"accuracy": best.get("validation_main_accuracy", best.get("validation_accuracy"))}
    validation = figures.pop("validation", None) or {}
    flat = {name: json.dumps(value) for name, value in flatten(figures).items() if is_compared(name)}
    for name in COMPARED_BEST if best or validation else ():
        found = json.dumps(validation[name]) if name in validation else best_metric(journal, flat["best_epoch"], name)
        flat[f"validation.{name}"] = found
    return flat


def best_metric(journal: list[dict[str, str]], best_epoch: str, name: str) -> str:
    """A validation metric of the best epoch (counted from 1); after a rollback the last line of that epoch counts."""
    found = [line.get(f"validation/{name}") for line in journal if line.get("epoch") == str(int(best_epoch) - 1)]
    return next((value for value in reversed(found) if value is not None), "(not in the journal)")


def is_compared(name: str) -> bool:
    return name.replace("/", ".").rpartition(".")[2] not in LEFT_OUT


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# ----------------------------------------------------------------------------------------------- one commit's checkout


class Side:
    """One of the two commits: its checkout, its environment, its runs."""

    def __init__(self, name: str, commit: str, workdir: Path, *, use_cache: bool):
        self.name, self.commit = name, commit
        self.workdir, self.use_cache = workdir, use_cache
        self.checkout = workdir / name
        self.store = f"sqlite:///{workdir / STORE}"
        self.runs = workdir / "runs" / f"{name}-{commit[:12]}"
        self._lock = threading.RLock()
        self._ready: set[str] = set()
        self._case_locks = {case: threading.RLock() for case in CASES}
        self._fresh: dict[str, Result] = {}

    def python(self, *, jax: bool = False) -> Path:
        """The interpreter of the checkout's own environment, which is made when it is first needed."""
        python = self.checkout / ".venv/bin/python"
        with self._lock:
            if "base" not in self._ready:
                self._check_out()
                self._make("setup")
                self._check_imports(python)
                self._make_store(python)
                self._ready.add("base")
            if jax and "jax" not in self._ready:
                self._make("train", "backend=jax", "ARGS=--help")  # `make train` installs the extra when jax is typed
                self._ready.add("jax")
        return python

    def _check_out(self) -> None:
        marker = self.workdir / f"{self.name}.commit"  # written last: a clone without it is incomplete
        if marker.exists() and marker.read_text() == self.commit:
            return
        shutil.rmtree(self.checkout, ignore_errors=True)  # with its environment, which maps packages to its folders
        git("clone", "--quiet", "--shared", "--no-checkout", str(repository()), str(self.checkout), cwd=self.workdir)
        git("checkout", "--quiet", "--detach", self.commit, cwd=self.checkout)
        write_atomically(marker, self.commit)

    def _make(self, *words: str) -> None:
        done = execute(["make", *words, f"PYTHON={base_python()}"], self.checkout)
        if done.returncode != 0:
            raise CompareError(f"make {words[0]} failed in {self.checkout}: {last_line(done.stdout)}")

    def _check_imports(self, python: Path) -> None:
        """The package and its plug-in for Hydra must come from this checkout, not from where something is installed."""
        code = (
            "import train, hydra_plugins.inception_laboratory as p; print(train.__path__[0], p.__path__[0], sep='\\n')"
        )
        done = execute([str(python), "-c", code], self.checkout)
        if done.returncode != 0:
            raise CompareError(f"cannot import the code of {self.checkout}: {last_line(done.stdout)}")
        for path in done.stdout.splitlines()[-2:]:
            if not Path(path).resolve().is_relative_to(self.checkout):
                raise CompareError(f"{self.checkout} imports code from outside: {path}")

    def _make_store(self, python: Path) -> None:
        """The tables of the MLflow store, before two runs make them at the same time."""
        if not (self.workdir / STORE).exists():
            execute(
                [str(python), "-c", f"import mlflow; mlflow.MlflowClient({self.store!r}).search_experiments()"],
                self.checkout,
            )

    # ------------------------------------------------------------------------------------------------------- its runs

    def result(self, case: str, files: dict[str, Path]) -> Result:
        """The result of a case, from the cache if it is there. files: what the words in braces stand for."""
        cached = self._cached(case, files)
        with self._case_locks[case]:
            if case in self._fresh:
                return self._fresh[case]
            if self.use_cache and cached.exists():
                return Result(**json.loads(cached.read_text())["result"])
            return self._run_anew(case, files)

    def run_dir(self, case: str) -> Path:
        """The folder of a finished run of a case that needs no files; it runs again if only its result was kept."""
        finished = self.runs / f"{case}.key"
        with self._case_locks[case]:
            if not finished.exists() or finished.read_text() != self._key(case, {}):
                result = self._run_anew(case, {})
                if result.failure is not None:
                    raise BaseRunError(f"the run to start from, {case} {self.name}, failed: {result.failure}")
        return self.runs / case

    def _run_anew(self, case: str, files: dict[str, Path]) -> Result:
        """Runs the case and keeps its result, if there is one, for later calls."""
        result = self._fresh[case] = self._run(case, files)
        if result.failure is None:
            write_atomically(self.runs / f"{case}.key", self._key(case, files))
        if result.failure is None and self.use_cache:
            content = {"case": case, "commit": self.commit, **machine(), "result": asdict(result)}
            write_atomically(self._cached(case, files), json.dumps(content, indent=1) + "\n")
        return result

    def _cached(self, case: str, files: dict[str, Path]) -> Path:
        return self.workdir / "results" / f"{self._key(case, files)}.json"

    def _key(self, case: str, files: dict[str, Path]) -> str:
        """Hash of all that a result depends on; files by their contents, the teacher is of the same commit."""
        contents = {name: content_digest(path) for name, path in files.items() if name != "teacher"}
        chosen = CASES[case]
        parts = [self.commit, chosen.words(), chosen.processes, chosen.kill_at_step, contents, machine()]
        return f"{case}-{self.commit[:12]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def _run(self, case: str, files: dict[str, Path]) -> Result:
        chosen, run_dir = CASES[case], self.runs / case
        shutil.rmtree(run_dir, ignore_errors=True)
        (self.runs / f"{case}.key").unlink(missing_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        python = self.python(jax=chosen.overrides.get("backend") == "jax")
        words = [word.format(**files) if "{" in word else word for word in chosen.words()]
        words += [f"run_dir='{run_dir}'", f"tracking.uri='{self.store}'"]
        code, output = self._execute(case, [str(python), "-m", "train", *words])
        if chosen.kill_at_step is not None:
            if code != -9:
                return Result(failure=f"was to be killed at step {chosen.kill_at_step}, but exited with {code}")
            code, output = self._execute(case, [str(python), "-m", "train.resume", f"run={run_dir}"], resumed=True)
        if code != 0:
            return Result(failure=f"exit code {code}: {error_line(output)}")
        try:
            result = read_result(run_dir)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            return Result(failure=f"incomplete run folder: {type(error).__name__}: {error}")
        if chosen.required_metric and not any(chosen.required_metric in line["values"] for line in result.journal):
            return Result(failure=f"{chosen.required_metric} is not in the journal: the case tests nothing here")
        return result

    def _execute(self, case: str, command: list[str], *, resumed: bool = False) -> tuple[int, str]:
        """Exit code and output of a run; with several processes those of the first, unless another failed."""
        chosen = CASES[case]
        environment = clean_environment()
        if chosen.kill_at_step is not None and not resumed:
            environment[FAULT] = f"step:{chosen.kill_at_step}"
        if chosen.processes > 1:
            command = [*command, f"distributed.coordinator=127.0.0.1:{free_port()}"]
        with (self.runs / f"{case}.log").open("a+" if resumed else "w+") as log:
            start = log.tell()
            processes = [
                subprocess.Popen(
                    [*command, *([f"distributed.index={index}"] if index else [])],
                    cwd=self.checkout, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )
                for index in range(chosen.processes)
            ]  # fmt: skip
            try:
                codes = [processes[0].wait(RUN_SECONDS), *(other.wait(EXIT_SECONDS) for other in processes[1:])]
            except subprocess.TimeoutExpired as error:
                return 1, f"did not end within {error.timeout:g} seconds"
            finally:
                for process in processes:
                    process.kill()
            log.seek(start)
            return next((code for code in codes if code), 0), log.read()


# ------------------------------------------------------------------------------------------------------------- helpers


def execute(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """What it says on both streams is in `stdout`."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def git(*words: str, cwd: Path) -> str:
    done = execute(["git", *words], cwd)
    if done.returncode != 0:
        raise CompareError(f"git {words[0]} failed: {last_line(done.stdout)}")
    return done.stdout.strip()


def repository() -> Path:
    return Path(git("rev-parse", "--show-toplevel", cwd=Path(__file__).resolve().parent))


def commit_of(name: str) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", cwd=repository())
    except CompareError:
        raise CompareError(f"git knows no commit {name}") from None


def base_python() -> str:
    """The interpreter that this one's environment was made from: both sides get the same version."""
    path = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(path) if path.exists() else sys.executable


def clean_environment() -> dict[str, str]:
    """Without what would lead to other code, or carry the words of an outer make into an inner one."""
    dropped = {
        "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS",
        "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", FAULT,
    }  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in dropped}


def machine() -> dict[str, str]:
    """What a result depends on besides commit and case."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {"python": platform.python_version(), "processor": processor}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "(no output)")


def error_line(text: str) -> str:
    """The last line of an error, or what was said last."""
    return last_line("\n".join(line for line in text.splitlines() if line.startswith("error: ")) or text)


def content_digest(path: Path) -> str:
    """Of a .keras file its arrays, of a folder its files."""
    if path.is_file():
        content: Any = read_keras_arrays(path)
    else:
        found = sorted(file for file in path.rglob("*") if file.is_file())
        content = [[str(file.relative_to(path)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in found]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


def write_images(folder: Path) -> None:
    """A small image folder: JPEG files of blurred noise in class colours, the same on every call."""
    from PIL import Image

    if folder.exists():
        return
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    classes, files, side = IMAGES
    generator = np.random.default_rng(0)
    for label in range(classes):
        (fresh / f"class_{label}").mkdir(parents=True)
        for number in range(files):
            pixels = generator.integers(0, 160, size=(side // 8, side // 8, 3))
            pixels[..., label % 3] += 95
            image = Image.fromarray(pixels.astype(np.uint8)).resize((side + number, side), Image.Resampling.BICUBIC)
            image.save(fresh / f"class_{label}" / f"{number}.jpg", quality=90)
    fresh.rename(folder)


# ------------------------------------------------------------------------------------------------------- the comparison


class Comparison:
    """Both sides, and the files that cases share."""

    def __init__(self, before: str, after: str, workdir: Path):
        self.workdir = workdir
        self.before = Side("before", before, workdir, use_cache=True)
        self.after = Side("after", after, workdir, use_cache=after != before)
        self._lock = threading.Lock()

    def prepare(self, cases: list[str]) -> None:
        """Makes what several cases would otherwise make at the same time."""
        if any("{images}" in word for case in cases for word in CASES[case].words()):
            write_images(self.workdir / "images")

    def run(self, case: str) -> tuple[list[str], str]:
        """The differences of a case, and what to show of it if there are none."""
        try:
            before, after = (side.result(case, self._files(case, side)) for side in (self.before, self.after))
        except BaseRunError as error:
            return [str(error)], ""
        note = str(after.summary.get("weights_sha256"))[:6] + "…"
        hashes = [result.summary.get("config_hash") for result in (before, after)]
        if hashes[0] != hashes[1] and "config_hash" not in CASES[case].left_out:
            note += "  (config_hash differs)"
        return compare(before, after, CASES[case].left_out), note

    def _files(self, case: str, side: Side) -> dict[str, Path]:
        """Weights are those of BEFORE for both sides; a teacher is a run of the side itself."""
        chosen, files = CASES[case], {}
        text = " ".join(chosen.words())
        if "{images}" in text:
            files["images"] = self.workdir / "images"
        if "{weights}" in text and chosen.base:
            files["weights"] = self._weights(chosen.base)
        if "{teacher}" in text and chosen.base:
            files["teacher"] = side.run_dir(chosen.base)
        return files

    def _weights(self, base: str) -> Path:
        path = self.workdir / "weights" / f"{self.before.commit[:12]}-{base}.keras"
        with self._lock:
            if not path.exists():
                source = self.before.run_dir(base) / WEIGHTS
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
        return path


def run_cases(comparison: Comparison, cases: list[str], jobs: int) -> int:
    """Runs the cases, `jobs` at a time, and prints a line for each; returns how many are equal."""
    comparison.prepare(cases)
    equal = 0

    def run(case: str) -> tuple[str, list[str], str, float]:
        begin = time.monotonic()
        return case, *comparison.run(case), time.monotonic() - begin

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, case) for case in cases]
        try:
            for future in as_completed(waiting):
                case, differences, note, seconds = future.result()
                equal += not differences
                print(format_line(case, differences, note, seconds), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return equal


def format_line(case: str, differences: list[str], note: str, seconds: float) -> str:
    if not differences:
        return f"equal      {case:20} {seconds:5.0f} s   {note}"
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return f"DIFFERENT  {case:20} {seconds:5.0f} s   {differences[0]}{more}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="a commit, branch or tag")
    parser.add_argument("after", metavar="AFTER", nargs="?", default="HEAD", help="a commit, branch or tag")
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument(
        "--workdir", type=Path, help="folder for checkouts, runs and results, kept at the end; default: a temporary one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    workdir = (options.workdir or Path(tempfile.mkdtemp(prefix="compare-commits-"))).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        comparison = Comparison(commit_of(options.before), commit_of(options.after), workdir)
        equal = run_cases(comparison, cases, options.jobs)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.workdir is None:
            shutil.rmtree(workdir, ignore_errors=True)
    print(f"equal: {equal} of {len(cases)}")
    if equal < len(cases):
        print(f"run folders: {workdir / 'runs'}" if options.workdir else "to keep the run folders: --workdir DIR")
    return 0 if equal == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
