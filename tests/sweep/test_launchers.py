"""Trials that other launchers run: submitit, Slurm, Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT, run_train
from support.waiting import happens_within

TINY = [
    "model=vgg16", "model.width=0.1", "epochs=2", "steps_per_epoch=4", "batch_size=8", "gradient_accumulation=1,2,13",
    "precision=float32",
]  # fmt: skip


SBATCH = """#!/bin/sh
cp "$1" "$SCRIPTS/$$.sh"
echo "Submitted batch job $$"
"""


@pytest.mark.slow
def test_unusable_launcher_is_reported(tmp_path: Path):
    done = run_train("-m", *TINY, "hydra/launcher=submitit_slurm", f"run_dir={tmp_path / 'sweep'}")
    expected = (
        'error: hydra/launcher=submitit_slurm could not start the trials: Could not detect "srun", are you indeed on'
    )
    assert (done.code, done.err.startswith(expected), done.err.count("\n")) == (2, True, 1)


@pytest.mark.slow
def test_submitit_launcher_runs_the_trials(tmp_path: Path):
    """As jobs of submitit's local executor: separate processes that do not inherit anything from the launcher."""
    path = tmp_path / "sweep"
    done = run_train(
        "-m", *TINY, "hydra/launcher=submitit_local", f"run_dir={path}", f"tracking.uri=sqlite:///{tmp_path / 'm.db'}"
    )
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[0] == "sweep: 3 trials, submitted to submitit_local"
    assert lines[-1].startswith("sweep: 2 finished, 1 failed, ")
    assert [line for line in lines if line.startswith("failed: gradient_accumulation=13: ConfigError: ")]
    assert " test accuracy 0." in next(line for line in lines if line.startswith("best: "))
    assert len(list((path / "jobs/.submitit").glob("*/*_result.pkl"))) == 4  # the best trial runs once more
    assert not (ROOT / "multirun").exists()


def test_slurm_gets_a_script_for_the_trials(tmp_path: Path):
    """A fake `sbatch` keeps the script that a cluster would run."""
    programs, scripts, path = tmp_path / "bin", tmp_path / "scripts", tmp_path / "sweep"
    programs.mkdir()
    scripts.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct"):
        (programs / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SCRIPTS": str(scripts)}
    overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=7", "hydra.launcher.gpus_per_node=1"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train", "-m", *TINY, *overrides, f"run_dir={path}"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert happens_within(lambda: list(scripts.glob("*.sh")), 300)
    finally:
        launcher.kill()
        launcher.wait()
    [script] = [file.read_text() for file in scripts.glob("*.sh")]
    assert "#SBATCH --array=0-2%" in script
    assert "#SBATCH --time=7" in script
    assert "#SBATCH --gpus-per-node=1" in script
    assert str(path / "jobs/.submitit") in script
    assert f"{sys.executable} -u -m submitit.core._submit" in script


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")
def test_ray_runs_the_trials(tmp_path: Path):
    path = tmp_path / "sweep"
    done = run_train("-m", *TINY, "sweep.engine=ray", f"run_dir={path}", f"tracking.uri=sqlite:///{tmp_path / 'm.db'}")
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[0] == "sweep: 3 trials, submitted to ray"
    assert lines[-1].startswith("sweep: 2 finished, 1 failed, ")
    assert "gradient_accumulation must be at most" in (path / "jobs/2.txt").read_text()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_missing_ray_is_reported(tmp_path: Path):
    done = run_train("-m", *TINY, "sweep.engine=ray", f"run_dir={tmp_path / 'sweep'}")
    expected = (
        "error: sweep.engine=ray needs Ray, which is not installed; install the extra: .venv/bin/python -m uv pip "
    )
    expected += "install --python .venv/bin/python -r requirements/ray.lock\n"
    assert (done.code, done.out, done.err) == (2, "", expected)
