"""Opens a stored run for evaluation."""

from __future__ import annotations

from dataclasses import replace

from train.cli.arguments import Override
from train.config import composition
from train.config.schema import Config, Data, Distributed
from train.storage.json_types import JsonObject
from train.tracking.run_dir import RunDir


def evaluation_config(run_dir: RunDir, model_info: JsonObject, overrides: list[Override]) -> tuple[Config, bool]:
    """The run's config with overrides applied, images as its model takes them; and whether it names other data."""
    stored = run_dir.config()
    stored["tracking"]["uri"] = None  # not needed to evaluate
    data_overrides = [override for override in overrides if override.key.partition(".")[0] == "data"]
    data_keys = {override.key for override in data_overrides}
    names_dataset = "data" in data_keys
    is_other_data = bool(data_keys & {"data", "data.root", "data.file"})
    if names_dataset:
        data: Data = composition.compose([f"model={stored['model']['name']}", *map(str, data_overrides)]).data
        stored["data"] = vars(data)
        overrides = [override for override in overrides if override not in data_overrides]
    node = composition.from_stored(stored, list(map(str, overrides)), command_keys=("run", "split"))
    config = composition.to_config(node, is_stored=True)
    side, _, channels = model_info["input"]["shape"]
    fingerprint = None if is_other_data else model_info["data_fingerprint"]
    config.data = replace(config.data, image_size=side, channels=channels, fingerprint=fingerprint)
    config.devices = "1"  # like `distributed`, for training only
    config.distributed = Distributed()
    if is_other_data:
        config.data.train_per_class = None  # applies to the run's own data
    return config, is_other_data
