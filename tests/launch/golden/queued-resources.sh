#!/usr/bin/env bash
# tpu-v6e-16: 4 hosts of 4 chips, 4 processes
# each runs: LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 slm train mamba-2.8b --on tpu-v6e-16
set -euo pipefail
host=$(cat <<'HOST'
set -e
cd slm_jax && make setup ACCELERATOR=tpu
cat > slm-mamba-2-8b.sh <<'RUN'
export LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304
for try in $(seq 0 5); do
  code=0
  slm train mamba-2.8b --on tpu-v6e-16 || code=$?
  case $code in
    0 | 2 | 44) exit $code ;; # done, a mistake, diverged
  esac
  sleep 10 # preempted (42), hung (43), another process lost: go on from the newest checkpoint
done
exit $code
RUN
nohup bash slm-mamba-2-8b.sh > slm-mamba-2-8b.log 2>&1 < /dev/null &
HOST
)
gcloud compute tpus queued-resources create slm-mamba-2-8b --node-id=slm-mamba-2-8b --project=p --zone=us-east5-b \
  --accelerator-type=v6e-16 \
  --runtime-version=v2-alpha-tpuv6e --spot
until gcloud compute tpus queued-resources describe slm-mamba-2-8b --project=p --zone=us-east5-b \
  --format='value(state.state)' | grep -qx ACTIVE; do sleep 30; done
gcloud compute tpus tpu-vm ssh slm-mamba-2-8b --project=p --zone=us-east5-b --worker=all --command="$host"
echo "started; each host writes slm-mamba-2-8b.log; a slice that was preempted must be asked for again"
