"""A task for SkyPilot's managed jobs, which move to other machines when theirs are preempted.

Fields: the "YAML specification" and "Managed jobs" pages of SkyPilot's documentation.
"""

from typing import Any

import yaml

from slm_jax.errors import UserError
from slm_jax.exit_codes import HANGING, PREEMPTED
from slm_jax.launch.job import Job

# SkyPilot's variables, as slm_jax.parallel reads them: one process a node has all of its GPUs.
_NODES = """export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"
export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def render(job: Job) -> str:
    """The task, for `sky jobs launch`."""
    return job.header() + yaml.dump(task(job), Dumper=_Dumper, sort_keys=False, width=100)


def task(job: Job) -> dict[str, Any]:
    """The task as SkyPilot reads it. Exit codes other than `PREEMPTED` and `HANGING` end it.

    Raises:
        UserError: if SkyPilot has no such chips.
    """
    where, cloud = job.where, job.where.kind.cloud
    resources: dict[str, Any]
    if where.platform == "tpu":
        if cloud.runtime is None or cloud.accelerator_type is None:
            raise UserError(f"on={where.name!r} is to be had by GKE only: choose --with gke")
        if where.slices > 1:
            raise UserError(f"on={where.name!r} is {where.slices} slices: choose --with gke")
        resources = {
            "accelerators": f"tpu-{cloud.accelerator_type.format(where.number)}",
            "accelerator_args": {"runtime_version": cloud.runtime},
        }
    else:
        resources = {"accelerators": f"{cloud.gpu}:{where.chips_per_host}"}
    if job.image is not None:
        resources["image_id"] = f"docker:{job.image}"
    resources |= {
        "use_spot": job.spot,
        "job_recovery": {
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [PREEMPTED, HANGING],
        },
    }
    many = where.platform == "gpu" and where.hosts > 1
    out: dict[str, Any] = {"name": job.name, "resources": resources}
    if many:
        out["num_nodes"] = where.hosts
    if job.setup is not None:
        out["setup"] = f"{job.setup}\n"
    return out | {"run": f"{job.exports}{_NODES if many else ''}{job.shell}\n"}


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
