#!/bin/bash
# Two machines with four GPUs each, one process for each GPU:
#
#   sbatch scripts/cluster/slurm.sh model=inception_v3 data=imagenet2012 augment=inception batch_size=256
#
# The folder of the checkout must be on storage that all machines share, and `make train backend=jax ARGS=--check` typed
# there once, on a machine with a GPU: it installs all that is needed. What has to be fetched by hand is prepared before
# (data.manual_dir). Other numbers go before the file: sbatch --nodes=8 --time=24:00:00 scripts/cluster/slurm.sh ...
#SBATCH --job-name=inception
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

# Before the time is over, and when the job is preempted, Slurm sends SIGTERM to all processes: they stop after the same
# step and save. The job then queues again under its number, so that run_dir is the same and the run goes on.
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COORDINATOR="$first:$((10000 + SLURM_JOB_ID % 20000))"  # below what Linux gives to outgoing connections
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"                # which srun does not take over by itself
srun --kill-on-bad-exit=1 scripts/cluster/process.sh "run_dir=runs/slurm-$SLURM_JOB_ID" "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
