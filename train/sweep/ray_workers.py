"""Trials as tasks of a Ray cluster, or of a local Ray where there is none: `sweep.engine=ray`, with the extra `ray`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from train.config.schema import ROOT, ConfigError
from train.sweep.workers import ADDRESS


def check() -> None:
    """Raises: ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("sweep.engine=ray must have Ray, got none; use pip install ray in the environment (.venv)")


def launch(jobs: list[list[str]], first: int, folder: str, *, cores: int) -> None:
    """Runs `python -m train WORDS` for each job, on `cores` of the cluster and one GPU where it has any.

    What number N prints goes to <folder>/N.txt. The cluster is that of RAY_ADDRESS; all its machines see the project
    and the sweep's folder under the same paths.
    """
    import ray

    Path(folder).mkdir(parents=True, exist_ok=True)
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(run).options(num_cpus=cores, num_gpus=gpus, max_retries=0)
        outputs = [str(Path(folder) / f"{first + number}.txt") for number in range(len(jobs))]
        known = {name: os.environ[name] for name in (ADDRESS,) if name in os.environ}
        ray.get([task.remote(words, output, known) for words, output in zip(jobs, outputs, strict=True)])
    finally:
        ray.shutdown()


def run(words: list[str], output: str, variables: dict[str, str]) -> int:
    """One trial, in a process of its own: Ray's own one stays what it is. Its exit code."""
    command, environment = [sys.executable, "-m", "train", *words], {**os.environ, **variables}
    with Path(output).open("ab") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
