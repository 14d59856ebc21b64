#!/usr/bin/env bash
# All GPUs of one machine:              ./torchrun.sh run.yaml
# Two machines, on each of them:        NODES=2 HEAD=first-host ./torchrun.sh run.yaml
# A rank that dies ends all; torchrun starts them again up to three times, and they go on from the newest checkpoint.
set -euo pipefail
config=$1
shift
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc_per_node "${GPUS:-gpu}" \
  --max_restarts 3 \
  --rdzv_backend c10d \
  --rdzv_endpoint "${HEAD:-localhost}:29400" \
  -m medclip_lab train --config "$config" --checkpoint.minutes=30 "$@"
