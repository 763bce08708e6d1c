#!/usr/bin/env bash
#SBATCH --job-name=lora-ws-ddp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=a100:8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Two nodes of eight A100 train together, a process per GPU; srun starts them. A job that is preempted
# is put back in the queue, and so is one that nears its time limit (USR1); started again it goes on
# from its last checkpoint. The run folder and the store lie where both nodes see them.
# Usage: sbatch training/slurm/ddp.sh [recipe.yaml] [flags]
set -euo pipefail
recipe=${1:-training/table1/flat_vec.yaml}
shift || true
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 lora-ws train --config "$recipe" --trainer.accelerator gpu \
  --trainer.devices 8 --trainer.num_nodes 2 --trainer.strategy ddp "$@" &
wait $!
