"""Prints the YAML of an indexed Kubernetes Job that trains with several processes.

    python scripts/cluster/kubernetes.py --image REGISTRY/inception --processes 4 --claim shared -- \\
        model=inception_v3 data=imagenet2012 augment=inception batch_size=256 run_dir=runs/first | kubectl apply -f -

The image must have a checkout in its working directory in which `make train backend=jax ARGS=--check` was run once, on
a machine with a GPU, to install all requirements. `--claim` names a PersistentVolumeClaim with access mode
ReadWriteMany: its folders `runs` and `data` are mounted into the checkout, so that data is prepared once for all pods.
The Secret holds the key by which the pods recognise each other; a stranger in the cluster's network can't take part.
If a pod dies, the others exit too; all are restarted and resume the run. A pod that is evicted gets SIGTERM: all
processes stop after the same step and save a checkpoint.
"""

from __future__ import annotations

import argparse
import secrets
from typing import Any

import yaml

PORT = 4711
KEY_VARIABLE = "INCEPTION_RENDEZVOUS_KEY"
GRACE_SECONDS = 180  # for a step and a checkpoint
SHARED = ("runs", "data")
WAIT_SECONDS = 600  # covers pulling the image, and the back-off before failed pods are restarted


def manifest(
    overrides: list[str], name: str, image: str, processes: int, claim: str, gpus: int, workdir: str
) -> list[dict[str, Any]]:
    """Returns a Secret with a new key, a headless Service by which the pods find the first pod, and a Job."""
    device = [] if gpus else ["device=cpu"]
    container = {
        "name": "train",
        "image": image,
        "workingDir": workdir,
        "command": ["scripts/cluster/process.sh", f"distributed.wait_seconds={WAIT_SECONDS}", *device, *overrides],
        "env": [
            {"name": "PROCESSES", "value": str(processes)},
            {"name": "COORDINATOR", "value": f"{name}-0.{name}:{PORT}"},
            {"name": KEY_VARIABLE, "valueFrom": {"secretKeyRef": {"name": name, "key": "rendezvous-key"}}},
        ],
        "resources": {"limits": {"nvidia.com/gpu": gpus}} if gpus else {},
        "volumeMounts": [
            {"name": "shared", "mountPath": f"{workdir}/{folder}", "subPath": folder} for folder in SHARED
        ],
    }
    pod = {
        "metadata": {"labels": {"app": name}},
        "spec": {
            "subdomain": name,
            "restartPolicy": "OnFailure",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [container],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": processes,
            "parallelism": processes,
            "backoffLimit": 10 * processes,
            "template": pod,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the rendezvous comes before any pod is ready
            "selector": {"app": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "stringData": {"rendezvous-key": secrets.token_hex(32)},
    }
    return [secret, service, job]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="inception", help="name of the Job, the Service and the Secret")
    parser.add_argument("--image", required=True)
    parser.add_argument("--processes", type=int, required=True, help="number of pods")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim for runs/ and data/")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs per pod; 0: device=cpu")
    parser.add_argument("--workdir", default="/inception", help="path of the checkout in the image")
    parser.add_argument("overrides", nargs="+", help="overrides for make train, including run_dir")
    options = parser.parse_args()
    if not any(override.startswith("run_dir=") for override in options.overrides):
        parser.error("run_dir is missing; add run_dir=PATH, by which restarted pods find the run")
    print(yaml.safe_dump_all(manifest(**vars(options)), sort_keys=False), end="")


if __name__ == "__main__":
    main()
