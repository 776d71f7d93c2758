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


def checked(node: DictConfig) -> Config:
    """The config as dataclasses, after every check that needs no TensorFlow."""
    config = compose.to_config(node)
    places = {name: getattr(config.data, name) for name in ("root", "manual_dir") if hasattr(config.data, name)}
    data.check(config.data.name, data_dir=str(ROOT / config.data.directory), **places)
    return config


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def compose_and_run(node: DictConfig) -> None:
    config = checked(node)
    if CHECK in words:
        return
    from train import run

    alone = HydraConfig.get().mode != RunMode.MULTIRUN
    code = run.train(config, compose.references(node), latest=alone)
    if code:
        sys.exit(code)


def main() -> None:
    """Exit codes: 0 finished, 1 failed, 2 what was typed can't be run, 130 and 143 interrupted."""
    words[:] = sys.argv[1:]
    sys.argv[1:] = [word for word in words if word != CHECK]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing several lines and leaving
    compose.register()
    try:
        compose_and_run()
    except ConfigError as fault:
        sys.exit(_say(str(fault)))
    except compose.FAULTS as fault:
        sys.exit(_say(compose.explain(fault, sys.argv[1:])))
    except ValueError as fault:
        sys.exit(_say(str(fault)))
    if CHECK in words:
        print("the config is valid")


def _say(line: str) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
