"""Reads run folders of format 1, which has other names for metrics and figures, and counts the best epoch from 0."""

from __future__ import annotations

from typing import Any

# Format 1 called the loss with its auxiliary terms `train/loss`.
METRICS = {
    "train/loss": "train/total_loss",
    "train/main_loss": "train/loss",
    "train/main_accuracy": "train/accuracy",
    "validation/main_accuracy": "validation/accuracy",
    "validation/main_top5_accuracy": "validation/top5_accuracy",
    "best/validation_main_accuracy": "best/validation_accuracy",
}


def current_metrics(values: dict[str, float]) -> dict[str, float]:
    """Values of a journal line, or a run's metrics in MLflow, by today's names."""
    return {METRICS.get(name, name): value for name, value in values.items()}


def current_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """summary.json in today's form. The loss of the best weights on validation was not kept."""
    found = {{"lives": "attempts"}.get(name, name): value for name, value in summary.items() if name != "best"}
    if best := summary.get("best"):
        found |= {"best_epoch": best["epoch"] + 1, "validation": {"accuracy": best["validation_main_accuracy"]}}
    return found


def current_model_info(model_info: dict[str, Any]) -> dict[str, Any]:
    """best/model.json in today's form."""
    if "validation_main_accuracy" not in model_info:
        return model_info
    found = {name: value for name, value in model_info.items() if name != "validation_main_accuracy"}
    accuracy = {"accuracy": model_info["validation_main_accuracy"]}
    return found | {"epoch": model_info["epoch"] + 1, "validation": accuracy}


def current_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.yaml with today's name of the metric that early stopping watches."""
    rule = config.get("early_stopping", {})
    return config | {"early_stopping": rule | {"metric": METRICS.get(rule.get("metric"), rule.get("metric"))}}
