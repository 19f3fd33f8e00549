#!/usr/bin/env bash
# A run on one machine or several with torchrun; start the same command on each of them:
#
#     NODES=2 HEAD=node0 bash jobs/torchrun.sh RECIPE --training.output_dir /shared/run \
#         --distributed.engine fsdp2 --distributed.replicas 2 --checkpoint.save_minutes 10
#
# If a process is lost, all of them start again from the newest complete checkpoint, up to RESTARTS times. If the machines
# are taken away, the same command goes on. SIGTERM saves after the current step.
set -euo pipefail

NODES=${NODES:-1}                # machines
GPUS=${GPUS:-gpu}                # processes on each; gpu: one for every GPU
HEAD=${HEAD:-127.0.0.1}          # a machine that the others reach
PORT=${PORT:-29400}
RUN_ID=${RUN_ID:-phi3v}          # the same on all machines, another for every run
RESTARTS=${RESTARTS:-3}

# By default the processes of a second attempt would find the addresses of the first (seen in torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# How long a step and a save may take after SIGTERM; older torch always gives 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300

exec torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$RUN_ID" \
    -m phi3v train "$@" --resume auto
