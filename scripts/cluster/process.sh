#!/bin/sh
# One process of a run, on whatever started it: `process.sh KEY=VALUE...`, the words of `make train`.
#
# Slurm sets SLURM_PROCID and SLURM_NTASKS, an indexed Job of Kubernetes sets JOB_COMPLETION_INDEX and its manifest
# PROCESSES; COORDINATOR is HOST:PORT of process 0. With the run_dir of a run that was begun it goes on with it, so that
# the same line begins a run and resumes it. `device=cpu` among the words is for trying things out. `exec`: a SIGTERM
# reaches the run itself, which saves and ends with 143.
set -eu
cd "$(dirname "$0")/../.."
exec .venv/bin/python -m train device=gpu "$@" backend=jax devices=all \
    "distributed.coordinator=${COORDINATOR:?must be HOST:PORT of process 0}" \
    "distributed.processes=${SLURM_NTASKS:-${PROCESSES:?must be how many processes there are}}" \
    "distributed.index=${SLURM_PROCID:-${JOB_COMPLETION_INDEX:?must be the number of this process}}"
