"""Everything about a run on one page, a file that needs nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from train.config.serialization import flatten
from train.evaluation.html import render_template, to_data_uri
from train.storage.atomic import write_atomically
from train.tracking.run_dir import RunDir

REPORT_FILE = "report.html"
# Of an evaluation, in the order of the page, and what stands beside each.
EVALUATION_PLOTS = {
    "confusion.png": "Who is taken for whom. Rows are true classes; colours are shares of the row.",
    "reliability.png": "How far its confidence can be believed: on the dotted line it is right as often as it says.",
    "classes.png": "F1 of each class, the lowest first.",
    "mistakes.png": "Mistakes it was most sure of. Look here for wrong labels first.",
    "attention.png": "Where in the image the evidence for the predicted class lies (Grad-CAM, Selvaraju et al. 2017).",
}
RUN_PLOTS = {
    "loss.png": "Of training, with its auxiliary heads, and validation. The dotted line: the weights that were kept.",
    "accuracy.png": "Of training: as it went, with augmentation; of validation: after each epoch.",
    "learning_rate.png": "After every step that was logged.",
    "augmented.png": "The first batch, as the network saw it.",
    "filters.png": "Filters of the first convolution, each in its own range.",
}
HEADLINE_METRICS = (
    "accuracy",
    "top5_accuracy",
    "loss",
    "macro_f1",
    "macro_precision",
    "macro_recall",
    "roc_auc",
    "ece",
)
MAX_TABLE_CLASSES = 50  # rows of the table of classes


def write_report(folder: RunDir, summary: dict[str, Any]) -> Path:
    """Draws what the journal has, and writes the page; its path. summary: as it will be or is in summary.json.

    Raises: ValueError for a run whose journal has no epoch.
    """
    from train.evaluation.plots.learning_curves import plot_learning_curves
    from train.evaluation.plots.style import to_png

    lines = [line for line, _ in folder.read_journal()]
    if not any("validation/loss" in line["values"] for line in lines):
        raise ValueError(f"run must have trained for an epoch, got {folder.path}; go on with it: make resume run=...")
    for name, curve in plot_learning_curves(lines, summary.get("best_epoch")).items():
        write_atomically(folder.path / f"{name}.png", to_png(curve))
    write_atomically(
        folder.path / REPORT_FILE, render_template("report.html", **report_context(folder, summary, lines))
    )
    return folder.path / REPORT_FILE


def report_context(folder: RunDir, summary: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page is made of."""
    identity = folder.identity()
    return {
        "name": identity["name"],
        "command": identity.get("command", ""),
        "begun": time.strftime("%Y-%m-%d %H:%M", time.localtime(identity["time"])),
        "summary": summary,
        "tags": identity["tags"],
        "config": flatten(folder.config()),
        "data": folder.read_json("dataset.json", {}),
        "cost": folder.read_json("cost.json", {}),
        "changes": summary.get("changes", []),
        "epochs": [line for line in lines if "validation/loss" in line["values"]],
        "evaluations": read_evaluations(folder),
        "pictures": embed_plots(folder, "", RUN_PLOTS),
        "most_classes": MAX_TABLE_CLASSES,
        "headlines": HEADLINE_METRICS,
    }


def read_evaluations(folder: RunDir) -> list[dict[str, Any]]:
    """Every one there is: its name, scores and pictures; the test first."""
    found = (path.parent for path in folder.path.glob("evaluation/*/scores.json"))
    places = sorted(found, key=lambda place: (place.name != "test", place.name))
    return [
        {
            "name": place.name,
            "scores": folder.read_json(f"evaluation/{place.name}/scores.json", {}),
            "pictures": embed_plots(folder, f"evaluation/{place.name}/", EVALUATION_PLOTS),
        }
        for place in places
    ]


def embed_plots(folder: RunDir, prefix: str, captions: dict[str, str]) -> list[dict[str, str]]:
    """The pictures that exist, each with its caption and a `data:` address. prefix: of their names in the folder."""
    return [
        {"name": Path(name).stem, "text": text, "address": to_data_uri(folder.read_bytes(prefix + name))}
        for name, text in captions.items()
        if (folder.path / prefix / name).exists()
    ]
