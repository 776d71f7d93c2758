#!/bin/sh
# Starts one process of a distributed run: `process.sh KEY=VALUE...`, with the overrides of `make train`.
#
# Slurm sets SLURM_PROCID and SLURM_NTASKS; an indexed Kubernetes Job sets JOB_COMPLETION_INDEX, and its manifest
# PROCESSES. COORDINATOR is HOST:PORT of process 0, INCEPTION_RENDEZVOUS_KEY a secret that is the same for all and that
# nobody else knows; slurm.sh and kubernetes.py make one. The same command starts a run and resumes it, by its run_dir.
# `device=cpu` as an override is for testing. `exec`: a SIGTERM reaches the run itself, which saves a checkpoint and
# exits with 143.
set -eu
cd "$(dirname "$0")/../.."
exec .venv/bin/python -m train device=gpu "$@" backend=jax devices=all \
    "distributed.coordinator=${COORDINATOR:?must be HOST:PORT of process 0}" \
    "distributed.processes=${SLURM_NTASKS:-${PROCESSES:?must be the number of processes}}" \
    "distributed.index=${SLURM_PROCID:-${JOB_COMPLETION_INDEX:?must be the index of this process}}"
