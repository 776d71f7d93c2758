"""An indexed Job of Kubernetes that trains with several processes, as YAML.

    python scripts/cluster/kubernetes.py --image REGISTRY/inception --processes 4 --claim shared -- \\
        model=inception_v3 data=imagenet2012 augment=inception batch_size=256 run_dir=runs/first | kubectl apply -f -

The image holds a checkout in its working directory where `make train backend=jax ARGS=--check` was typed once, on a
machine with a GPU, which installs all that is needed. `--claim` names a PersistentVolumeClaim that many pods may write
(ReadWriteMany): its folders `runs` and `data` are mounted as those of the checkout, so that data prepared there once is
there for all. A pod that dies ends the others, too; all are begun again, meet again and go on. A pod that is evicted
gets SIGTERM: all stop after the same step, and save.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

PORT = 4711
GRACE_SECONDS = 180  # for a step, and for writing what is to be saved
SHARED = ("runs", "data")
WAIT_SECONDS = 600  # images are fetched, and pods that failed are begun again later and later


def manifest(
    words: list[str], name: str, image: str, processes: int, claim: str, gpus: int, workdir: str
) -> list[dict[str, Any]]:
    """A Job and the headless Service by which its pods find the first one."""
    device = [] if gpus else ["device=cpu"]
    container = {
        "name": "train",
        "image": image,
        "workingDir": workdir,
        "command": ["scripts/cluster/process.sh", f"distributed.wait_seconds={WAIT_SECONDS}", *device, *words],
        "env": [
            {"name": "PROCESSES", "value": str(processes)},
            {"name": "COORDINATOR", "value": f"{name}-0.{name}:{PORT}"},
        ],
        "resources": {"limits": {"nvidia.com/gpu": gpus}} if gpus else {},
        "volumeMounts": [{"name": "shared", "mountPath": f"{workdir}/{one}", "subPath": one} for one in SHARED],
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
            "publishNotReadyAddresses": True,  # they meet before any of them is ready
            "selector": {"app": name},
            "ports": [{"name": "meeting", "port": PORT}],
        },
    }
    return [service, job]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="inception", help="of the Job and the Service")
    parser.add_argument("--image", required=True)
    parser.add_argument("--processes", type=int, required=True, help="pods")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim for runs/ and data/")
    parser.add_argument("--gpus", type=int, default=1, help="of each pod; 0: none, device=cpu")
    parser.add_argument("--workdir", default="/inception", help="where the image has the checkout")
    parser.add_argument("words", nargs="+", help="of make train; run_dir among them")
    options = parser.parse_args()
    if not any(word.startswith("run_dir=") for word in options.words):
        parser.error("the words must have a run_dir, by which pods that are begun again find the run; got none")
    print(yaml.safe_dump_all(manifest(**vars(options)), sort_keys=False), end="")


if __name__ == "__main__":
    main()
