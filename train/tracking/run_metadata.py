"""What a run writes down about itself, from its first moment to its last."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train.cli import arguments
from train.config import composition
from train.config.schema import ROOT, Config
from train.config.serialization import RUN_FORMAT_VERSION, Redactor, config_hash, flatten, to_dict, variant_id
from train.storage.atomic import write_atomically
from train.tracking import environment
from train.tracking.run_dir import Heartbeat, RunDir

log = logging.getLogger(__name__)

GAP = 2  # pixels between the examples of a sheet
SHEET_PIXELS = 800  # small examples are shown larger, to about this width

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# The inference model needs these to be loaded; named, because MLflow takes long to find them out.
MODEL_PACKAGES = ("tensorflow", "keras", "numpy")


@contextmanager
def log_to_file(folder: RunDir) -> Iterator[None]:
    """What is logged goes into the run's train.log, and this project's own warnings to the terminal, too."""
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(logging.Filter("train"))
    terminal.addFilter(lambda entry: entry.levelno == logging.WARNING)  # errors are told in one line of their own
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    handler = logging.FileHandler(folder.inside("train.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.addHandler(terminal)
    level, loud = root.level, logging.raiseExceptions
    logging.raiseExceptions = False  # a full disk is told in one line, by whoever can't do without it
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        logging.raiseExceptions = loud
        root.removeHandler(handler)
        root.removeHandler(terminal)
        handler.close()


def initial_summary(folder: RunDir, config: Config) -> dict[str, Any]:
    """The summary of a run that has done nothing yet."""
    return {
        "status": "failed",
        "run_id": folder.run_id,
        "model": config.model.name,
        "data": config.data.name,
        "seed": config.seed,
        "epochs": 0,
        "steps": 0,
        "steps_executed": 0,
    }


def write_run_json(folder: RunDir, config: Config, redactor: Redactor, config_changes: list[dict[str, Any]]) -> None:
    """Writes run.json and the config as it was typed; for a run that goes on, what was changed on the way."""
    (folder.path / "summary.json").unlink(missing_ok=True)  # it told of a life that is no longer the last
    if (folder.path / "run.json").exists():
        write_resolved_config(folder, config, redactor)
        identity = folder.identity()
        now = {"changes": identity["changes"] + config_changes, "log_model": config.tracking.log_model}
        folder.write_json("run.json", identity | now)
        return
    (folder.path / "params.json").unlink(missing_ok=True)
    stored = to_dict(config, redactor)
    folder.write_yaml("config.yaml", stored)
    typed = flatten(stored)
    again = composition.minimal_command(typed)
    identity = {
        "format_version": RUN_FORMAT_VERSION,
        "run_id": folder.run_id,
        "experiment": config.tracking.experiment,
        "name": run_name(folder, config),
        "time": time.time(),
        "tags": {
            **environment.tags(ROOT),
            "model": config.model.name,
            "data": config.data.name,
            "seed": str(config.seed),
            "group": variant_id(typed),
            **environment.command_note(again),
            "run_dir": stored["run_dir"] or str(folder.path),
            **({"sweep": folder.sweep_id()} if folder.sweep_id() else {}),
        },
        "log_model": config.tracking.log_model,
        "requirements": environment.requirements(MODEL_PACKAGES),
        "typed": typed,
        "command": again,
        "changes": [],
    }
    folder.write_json("run.json", identity)


def run_name(folder: RunDir, config: Config) -> str:
    """What a person reads in MLflow's lists: what tells runs apart that are likely to stand side by side."""
    label = folder.trial_label()
    if label is None:
        return f"{config.model.name} seed {config.seed}"
    return label.replace("model=", "") if "model=" in label else f"{config.model.name} {label}"


def write_resolved_config(folder: RunDir, config: Config, redactor: Redactor) -> None:
    """The config with every `auto` filled in. MLflow's parameters can't change: they stay those of the first life."""
    stored = to_dict(config, redactor)
    folder.write_yaml("config.yaml", stored)
    if not (folder.path / "params.json").exists():
        folder.write_json("params.json", flatten(stored))


def run_provenance(
    config: Config, redactor: Redactor, fingerprint: str, processor: str, input_digests: dict[str, str]
) -> dict[str, Any]:
    """All that the bits of a run depend on, by name; keys that change no bit: `train.config.compatibility.FREE`."""
    return {
        **flatten(to_dict(config, redactor)),
        **input_digests,
        "data_fingerprint": fingerprint,
        "processor": processor,
        "code": environment.source_hash(ROOT / "train"),
        **environment.versions(config.backend),
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_metadata(
    folder: RunDir,
    summary: dict[str, Any],
    config: Config,
    redactor: Redactor,
    dataset: Any,
    source: str,
    model: Any,
    inference: Any,
    cost: dict[str, Any],
) -> None:
    """The data set's digest, the network's size, its summary as text, what it costs, and an example of its input.

    cost: `blocks`, rows of train.models.cost, and `training_macs`.
    """
    summary |= {
        "config_hash": config_hash(config, redactor),
        "data_fingerprint": dataset.fingerprint,
        "parameters": inference.count_params(),
        "macs": sum(row["macs"] for row in cost["blocks"]),
        "training_parameters": model.count_params(),
        "training_macs": cost["training_macs"],
    }
    folder.write_json("cost.json", cost)
    stored = to_dict(config, redactor)
    stored["data"]["fingerprint"] = dataset.fingerprint
    folder.write_yaml("config.yaml", stored)
    folder.write_json(
        "dataset.json",
        {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "source": source,
            "splits": {name: split.digest for name, split in dataset.splits.items()},
            "counts": dataset.split_sizes,
            "classes": list(dataset.classes),
            "class_counts": dataset.class_counts,
            "skipped": [{"name": name, "problem": why} for name, why in dataset.skipped],
            "leaks": dataset.leak_counts,
        },
    )
    lines: list[str] = []
    model.summary(line_length=120, print_fn=lambda line, **_: lines.append(line))
    folder.write_text("model_summary.txt", "\n".join(lines) + "\n")
    example = io.BytesIO()
    np.save(example, dataset.validation.load_example(0)[None])
    write_atomically(folder.path / "input_example.npy", example.getvalue())


def write_batch_image(folder: RunDir, images: np.ndarray, mixed: bool) -> None:
    """The first training batch as the network sees it, `augmented.png`: at most 8 x 8 examples.

    images: uint8 [N, S, S, C] in 0..255, or float32 where they are `mixed`.
    """
    from PIL import Image

    shown = np.rint(images[:64]).astype(np.uint8) if mixed else images[:64]
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
    write_atomically(folder.path / "augmented.png", data.getvalue())


def update_summary(
    summary: dict[str, Any], step: Any, run_state: Any, heartbeat: Heartbeat, peak_memory_bytes: int
) -> None:
    """How far the loop came and what it cost."""
    reached = run_state.progress
    clock = reached.timer
    summary |= {
        "epochs": reached.epoch,
        "steps": reached.steps,
        "steps_executed": heartbeat.steps,
        "attempts": heartbeat.attempts,
        "rollbacks": reached.rollbacks,
        "changes": [f"{c['name']} was {c['was']}, is {c['is']}" for c in run_state.folder.identity()["changes"]],
        "stopped_early": reached.stopped_early,
        "train_images_per_second": clock.images_per_second(),
        "data_wait_fraction": clock.data_wait_fraction(),
        "checkpoint_stall_seconds": run_state.checkpoints.stall_seconds,
        "peak_memory_bytes": peak_memory_bytes,
    }
    if reached.best_epoch >= 0:
        summary["best_epoch"] = reached.best_epoch + 1
        summary["validation"] = {"accuracy": reached.best_accuracy, "loss": reached.best_loss}
    summary["weights_sha256"] = step.weights_sha256()  # can't be read where a process of several is gone


def report_failure(error: Exception, folder: RunDir | None, redactor: Redactor) -> int:
    """Tells a failure in one line, with the traceback in train.log; exit code 2 where the input was at fault.

    A ValueError that the project itself raised is about the input. Anything else is a defect, and its traceback is
    shown. folder: None in a process that writes nothing.
    """
    trace = redactor.redact("".join(traceback.format_exception(error)))
    if folder:
        log.error("the run failed\n%s", trace)
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "train")
    if ours and isinstance(error, ValueError | ArithmeticError | ConnectionError):
        code = arguments.print_error(redactor.redact(str(error)))
        return code if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        where = f" run={shlex.quote(str(folder.path))}" if folder else ""
        place = error.filename or (folder.path if folder else "the disk")  # prepared data may lie on one of its own
        arguments.print_error(f"{place} can't be written ({error.strerror}); mend that, then: make resume{where}")
        return 1
    print(trace, file=sys.stderr)
    arguments.print_error(
        f"{type(error).__name__}; the whole story is in {folder.path / 'train.log' if folder else 'the lines above'}"
    )
    return 1


def write_summary(folder: RunDir, summary: dict[str, Any]) -> int:
    """The last thing that a run writes; whoever finds it knows that the run has ended. 0, or 1 where it is not."""
    summary["time"] = time.time()
    try:
        if not (folder.path / "params.json").exists():  # it ended before its config was settled
            stored = yaml.safe_load((folder.path / "config.yaml").read_text())
            folder.write_json("params.json", flatten(stored))
        folder.write_json("summary.json", summary)
    except OSError as fault:
        arguments.print_error(
            f"the summary could not be written to {folder.path} ({fault.strerror}); mend that, then: make resume"
        )
        return 1
    return 0


def format_summary(summary: dict[str, Any], folder: RunDir) -> str:
    """The summary as `key=value` words, the folder last."""
    words = {name: summary[name] for name in ("status", "model", "data", "seed", "epochs", "steps")}
    if summary.get("test"):
        words |= {"test_accuracy": f"{summary['test']['accuracy']:.4f}", "test_examples": summary["test"]["examples"]}
    if summary.get("validation"):
        words["validation_accuracy"] = f"{summary['validation']['accuracy']:.4f}"
    for name in ("parameters", "macs"):
        if name in summary:
            words[name] = summary[name]
    if summary.get("attempts", 1) > 1:
        words |= {"attempts": summary["attempts"], "steps_executed": summary["steps_executed"]}
    if summary.get("train_images_per_second"):
        words["images_per_second"] = f"{summary['train_images_per_second']:.0f}"
    return " ".join(f"{name}={value}" for name, value in words.items()) + f" run={relative_path(folder.path)}"


def quote_path(path: Path) -> str:
    """As one types it in a shell: short, and quoted where it has to be."""
    return shlex.quote(str(relative_path(path)))


def relative_path(path: Path) -> Path:
    """Relative to where one stands, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
