"""`python -m train key=value ...`: compose the config, check it, hand it over.

TensorFlow is imported only after everything that was typed has been found right.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from train import command, compose
from train.config import ROOT, ConfigError
from train.tracking.folder import open_folder

CHECK = "--check"
words: list[str] = []  # as they were typed
codes: list[int] = []  # how each run ended; a sweep has several


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """One run. Its faults end here, since Hydra would tell them in several lines and stop a sweep at the first."""
    try:
        codes.append(run(node))
    except ValueError as fault:
        codes.append(command.tell(str(fault)))
    if codes[-1] > 128:  # somebody wants to stop: a sweep, too
        sys.exit(codes[-1])


def run(node: DictConfig) -> int:
    """Every check that needs no TensorFlow, then the run itself; its exit code."""
    private = compose.private(node)
    try:
        config = compose.to_config(node)
        from train import resume  # imported late: a mistake in what was typed is answered at once
        from train import run as story

        story.check_files(config)
    except ValueError as fault:
        raise ConfigError(private.hide(str(fault))) from None
    if CHECK in words:
        return 0
    if config.run_dir and (Path(config.run_dir) / "run.json").exists():
        return resume.train_again(open_folder(Path(config.run_dir)), config, private)
    return story.train(config, private, latest=HydraConfig.get().mode != RunMode.MULTIRUN)


def main() -> None:
    """Exit codes: 0 finished, 1 failed, 2 what was typed can't be run, 130 and 143 interrupted."""
    words[:] = sys.argv[1:]
    sys.argv[1:] = [word for word in words if word != CHECK]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing several lines and leaving
    compose.register()
    try:
        with sweep_folder():
            compose_and_run()
    except compose.FAULTS as fault:
        codes.append(command.tell(compose.explain(fault, words)))
    except KeyboardInterrupt:  # before the run took the signals over
        codes.append(130)
    if CHECK in words and not any(codes):
        print("the config is valid")
    sys.exit(max(codes, default=0))


@contextmanager
def sweep_folder() -> Iterator[None]:
    """A place, for as long as a sweep goes on, where Hydra writes all its words, passwords too."""
    if not {"-m", "--multirun"} & set(words):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        sys.argv.append(f"hydra.sweep.dir={place}")
        yield


if __name__ == "__main__":
    main()
