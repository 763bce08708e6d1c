#!/usr/bin/env bash
#SBATCH --job-name=lora-ws-sweep
#SBATCH --array=0-7
#SBATCH --gpus-per-task=a100:1
#SBATCH --requeue
# Each task trains its own share of the layers or matrices, ten seeds each, into one folder that all
# nodes see; a task that is killed and started again skips the seeds that have a record.
# Usage: sbatch training/slurm/sweep.sh [recipe.yaml] [flags]
# When all are done the same command without --shard makes table, CSV and chart of the whole.
set -euo pipefail
recipe=${1:-training/figure2/matrices.yaml}
shift || true
exec lora-ws sweep --config "$recipe" --processes 1 \
  --shard "${SLURM_ARRAY_TASK_ID}/${SLURM_ARRAY_TASK_COUNT}" "$@"
