"""A run's report: one self-contained HTML page."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from train.config.serialization import flatten
from train.evaluation.html import render_template, to_data_uri
from train.storage.atomic import write_atomically
from train.storage.json_types import JsonObject
from train.tracking.run_dir import RunDir
from train.tracking.uploader import EVALUATION_METRICS

REPORT_FILE = "report.html"
# Plots and their captions, in the order of the page.
EVALUATION_PLOTS = {
    "confusion.png": "Confusion matrix, normalised by true class.",
    "reliability.png": "Reliability diagram: on the diagonal, confidence equals accuracy.",
    "classes.png": "F1 per class, lowest first.",
    "mistakes.png": "Most confident errors; check these for label noise first.",
    "attention.png": "Grad-CAM: the regions that support the predicted class (Selvaraju et al. 2017).",
}
RUN_PLOTS = {
    "loss.png": "Training and validation loss, with the auxiliary heads' training loss. Dotted line: the best epoch.",
    "accuracy.png": "Training accuracy, over the epoch's augmented batches; validation accuracy after each epoch.",
    "learning_rate.png": "Learning rate at every logged step.",
    "augmented.png": "The first training batch after augmentation.",
    "filters.png": "Filters of the first convolution, each scaled to its own range.",
}
MAX_TABLE_CLASSES = 50  # rows of the per-class table


def write_report(run_dir: RunDir, summary: JsonObject) -> Path:
    """Draws the learning curves and writes the page; returns its path. summary: the contents of summary.json.

    Raises: ValueError for a run whose journal has no epoch.
    """
    from train.evaluation.plots.learning_curves import plot_learning_curves
    from train.evaluation.plots.style import to_png

    lines = [line for line, _ in run_dir.read_journal()]
    if not any("validation/loss" in line["values"] for line in lines):
        raise ValueError(
            f"run {run_dir.path} has no finished epoch; run make resume run={shlex.quote(str(run_dir.path))}"
        )
    for name, curve in plot_learning_curves(lines, summary.get("best_epoch")).items():
        write_atomically(run_dir.path / f"{name}.png", to_png(curve))
    page = render_template("report.html", **report_context(run_dir, summary, lines))
    write_atomically(run_dir.path / REPORT_FILE, page)
    return run_dir.path / REPORT_FILE


# What the template shows of a summary, as far as it is known.
SUMMARY_KEYS = (
    "attempts", "best_epoch", "failure", "macs", "parameters", "peak_memory_bytes", "steps", "steps_executed",
    "train_images_per_second", "training_macs", "training_parameters", "validation",
)  # fmt: skip


def report_context(run_dir: RunDir, summary: JsonObject, lines: list[JsonObject]) -> JsonObject:
    """Collects the variables of the template."""
    identity = run_dir.identity()
    # A run that is still running, or was killed, has no summary yet.
    started = dict.fromkeys(SUMMARY_KEYS) | {"run_id": run_dir.run_id, "status": "not finished"}
    started["data"] = identity["tags"].get("data", "")
    return {
        "name": identity["name"],
        "command": identity.get("command", ""),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(identity["time"])),
        "summary": started | summary,
        "tags": identity["tags"],
        "config": flatten(run_dir.config()),
        "data": run_dir.read_json("dataset.json", {}),
        "cost": run_dir.read_json("cost.json", {}),
        "changes": summary.get("changes", []),
        "epochs": [line for line in lines if "validation/loss" in line["values"]],
        "evaluations": read_evaluations(run_dir),
        "plots": embed_plots(run_dir, "", RUN_PLOTS),
        "max_classes": MAX_TABLE_CLASSES,
        "headlines": EVALUATION_METRICS,
    }


def read_evaluations(run_dir: RunDir) -> list[JsonObject]:
    """Reads all evaluations of the run, the test split's first: name, scores and plots."""
    names = (path.parent.name for path in run_dir.path.glob("evaluation/*/scores.json"))
    return [
        {
            "name": name,
            "scores": run_dir.read_json(f"evaluation/{name}/scores.json", {}),
            "plots": embed_plots(run_dir, f"evaluation/{name}/", EVALUATION_PLOTS),
        }
        for name in sorted(names, key=lambda name: (name != "test", name))
    ]


def embed_plots(run_dir: RunDir, prefix: str, captions: dict[str, str]) -> list[dict[str, str]]:
    """Returns the plots that exist, each as a `data:` URI with its caption. prefix: the folder within the run's."""
    return [
        {"name": Path(name).stem, "caption": caption, "uri": to_data_uri(run_dir.read_bytes(prefix + name))}
        for name, caption in captions.items()
        if (run_dir.path / prefix / name).exists()
    ]
