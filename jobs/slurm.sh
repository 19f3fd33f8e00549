#!/usr/bin/env bash
#SBATCH --job-name=phi3v
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A run on Slurm, one task a GPU, without a launcher in between, so that signals reach the run itself:
#
#     sbatch jobs/slurm.sh RECIPE --training.output_dir /shared/run \
#         --distributed.engine fsdp2 --distributed.replicas 2 --checkpoint.save_minutes 10
#
# Five minutes before the time limit (USR1), or when it is pre-empted (TERM), the run saves after the current step and
# ends with 3; the job is queued again and goes on from the newest complete checkpoint. Options of sbatch, such as
# --nodes=4 --time=8:00:00, go before the file and replace those above; replicas is the number of nodes.
set -uo pipefail

trap : USR1 TERM                 # a signal to this shell must not end it before the run has saved

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec phi3v train "$@" --resume auto' phi3v "$@"
code=$?
if [ "$code" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
