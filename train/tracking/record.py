"""What a run writes down about itself, from its first moment to its last."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from train import command
from train import config as schema
from train.config import ROOT, Config, Private
from train.tracking import facts
from train.tracking.folder import RunFolder

log = logging.getLogger(__name__)

# The inference model needs these to be loaded; named, because MLflow takes long to find them out.
MODEL_PACKAGES = ("tensorflow", "keras", "numpy")


@contextmanager
def log_file(folder: RunFolder) -> Iterator[None]:
    """What is logged goes into the run's train.log, and this project's own warnings to the terminal, too."""
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.addFilter(logging.Filter("train"))
    terminal.addFilter(lambda entry: entry.levelno == logging.WARNING)  # errors are told in one line of their own
    terminal.setFormatter(logging.Formatter("warning: %(message)s"))
    handler = logging.FileHandler(folder.path / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.addHandler(terminal)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        root.removeHandler(terminal)
        handler.close()


def begin(folder: RunFolder, config: Config) -> dict[str, Any]:
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


def identify(folder: RunFolder, config: Config, private: Private) -> None:
    """Writes run.json and the config as it was typed."""
    stored = schema.to_dict(config, private)
    folder.write_yaml("config.yaml", stored)
    identity = {
        "run_id": folder.run_id,
        "experiment": config.tracking.experiment,
        "name": f"{config.model.name} seed {config.seed}",
        "time": time.time(),
        "tags": {
            **facts.tags(ROOT),
            "model": config.model.name,
            "data": config.data.name,
            "seed": str(config.seed),
            "run_dir": stored["run_dir"] or str(folder.path),
        },
        "log_model": config.tracking.log_model,
        "requirements": facts.requirements(MODEL_PACKAGES),
    }
    folder.write_json("run.json", identity)


def settle(folder: RunFolder, summary: dict[str, Any], config: Config, private: Private) -> None:
    """The config with every `auto` filled in."""
    stored = schema.to_dict(config, private)
    summary["config_hash"] = schema.config_hash(config, private)
    folder.write_yaml("config.yaml", stored)
    folder.write_json("params.json", schema.flatten(stored))


def describe(
    folder: RunFolder,
    summary: dict[str, Any],
    dataset: Any,
    source: str,
    model: Any,
    inference: Any,
    macs: dict[str, int],
) -> None:
    """The data set's digest, the network's size, its summary as text, and one example of its input."""
    summary |= {
        "data_fingerprint": dataset.fingerprint,
        "parameters": inference.count_params(),
        "macs": macs["inference"],
        "training_parameters": model.count_params(),
        "training_macs": macs["training"],
    }
    folder.write_json(
        "dataset.json",
        {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "source": source,
            "counts": dataset.counts,
            "classes": list(dataset.classes),
        },
    )
    lines: list[str] = []
    model.summary(line_length=120, print_fn=lambda line, **_: lines.append(line))
    folder.write_text("model_summary.txt", "\n".join(lines) + "\n")
    np.save(folder.path / "input_example.npy", dataset.validation.example(0)[None])


def progress(summary: dict[str, Any], outcome: Any, weights_sha256: str, peak_memory_bytes: int) -> None:
    """How far the loop came and what it cost."""
    summary |= {
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "steps_executed": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "train_images_per_second": outcome.clock.images_per_second(),
        "data_wait_fraction": outcome.clock.data_wait_fraction(),
        "peak_memory_bytes": peak_memory_bytes,
        "weights_sha256": weights_sha256,
    }
    if outcome.best_epoch >= 0:
        summary["best"] = {"epoch": outcome.best_epoch, "validation_main_accuracy": outcome.best_accuracy}


def report(fault: Exception, folder: RunFolder, private: Private) -> int:
    """Tells a failure in one line, with the traceback in train.log; exit code 2 where the input was at fault.

    A ValueError that the project itself raised is about the input. Anything else is a defect, and its traceback is
    shown.
    """
    trace = private.hide("".join(traceback.format_exception(fault)))
    log.error("the run failed\n%s", trace)
    frames = traceback.extract_tb(fault.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT / "train")
    if ours and isinstance(fault, ValueError | ArithmeticError):
        code = command.tell(private.hide(str(fault)))
        return code if isinstance(fault, ValueError) else 1
    print(trace, file=sys.stderr)
    command.tell(f"{type(fault).__name__}; the whole story is in {folder.path / 'train.log'}")
    return 1


def close(folder: RunFolder, summary: dict[str, Any]) -> None:
    """The last thing that a run writes; whoever finds it knows that the run has ended."""
    summary["time"] = time.time()
    try:
        if not (folder.path / "params.json").exists():  # it ended before its config was settled
            stored = yaml.safe_load((folder.path / "config.yaml").read_text())
            folder.write_json("params.json", schema.flatten(stored))
        folder.write_json("summary.json", summary)
    except OSError as fault:
        command.tell(f"the summary could not be written to {folder.path} ({fault.strerror}); make room there")


def one_line(summary: dict[str, Any], folder: RunFolder) -> str:
    """The summary as `key=value` words, the folder last."""
    words = {name: summary[name] for name in ("status", "model", "data", "seed", "epochs", "steps")}
    if summary.get("test"):
        words |= {"test_accuracy": f"{summary['test']['accuracy']:.4f}", "test_examples": summary["test"]["examples"]}
    if summary.get("best"):
        words["validation_accuracy"] = f"{summary['best']['validation_main_accuracy']:.4f}"
    for name in ("parameters", "macs"):
        if name in summary:
            words[name] = summary[name]
    if summary.get("train_images_per_second"):
        words["images_per_second"] = f"{summary['train_images_per_second']:.0f}"
    return " ".join(f"{name}={value}" for name, value in words.items()) + f" run={short(folder.path)}"


def short(path: Path) -> Path:
    """Relative to where one stands, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
