#!/usr/bin/env bash
#SBATCH --job-name=lora-ws-zoo
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --requeue
# Each task builds its own share into a store of its own; a task that is killed and started again
# goes on behind its last finished batch. Usage: sbatch training/slurm/zoo.sh [recipe.yaml] [flags]
# When all are done: lora-ws zoo merge OUT-*-of-* --out OUT
set -euo pipefail
recipe=${1:-training/zoo/lora_ws_sd15.yaml}
shift || true
exec lora-ws zoo build --config "$recipe" \
  --shard "${SLURM_ARRAY_TASK_ID}/${SLURM_ARRAY_TASK_COUNT}" "$@"
