"""Trials as tasks of a Ray cluster, or of a local Ray without one: `sweep.engine=ray`, which needs the extra `ray`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from train.config.schema import ROOT, ConfigError
from train.sweep.workers import TRACKING_URI_VARIABLE


def check_installed() -> None:
    """Raises: ConfigError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "sweep.engine=ray needs Ray, which is not installed; install the extra: .venv/bin/python -m uv pip install "
            "--python .venv/bin/python -r requirements/ray.lock"
        )


def launch(trial_overrides: list[list[str]], first_number: int, folder: str, *, cores: int) -> None:
    """Runs `python -m train OVERRIDES` for each trial on `cores` cores of the cluster, and on one GPU if it has any.

    The output of trial N goes to <folder>/N.txt. RAY_ADDRESS names the cluster; all its machines must see the project
    and the sweep's folder under the same paths.
    """
    import ray

    Path(folder).mkdir(parents=True, exist_ok=True)
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(run_trial).options(num_cpus=cores, num_gpus=gpus, max_retries=0)
        outputs = [str(Path(folder) / f"{first_number + number}.txt") for number in range(len(trial_overrides))]
        env = {name: os.environ[name] for name in (TRACKING_URI_VARIABLE,) if name in os.environ}
        ray.get([task.remote(*trial, env) for trial in zip(trial_overrides, outputs, strict=True)])
    finally:
        ray.shutdown()


def run_trial(overrides: list[str], output_path: str, env: dict[str, str]) -> int:
    """Runs one trial in its own process, so that Ray's worker stays unchanged, and returns its exit code."""
    command = [sys.executable, "-m", "train", *overrides]
    environment = {**os.environ, **env}
    with Path(output_path).open("ab") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
