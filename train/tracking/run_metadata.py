"""Writes what a run records about itself: its log, identity, resolved config, data and cost, summary and failures."""

from __future__ import annotations

import errno
import io
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from train.cli import arguments
from train.config import composition
from train.config.schema import ROOT
from train.config.serialization import RUN_FORMAT_VERSION, Redactor, flatten, variant_id
from train.storage.atomic import write_atomically
from train.storage.json_types import JsonObject
from train.tracking import environment
from train.tracking.run_dir import RunDir

log = logging.getLogger(__name__)

GAP = 2  # pixels between the examples of the batch image
SHEET_PIXELS = 800  # width up to which a batch image of small examples is enlarged

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# What loading the inference model needs; listed here because MLflow takes long to infer it.
MODEL_PACKAGES = ("tensorflow", "keras", "numpy")


@contextmanager
def log_to_file(run_dir: RunDir) -> Iterator[None]:
    """Writes the log to the run's train.log, and this project's own warnings to the terminal as well."""
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(logging.Filter("train"))
    terminal.addFilter(lambda entry: entry.levelno == logging.WARNING)  # errors are printed as one line each
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    handler = logging.FileHandler(run_dir.inside("train.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.addHandler(terminal)
    level = root.level
    raise_exceptions = logging.raiseExceptions
    logging.raiseExceptions = False  # a full disk is reported once, by the code that needs it
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        logging.raiseExceptions = raise_exceptions
        root.removeHandler(handler)
        root.removeHandler(terminal)
        handler.close()


@dataclass(frozen=True)
class RunLabels:
    """What a run is listed by; the values themselves, where the stored config may hold references to them."""

    model: str
    data: str
    seed: int
    experiment: str
    log_model: bool


def initial_summary(run_id: str, labels: RunLabels) -> JsonObject:
    """The summary of a run that has not started training."""
    return {
        "status": "failed",
        "run_id": run_id,
        "model": labels.model,
        "data": labels.data,
        "seed": labels.seed,
        "epochs": 0,
        "steps": 0,
        "steps_executed": 0,
    }


def write_run_json(run_dir: RunDir, stored: JsonObject, labels: RunLabels, config_changes: list[JsonObject]) -> None:
    """Writes run.json and the config as typed; when resuming, the resolved config and the accepted changes.

    stored: the config without secrets.
    """
    (run_dir.path / "summary.json").unlink(missing_ok=True)  # it describes an earlier attempt
    if (run_dir.path / "run.json").exists():
        write_resolved_config(run_dir, stored)
        identity = run_dir.identity()
        updates = {"changes": identity["changes"] + config_changes, "log_model": labels.log_model}
        run_dir.write_json("run.json", identity | updates)
        return
    (run_dir.path / "params.json").unlink(missing_ok=True)
    run_dir.write_yaml("config.yaml", stored)
    typed = flatten(stored)
    command = composition.minimal_command(typed)
    identity = {
        "format_version": RUN_FORMAT_VERSION,
        "run_id": run_dir.run_id,
        "experiment": labels.experiment,
        "name": run_name(run_dir.trial_label(), labels.model, labels.seed),
        "time": time.time(),
        "tags": {
            **environment.tags(ROOT),
            "model": labels.model,
            "data": labels.data,
            "seed": str(labels.seed),
            "group": variant_id(typed),
            **environment.command_note(command),
            "run_dir": stored["run_dir"] or str(run_dir.path),
            **({"sweep": run_dir.sweep_id()} if run_dir.sweep_id() else {}),
        },
        "log_model": labels.log_model,
        "requirements": environment.requirements(MODEL_PACKAGES),
        "typed": typed,
        "command": command,
        "changes": [],
    }
    run_dir.write_json("run.json", identity)


def run_name(trial_label: str | None, model: str, seed: int) -> str:
    """The name in MLflow's lists: what distinguishes the run from those it is likely to be listed with."""
    if trial_label is None:
        return f"{model} seed {seed}"
    return trial_label.replace("model=", "") if "model=" in trial_label else f"{model} {trial_label}"


def write_resolved_config(run_dir: RunDir, stored: JsonObject) -> None:
    """Writes the config with every `auto` resolved; params.json keeps the first attempt's, as MLflow requires."""
    run_dir.write_yaml("config.yaml", stored)
    if not (run_dir.path / "params.json").exists():
        run_dir.write_json("params.json", flatten(stored))


def run_provenance(
    stored: JsonObject, backend: str, fingerprint: str, processor: str, input_digests: dict[str, str]
) -> JsonObject:
    """Everything that a run's bits depend on, by key; `train.config.compatibility.IGNORED_KEYS` do not change any."""
    return {
        **flatten(stored),
        **input_digests,
        "data_fingerprint": fingerprint,
        "processor": processor,
        "code": environment.source_hash(ROOT / "train"),
        **environment.versions(backend),
    }


def write_batch_image(run_dir: RunDir, images: np.ndarray) -> None:
    """Writes `augmented.png`: up to 8 x 8 examples of the first training batch, as the network sees them.

    images: uint8 or float32 [N, S, S, C] in 0..255.
    """
    from PIL import Image

    shown = np.rint(images[:64]).astype(np.uint8)
    count, side, _, channels = shown.shape
    columns = min(8, count)
    rows = -(-count // columns)
    sheet = np.full((rows * columns, side + GAP, side + GAP, channels), 255, np.uint8)
    sheet[:count, :side, :side] = shown
    sheet = sheet.reshape(rows, columns, side + GAP, side + GAP, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (side + GAP), columns * (side + GAP), channels)[:-GAP, :-GAP]
    scale = max(1, SHEET_PIXELS // sheet.shape[1])
    image = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    data = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(data, "PNG")
    write_atomically(run_dir.path / "augmented.png", data.getvalue())


def report_failure(error: Exception, run_dir: RunDir | None, redactor: Redactor) -> int:
    """Prints a failure as one line, with the traceback in train.log; returns exit code 2 for invalid input, else 1.

    A ValueError raised by this project is about the input. Any other type is a defect, and its traceback is printed
    too. run_dir: None in a worker, which writes nothing.
    """
    trace = redactor.redact("".join(traceback.format_exception(error)))
    if run_dir:
        log.error("the run failed\n%s", trace)
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "train")
    if is_ours and isinstance(error, ValueError | ArithmeticError | ConnectionError):
        code = arguments.print_error(redactor.redact(str(error)))
        return code if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        run_argument = f" run={shlex.quote(str(run_dir.path))}" if run_dir else ""
        target = error.filename or (run_dir.path if run_dir else "the disk")  # the data cache may have its own disk
        arguments.print_error(
            f"cannot write {target} ({error.strerror}); {_remedy(error)}, then run make resume{run_argument}"
        )
        return 1
    print(trace, file=sys.stderr)
    arguments.print_error(
        f"unexpected {type(error).__name__}; full traceback "
        + (f"in {run_dir.path / 'train.log'}" if run_dir else "above")
    )
    return 1


def _remedy(error: OSError) -> str:
    return "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"


def write_summary(run_dir: RunDir, summary: JsonObject) -> int:
    """Writes summary.json, the last file of a run, which marks its end; returns exit code 0, or 1 if that fails."""
    summary["time"] = time.time()
    try:
        if not (run_dir.path / "params.json").exists():  # the run ended before its config was resolved
            stored = yaml.safe_load((run_dir.path / "config.yaml").read_text())
            run_dir.write_json("params.json", flatten(stored))
        run_dir.write_json("summary.json", summary)
    except OSError as error:
        arguments.print_error(
            f"cannot write the summary to {run_dir.path} ({error.strerror}); {_remedy(error)}, then run "
            f"make resume run={quote_path(run_dir.path)}"
        )
        return 1
    return 0


def format_summary(summary: JsonObject, run_dir: RunDir) -> str:
    """The summary as one line of `key=value`, the run folder last."""
    figures = {name: summary[name] for name in ("status", "model", "data", "seed", "epochs", "steps")}
    if summary.get("test"):
        figures |= {"test_accuracy": f"{summary['test']['accuracy']:.4f}", "test_examples": summary["test"]["examples"]}
    if summary.get("validation"):
        figures["validation_accuracy"] = f"{summary['validation']['accuracy']:.4f}"
    for name in ("parameters", "macs"):
        if name in summary:
            figures[name] = summary[name]
    if summary.get("attempts", 1) > 1:
        figures |= {"attempts": summary["attempts"], "steps_executed": summary["steps_executed"]}
    if summary.get("train_images_per_second"):
        figures["images_per_second"] = f"{summary['train_images_per_second']:.0f}"
    return " ".join(f"{name}={value}" for name, value in figures.items()) + f" run={relative_path(run_dir.path)}"


def quote_path(path: Path) -> str:
    """The path as typed in a shell: short, and quoted if necessary."""
    return shlex.quote(str(relative_path(path)))


def relative_path(path: Path) -> Path:
    """The path relative to the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
