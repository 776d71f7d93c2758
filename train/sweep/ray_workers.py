"""Trials as tasks of a Ray cluster, or of a local Ray where there is none: `sweep.engine=ray`, with the extra `ray`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from train.config.schema import ROOT, ConfigError
from train.sweep.workers import TRACKING_URI_VARIABLE


def check_installed() -> None:
    """Raises: ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("sweep.engine=ray must have Ray, got none; use pip install ray in the environment (.venv)")


def launch(trial_overrides: list[list[str]], first_number: int, folder: str, *, cores: int) -> None:
    """Runs `python -m train WORDS` for each job, on `cores` of the cluster and one GPU where it has any.

    What number N prints goes to <folder>/N.txt. The cluster is that of RAY_ADDRESS; all its machines see the project
    and the sweep's folder under the same paths.
    """
    import ray

    Path(folder).mkdir(parents=True, exist_ok=True)
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(run_trial).options(num_cpus=cores, num_gpus=gpus, max_retries=0)
        outputs = [str(Path(folder) / f"{first_number + number}.txt") for number in range(len(trial_overrides))]
        known = {name: os.environ[name] for name in (TRACKING_URI_VARIABLE,) if name in os.environ}
        ray.get([task.remote(words, output, known) for words, output in zip(trial_overrides, outputs, strict=True)])
    finally:
        ray.shutdown()


def run_trial(overrides: list[str], output_path: str, env: dict[str, str]) -> int:
    """One trial, in a process of its own: Ray's own one stays what it is. Its exit code."""
    command, environment = [sys.executable, "-m", "train", *overrides], {**os.environ, **env}
    with Path(output_path).open("ab") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
