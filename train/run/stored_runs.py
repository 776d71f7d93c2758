"""A stored run, opened again to be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from train.config import composition
from train.config.schema import Config, Data, Distributed
from train.tracking.run_dir import RunDir


def evaluation_config(folder: RunDir, model_info: dict[str, Any], overrides: list[str]) -> tuple[Config, bool]:
    """The run's config with these words in it, images as its network wants them; and whether it is about other data."""
    stored = folder.config()
    stored["tracking"]["uri"] = None  # not needed to measure; see `address.of_run`
    chosen = [word for word in overrides if word.startswith("data=")]
    about = [word for word in overrides if word.startswith(("data=", "data."))]
    elsewhere = bool(chosen) or any(word.startswith(("data.root=", "data.file=")) for word in overrides)
    if chosen:
        data: Data = composition.compose([f"model={stored['model']['name']}", *about]).data
        stored["data"] = vars(data)
        overrides = [word for word in overrides if word not in about]
    config = composition.to_config(composition.from_stored(stored, overrides), is_stored=True)
    side, _, channels = model_info["input"]["shape"]
    fingerprint = None if elsewhere else model_info["data_fingerprint"]
    config.data = replace(config.data, image_size=side, channels=channels, fingerprint=fingerprint)
    config.devices, config.distributed = "1", Distributed()  # which are for training
    if elsewhere:
        config.data.train_per_class = None  # which is said of the run's own
    return config, elsewhere
