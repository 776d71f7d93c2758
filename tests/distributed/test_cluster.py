"""What starts a run on a cluster: the files that Slurm and Kubernetes are given, and their very commands, run here."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import FROM_MAKE, ROOT, Done, run_command
from train.config.schema import Distributed

CLUSTER = ROOT / "scripts/cluster"
TINY = ["model=vgg16", "model.width=0.05", "device=cpu", "threads=1", "precision=float32", "epochs=2",
        "steps_per_epoch=6", "batch_size=16", "tracking.log_model=false", "tracking.wait_seconds=600",
        "evaluate.report=false"]  # fmt: skip

# Stands where Slurm does: as many tasks as the job has, each with what Slurm tells it, and a word of every request.
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] && shift
[ "$SRUN_CPUS_PER_TASK" = 8 ] || exit 9
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


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_manifest_is_a_job_and_the_service_that_its_pods_find_each_other_by():
    service, job = manifest("model=vgg16", "run_dir=runs/a", processes=4, name="first", gpus=2)
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
    waiting = "distributed.wait_seconds=600"  # images are fetched, and pods that failed are begun later and later
    assert container["command"] == ["scripts/cluster/process.sh", waiting, "model=vgg16", "run_dir=runs/a"]
    assert {one["name"]: one["value"] for one in container["env"]} == {
        "PROCESSES": "4",
        "COORDINATOR": f"first-0.first:{service['spec']['ports'][0]['port']}",
    }
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    [volume] = pod["spec"]["volumes"]
    assert container["volumeMounts"] == [
        {"name": volume["name"], "mountPath": f"{container['workingDir']}/{one}", "subPath": one}
        for one in ("runs", "data")
    ]
    assert volume["persistentVolumeClaim"] == {"claimName": "shared"}


def test_pods_without_a_gpu_compute_on_the_processor():
    _, job = manifest("run_dir=runs/a", gpus=0)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2:] == ["device=cpu", "run_dir=runs/a"]  # behind device=gpu of process.sh
    assert container["resources"] == {}


def test_a_manifest_needs_a_place_that_is_found_again():
    words = [str(CLUSTER / "kubernetes.py"), "--image=i", "--claim=c", "--processes=2", "--", "model=vgg16"]
    done = run_command(sys.executable, *words)
    assert done.code == 2
    assert "the words must have a run_dir, by which pods that are begun again find the run; got none" in done.err


def test_the_words_of_slurm():
    text = (CLUSTER / "slurm.sh").read_text()
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert given.keys() >= {"nodes", "ntasks-per-node", "gpus-per-task", "time", "requeue", "signal"}
    assert given["gpus-per-task"] == "1"
    assert given["signal"] == "TERM@180"  # to the processes of srun, not to the script, which has to queue again
    assert given["open-mode"] == "append"
    for script in ("slurm.sh", "process.sh"):
        assert os.access(CLUSTER / script, os.X_OK)
        assert run_command("bash", "-n", str(CLUSTER / script)).code == 0


@pytest.mark.parametrize("name", ["COORDINATOR", "PROCESSES", "JOB_COMPLETION_INDEX"])
def test_what_a_process_has_to_be_told(name: str):
    known = {"COORDINATOR": "127.0.0.1:1", "PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
    environment = {key: value for key, value in known.items() if key != name}
    done = run_command(str(CLUSTER / "process.sh"), env=environment)
    assert done.code != 0
    assert f"{name}: must be " in done.err


@pytest.mark.slow
def test_the_pods_of_a_job(tmp_path: Path):
    """The container's command and environment, once for each index."""
    words = [*TINY, f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    _, job = manifest(*words)
    [container] = job["spec"]["template"]["spec"]["containers"]
    told = {one["name"]: one["value"] for one in container["env"]} | {"COORDINATOR": f"127.0.0.1:{free_port()}"}
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    pods = [
        subprocess.Popen(
            container["command"],
            cwd=ROOT,
            env=inherited | told | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(job["spec"]["completions"])
    ]
    done = [Done(pod.returncode, *told) for pod, told in [(pod, pod.communicate(timeout=300)) for pod in pods]]
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    assert "cpu in 2 processes" in done[0].out


@pytest.mark.slow
def test_a_job_of_slurm_is_preempted_queues_again_and_goes_on(tmp_path: Path):
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    number = str(os.getpid())
    asked = tmp_path / "asked"
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    told = {
        "PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": number, "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "here", "ASKED": str(asked),
    }  # fmt: skip
    run = ROOT / f"runs/slurm-{number}"
    words = [*TINY, "epochs=15", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]

    def job(*more: str) -> subprocess.Popen:
        command = [str(CLUSTER / "slurm.sh"), *words, *more]
        return subprocess.Popen(command, cwd=ROOT, env=inherited | told, stdout=subprocess.PIPE, text=True)

    try:
        first = job()
        while not (run / "metrics.jsonl").exists() or '"step": 6,' not in (run / "metrics.jsonl").read_text():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[-1]), 15)  # Slurm tells the tasks, not the script
        out, _ = first.communicate(timeout=300)
        assert first.returncode == 143, out
        assert asked.read_text() == f"requeue {number}\n"
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        again = job()
        out, _ = again.communicate(timeout=300)
        assert again.returncode == 0, out
        assert "going on: life 2" in out
        assert json.loads((run / "summary.json").read_text())["epochs"] == 15
    finally:
        subprocess.run(["rm", "-rf", str(run)], check=True)
