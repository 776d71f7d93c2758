"""What a run records of its data, its models and its training: the contents of its JSON files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from train.storage.json_types import JsonObject
from train.training.loop import Progress

if TYPE_CHECKING:  # Keras is imported by prepare_runtime, once its settings are known
    import keras

    from train.data.dataset import Dataset


def data_source(stored_data: JsonObject) -> str:
    """The path or name that the data was loaded from. stored_data: the group `data` of the stored config."""
    return next(stored_data[name] for name in ("file", "root", "manual_dir", "name") if stored_data.get(name))


def describe_data(dataset: Dataset, source: str) -> JsonObject:
    """dataset.json."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "source": source,
        "splits": {name: split.digest for name, split in dataset.splits.items()},
        "counts": dataset.split_sizes,
        "classes": list(dataset.classes),
        "class_counts": dataset.class_counts,
        "skipped": [{"name": name, "problem": problem} for name, problem in dataset.skipped],
        "leaks": dataset.leak_counts,
    }


def describe_cost(model: keras.Model, inference: keras.Model) -> JsonObject:
    """cost.json: inference cost per image by block and by layer, and the multiply-accumulates of the training model."""
    from train.models.cost import block_costs, layer_macs, total_cost

    layers = {layer.name: macs for layer in inference.layers if (macs := layer_macs(layer))}
    return {
        "blocks": [vars(row) for row in block_costs(inference)],
        "layers": layers,
        "training_macs": total_cost(model).macs,
    }


def describe_layers(model: keras.Model) -> str:
    """model_summary.txt: Keras's table of layers."""
    lines: list[str] = []
    model.summary(line_length=120, print_fn=lambda line, **_: lines.append(line))
    return "\n".join(lines) + "\n"


def input_example(dataset: Dataset) -> bytes:
    """input_example.npy: the first validation image, uint8 [1, S, S, C]."""
    buffer = io.BytesIO()
    np.save(buffer, dataset.validation.load_example(0)[None])
    return buffer.getvalue()


def summarize_model(model: keras.Model, inference: keras.Model, cost: JsonObject) -> JsonObject:
    """The part of the summary about the models. cost: `describe_cost` of the same ones."""
    return {
        "parameters": inference.count_params(),
        "macs": sum(row["macs"] for row in cost["blocks"]),
        "training_parameters": model.count_params(),
        "training_macs": cost["training_macs"],
    }


def summarize_training(progress: Progress) -> JsonObject:
    """The part of the summary about the training loop."""
    summary: JsonObject = {
        "epochs": progress.epoch,
        "steps": progress.steps,
        "rollbacks": progress.rollbacks,
        "stopped_early": progress.stopped_early,
        "train_images_per_second": progress.timer.images_per_second(),
        "data_wait_fraction": progress.timer.data_wait_fraction(),
    }
    if progress.best_epoch >= 0:
        summary["best_epoch"] = progress.best_epoch + 1
        summary["validation"] = {"accuracy": progress.best_accuracy, "loss": progress.best_loss}
    return summary
