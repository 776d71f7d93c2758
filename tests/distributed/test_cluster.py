"""Runs on a cluster: the files for Slurm and Kubernetes, and their commands, executed on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import FROM_MAKE, ROOT, Done, run_command
from support.waiting import free_port
from train.config.schema import Distributed
from train.distributed.rendezvous import KEY_VARIABLE

CLUSTER = ROOT / "scripts/cluster"
TINY = ["model=vgg16", "model.width=0.05", "device=cpu", "threads=1", "precision=float32", "epochs=2",
        "steps_per_epoch=6", "batch_size=16", "tracking.log_model=false", "tracking.wait_seconds=600",
        "evaluate.report=false"]  # fmt: skip

# Fakes Slurm: starts the tasks of the job with the variables that Slurm sets, and logs every request.
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] && shift
[ "$SRUN_CPUS_PER_TASK" = 8 ] || exit 9
[ "${#INCEPTION_RENDEZVOUS_KEY}" = 64 ] || exit 10
for task in 1 0; do
    SLURM_PROCID=$task "$@" &
    eval "task$task=\\$!"
done
trap 'kill -TERM $task0 $task1' TERM
code=0
for one in $task0 $task1; do
    while wait $one; found=$?; kill -0 $one 2>/dev/null; do :; done
    [ $found -gt $code ] && code=$found
done
exit $code
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$ASKED"; fi
"""


def manifest(*words: str, processes: int = 2, **options: Any) -> list[dict[str, Any]]:
    flags = [f"--{name}={value}" for name, value in {"image": "r/i:1", "claim": "shared", **options}.items()]
    flags.append(f"--processes={processes}")
    done = run_command(sys.executable, str(CLUSTER / "kubernetes.py"), *flags, "--", *words)
    assert done.code == 0, done.err
    return list(yaml.safe_load_all(done.out))


def test_manifest_has_a_job_a_headless_service_and_a_secret():
    secret, service, job = manifest("model=vgg16", "run_dir=runs/a", processes=4, name="first", gpus=2)
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    # A headless service has no address of its own: a pod of an indexed job is found as <job>-<index>.<subdomain>.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    pod = job["spec"]["template"]
    assert service["metadata"]["name"] == pod["spec"]["subdomain"] == job["metadata"]["name"] == "first"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert pod["spec"]["restartPolicy"] == "OnFailure"  # of a Job: this or Never
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 2 * Distributed().wait_seconds
    [container] = pod["spec"]["containers"]
    waiting = "distributed.wait_seconds=600"  # time to pull images and for the growing back-off of failed pods
    assert container["command"] == ["scripts/cluster/process.sh", waiting, "model=vgg16", "run_dir=runs/a"]
    assert (secret["apiVersion"], secret["kind"], secret["metadata"]) == ("v1", "Secret", {"name": "first"})
    [(entry, _)] = secret["stringData"].items()
    assert container["env"] == [
        {"name": "PROCESSES", "value": "4"},
        {"name": "COORDINATOR", "value": f"first-0.first:{service['spec']['ports'][0]['port']}"},
        {"name": KEY_VARIABLE, "valueFrom": {"secretKeyRef": {"name": "first", "key": entry}}},
    ]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    [volume] = pod["spec"]["volumes"]
    assert container["volumeMounts"] == [
        {"name": volume["name"], "mountPath": f"{container['workingDir']}/{one}", "subPath": one}
        for one in ("runs", "data")
    ]
    assert volume["persistentVolumeClaim"] == {"claimName": "shared"}


def test_every_manifest_has_a_key_of_its_own():
    keys = [manifest("run_dir=runs/a")[0]["stringData"]["rendezvous-key"] for _ in range(2)]
    assert keys[0] != keys[1]
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_pods_without_a_gpu_use_the_cpu():
    *_, job = manifest("run_dir=runs/a", gpus=0)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2:] == ["device=cpu", "run_dir=runs/a"]  # overrides the device=gpu of process.sh
    assert container["resources"] == {}


def test_manifest_requires_a_run_dir():
    words = [str(CLUSTER / "kubernetes.py"), "--image=i", "--claim=c", "--processes=2", "--", "model=vgg16"]
    done = run_command(sys.executable, *words)
    assert done.code == 2
    assert "run_dir is missing; add run_dir=PATH, by which restarted pods find the run" in done.err


def test_slurm_script_options():
    text = (CLUSTER / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options.keys() >= {"nodes", "ntasks-per-node", "gpus-per-task", "time", "requeue", "signal"}
    assert options["gpus-per-task"] == "1"
    assert options["signal"] == "TERM@180"  # to the processes of srun, not to the script, which must requeue the job
    assert options["open-mode"] == "append"
    for script in ("slurm.sh", "process.sh"):
        assert os.access(CLUSTER / script, os.X_OK)
        assert run_command("bash", "-n", str(CLUSTER / script)).code == 0


@pytest.mark.parametrize("name", ["COORDINATOR", "PROCESSES", "JOB_COMPLETION_INDEX"])
def test_process_script_requires_its_variables(name: str):
    variables = {"COORDINATOR": "127.0.0.1:1", "PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
    environment = {key: value for key, value in variables.items() if key != name}
    done = run_command(str(CLUSTER / "process.sh"), env=environment)
    assert done.code != 0
    assert f"{name}: must be " in done.err


@pytest.mark.slow
def test_pods_of_a_job_train_together(tmp_path: Path):
    """The command and environment of the container, once per index."""
    overrides = [*TINY, f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    secret, _, job = manifest(*overrides)
    [container] = job["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    [variables[KEY_VARIABLE]] = secret["stringData"].values()
    variables["COORDINATOR"] = f"127.0.0.1:{free_port()}"
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    pods = [
        subprocess.Popen(
            container["command"],
            cwd=ROOT,
            env=inherited | variables | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(job["spec"]["completions"])
    ]
    outputs = [pod.communicate(timeout=300) for pod in pods]
    done = [Done(pod.returncode, *output) for pod, output in zip(pods, outputs, strict=True)]
    assert [pod.code for pod in done] == [0, 0], done[0].err + done[1].err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    assert "CPU in 2 processes" in done[0].out


@pytest.mark.slow
def test_preempted_slurm_job_is_requeued_and_resumes(tmp_path: Path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    number = str(os.getpid())
    asked = tmp_path / "asked"
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": number, "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "here", "ASKED": str(asked),
    }  # fmt: skip
    run = ROOT / f"runs/slurm-{number}"
    overrides = [*TINY, "epochs=15", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]

    def job(*more: str) -> subprocess.Popen:
        command = [str(CLUSTER / "slurm.sh"), *overrides, *more]
        return subprocess.Popen(command, cwd=ROOT, env=inherited | variables, stdout=subprocess.PIPE, text=True)

    try:
        first = job()
        while not (run / "metrics.jsonl").exists() or '"step": 6,' not in (run / "metrics.jsonl").read_text():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[-1]), 15)  # Slurm sets it for the tasks, not for the script
        out, _ = first.communicate(timeout=300)
        assert first.returncode == 143, out
        assert asked.read_text() == f"requeue {number}\n"
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        again = job()
        out, _ = again.communicate(timeout=300)
        assert again.returncode == 0, out
        assert "resuming from checkpoint epoch-" in out
        assert ", attempt 2)\n" in out
        assert json.loads((run / "summary.json").read_text())["epochs"] == 15
    finally:
        subprocess.run(["rm", "-rf", str(run)], check=True)
