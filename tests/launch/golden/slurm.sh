#!/usr/bin/env bash
#SBATCH --job-name=slm-tiny-dense
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=slm-tiny-dense-%j.log
#SBATCH --time=1-0
# h100-16: 2 hosts of 8 GPUs, 16 processes
# each runs: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 slm train tiny-dense --on h100-16 --loop.wandb
set -uo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
srun --wait=120 slm train tiny-dense --on h100-16 --loop.wandb
code=$?
case $code in
  0 | 2 | 44) exit $code ;; # done, a mistake, diverged
esac
# preempted (42), hung (43), another process lost: go on from the newest checkpoint
if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
