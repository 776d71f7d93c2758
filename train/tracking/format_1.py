"""Converts run folders of format 1, which named metrics and figures differently and counted the best epoch from 0."""

from __future__ import annotations

from train.storage.json_types import JsonObject

# In format 1, `train/loss` included the auxiliary terms.
METRICS = {
    "train/loss": "train/total_loss",
    "train/main_loss": "train/loss",
    "train/main_accuracy": "train/accuracy",
    "validation/main_accuracy": "validation/accuracy",
    "validation/main_top5_accuracy": "validation/top5_accuracy",
    "best/validation_main_accuracy": "best/validation_accuracy",
}


def current_metrics(values: dict[str, float]) -> dict[str, float]:
    """The values of a journal line, or of a run's metrics in MLflow, under today's names."""
    return {METRICS.get(name, name): value for name, value in values.items()}


def current_summary(summary: JsonObject) -> JsonObject:
    """summary.json in today's form. Format 1 did not store the validation loss of the best weights."""
    converted = {{"lives": "attempts"}.get(name, name): value for name, value in summary.items() if name != "best"}
    if best := summary.get("best"):
        converted |= {"best_epoch": best["epoch"] + 1, "validation": {"accuracy": best["validation_main_accuracy"]}}
    return converted


def current_model_info(model_info: JsonObject) -> JsonObject:
    """best/model.json in today's form."""
    if "validation_main_accuracy" not in model_info:
        return model_info
    converted = {name: value for name, value in model_info.items() if name != "validation_main_accuracy"}
    validation = {"accuracy": model_info["validation_main_accuracy"]}
    return converted | {"epoch": model_info["epoch"] + 1, "validation": validation}


def current_config(config: JsonObject) -> JsonObject:
    """config.yaml with the early-stopping metric renamed, but for `train/loss`: its new name is no choice there."""
    rule = config.get("early_stopping")
    if not isinstance(rule, dict) or rule.get("metric") not in METRICS.keys() - {"train/loss"}:
        return config
    return config | {"early_stopping": rule | {"metric": METRICS[rule["metric"]]}}
