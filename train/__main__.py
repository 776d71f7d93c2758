"""`python -m train key=value ...`: compose the config, check it, hand it over.

TensorFlow is imported only after everything that was typed has been found right.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from train import compose, data
from train.config import ROOT, Config, ConfigError

CHECK = "--check"
words: list[str] = []  # as they were typed
codes: list[int] = []  # how each run ended; a sweep has several


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """One run. Its faults end here, since Hydra would tell them in several lines and stop a sweep at the first."""
    try:
        codes.append(run(node))
    except ValueError as fault:
        codes.append(say(fault))


def run(node: DictConfig) -> int:
    """Every check that needs no TensorFlow, then the run itself; its exit code."""
    references = compose.references(node)
    try:
        config = compose.to_config(node)
        check_data(config)
    except ValueError as fault:
        raise ConfigError(compose.hide(str(fault), node, references)) from None
    if CHECK in words:
        return 0
    from train import run as story

    return story.train(config, references, latest=HydraConfig.get().mode != RunMode.MULTIRUN)


def check_data(config: Config) -> None:
    """Folders that the data set needs."""
    places = {name: getattr(config.data, name) for name in ("root", "manual_dir") if hasattr(config.data, name)}
    data.check(config.data.name, data_dir=str(ROOT / config.data.directory), **places)


def main() -> None:
    """Exit codes: 0 finished, 1 failed, 2 what was typed can't be run, 130 and 143 interrupted."""
    words[:] = sys.argv[1:]
    sys.argv[1:] = [word for word in words if word != CHECK]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing several lines and leaving
    compose.register()
    try:
        compose_and_run()
    except compose.FAULTS as fault:
        codes.append(say(ValueError(compose.explain(fault, words))))
    if CHECK in words and not any(codes):
        print("the config is valid")
    sys.exit(max(codes, default=0))


def say(fault: ValueError) -> int:
    print(f"error: {' '.join(str(fault).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
