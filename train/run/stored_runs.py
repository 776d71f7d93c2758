"""A stored run, opened again to be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from train.config import composition
from train.config.schema import Config, Data, Distributed
from train.tracking.run_dir import RunFolder


def config_of(folder: RunFolder, card: dict[str, Any], words: list[str]) -> tuple[Config, bool]:
    """The run's config with these words in it, images as its network wants them; and whether it is about other data."""
    stored = folder.config()
    stored["tracking"]["uri"] = None  # not needed to measure; see `address.of_run`
    chosen = [word for word in words if word.startswith("data=")]
    about = [word for word in words if word.startswith(("data=", "data."))]
    elsewhere = bool(chosen) or any(word.startswith(("data.root=", "data.file=")) for word in words)
    if chosen:
        data: Data = composition.compose([f"model={stored['model']['name']}", *about]).data
        stored["data"] = vars(data)
        words = [word for word in words if word not in about]
    config = composition.to_config(composition.stored(stored, words), stored=True)
    side, _, channels = card["input"]["shape"]
    fingerprint = None if elsewhere else card["data_fingerprint"]
    config.data = replace(config.data, image_size=side, channels=channels, fingerprint=fingerprint)
    config.devices, config.distributed = "1", Distributed()  # which are for training
    if elsewhere:
        config.data.train_per_class = None  # which is said of the run's own
    return config, elsewhere
