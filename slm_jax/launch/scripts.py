"""Shell scripts: queued resources of Cloud TPU, and Slurm."""

import shlex

from slm_jax.errors import UserError
from slm_jax.launch.job import FINAL, Job

_FINAL = " | ".join(map(str, (0, *FINAL)))


def queued_resources(job: Job) -> str:
    """A script that asks for a slice, waits for it and starts the run on all of its hosts.

    Source: "Manage queued resources" of the Cloud TPU documentation.

    Raises:
        UserError: if the Cloud TPU API has no such chips.
    """
    cloud, where = job.where.kind.cloud, job.where
    if cloud.runtime is None or cloud.accelerator_type is None:
        raise UserError(f"on={where.name!r} is to be had by GKE only: choose --with gke")
    if where.slices > 1:
        raise UserError(f"on={where.name!r} is {where.slices} slices: choose --with gke")
    place = "".join(
        f" --{n}={shlex.quote(v)}" for n, v in (("project", job.project), ("zone", job.zone)) if v
    )
    spot = " --spot" if job.spot else ""
    setup = f"{job.setup}\n" if job.setup is not None else ""
    return f"""#!/usr/bin/env bash
{job.header()}set -euo pipefail
host=$(cat <<'HOST'
set -e
{setup}cat > {job.name}.sh <<'RUN'
{job.exports}for try in $(seq 0 {job.restarts}); do
  code=0
  {job.shell} || code=$?
  case $code in
    {_FINAL}) exit $code ;; # done, a mistake, diverged
  esac
  sleep 10 # preempted (42), hung (43), another process lost: go on from the newest checkpoint
done
exit $code
RUN
nohup bash {job.name}.sh > {job.name}.log 2>&1 < /dev/null &
HOST
)
gcloud compute tpus queued-resources create {job.name} --node-id={job.name}{place} \\
  --accelerator-type={cloud.accelerator_type.format(where.number)} \\
  --runtime-version={cloud.runtime}{spot}
until gcloud compute tpus queued-resources describe {job.name}{place} \\
  --format='value(state.state)' | grep -qx ACTIVE; do sleep 30; done
gcloud compute tpus tpu-vm ssh {job.name}{place} --worker=all --command="$host"
echo "started; each host writes {job.name}.log; a slice that was preempted must be asked for again"
"""


def slurm(job: Job) -> str:
    """A batch script: a process a GPU, which jax finds by Slurm's variables.

    A step ends with the highest exit code of its processes, so what is not final is started again.
    """
    where = job.where
    extra = "".join(f"#SBATCH {option}\n" for option in job.options)
    setup = f"srun --ntasks-per-node=1 bash -c {shlex.quote(job.setup)}\n" if job.setup else ""
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={where.hosts}
#SBATCH --ntasks-per-node={where.processes_per_host}
#SBATCH --gpus-per-node={where.chips_per_host}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output={job.name}-%j.log
{extra}{job.header()}set -uo pipefail
{job.exports}{setup}srun --wait=120 {job.shell}
code=$?
case $code in
  {_FINAL}) exit $code ;; # done, a mistake, diverged
esac
# preempted (42), hung (43), another process lost: go on from the newest checkpoint
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
