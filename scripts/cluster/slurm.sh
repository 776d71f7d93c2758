#!/bin/bash
# Trains on two machines with four GPUs each, one process per GPU:
#
#   sbatch scripts/cluster/slurm.sh model=inception_v3 data=imagenet2012 augment=inception batch_size=256
#
# The checkout must be on storage that all machines share. Run `make train backend=jax ARGS=--check` there once, on a
# machine with a GPU, to install all requirements. Data that must be downloaded by hand is prepared beforehand
# (data.manual_dir). Other settings precede the script: sbatch --nodes=8 --time=24:00:00 scripts/cluster/slurm.sh ...
# Only the processes of this job can take part: they share a secret, which every start of the job draws anew.
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

# Before the time limit, and when the job is preempted, Slurm sends SIGTERM to all processes: they stop after the same
# step and save a checkpoint. The job is then requeued with the same id, so that the run resumes in the same run_dir.
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export COORDINATOR="$first:$((10000 + SLURM_JOB_ID % 20000))"  # below Linux's ephemeral ports
INCEPTION_RENDEZVOUS_KEY=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export INCEPTION_RENDEZVOUS_KEY                                 # in the environment: arguments are seen by all users
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"                # srun does not inherit it
srun --kill-on-bad-exit=1 scripts/cluster/process.sh "run_dir=runs/slurm-$SLURM_JOB_ID" "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
