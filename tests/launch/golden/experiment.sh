#!/usr/bin/env bash
#SBATCH --job-name=slm-mup-transfer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=slm-mup-transfer-%j.log
# h200-1: 1 host of 1 GPU, 1 process
# each runs: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python experiments/mup_transfer.py --seeds 2
set -uo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
srun --wait=120 python experiments/mup_transfer.py --seeds 2
code=$?
case $code in
  0 | 2 | 44) exit $code ;; # done, a mistake, diverged
esac
# preempted (42), hung (43), another process lost: go on from the newest checkpoint
if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
