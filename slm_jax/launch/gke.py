"""A JobSet for GKE: for each slice a job of as many pods as it has hosts, all or none.

Fields: https://jobset.sigs.k8s.io, "Plan TPUs in GKE" and "Deploy TPU workloads" of Google Cloud.
"""

import shlex
from typing import Any

import yaml

from slm_jax.errors import UserError
from slm_jax.launch.job import FINAL, Job

_CONTAINER = "slm"
_FOLDER = "/slm"  # the working directory; run folders are in its runs/, on the shared disk


def render(job: Job) -> str:
    """The manifest, for `kubectl apply`.

    Raises:
        UserError: if no image is given.
    """
    if job.image is None:
        raise UserError("image=None: GKE runs containers: give one that holds slm_jax, --image")
    return job.header() + _xpk(job) + yaml.safe_dump(manifest(job), sort_keys=False, width=100)


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet."""
    where = job.where
    command = list(job.command)
    if job.setup is not None:
        command = ["bash", "-c", f"{job.setup} && exec {job.shell}"]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": where.kind.cloud.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": where.shape,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    chips = {"google.com/tpu": where.chips_per_host}
    container = {
        "name": _CONTAINER,
        "image": job.image,
        "workingDir": _FOLDER,
        "command": command,
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": 8482}],  # libtpu's, jax's
        "resources": {"requests": chips, "limits": dict(chips)},
        "volumeMounts": [{"name": "runs", "mountPath": f"{_FOLDER}/runs"}],
    }
    pod = {
        "restartPolicy": "Never",  # podFailurePolicy wants it: the JobSet restarts all pods
        "terminationGracePeriodSeconds": 60,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": job.volume}}],
    }
    final = {"containerName": _CONTAINER, "operator": "In", "values": list(FINAL)}
    one = {
        "parallelism": where.hosts // where.slices,
        "completions": where.hosts // where.slices,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod that fails fails all
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {"spec": pod},
    }
    give_up = {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [give_up]},
            "replicatedJobs": [
                {"name": "slice", "replicas": where.slices, "template": {"spec": one}}
            ],
        },
    }


def _xpk(job: Job) -> str:
    """A comment: the same by xpk, which restarts on 42 and on 127 to 255 unasked."""
    cloud = job.where.kind.cloud
    assert cloud.accelerator_type is not None
    words = ["xpk", "workload", "create", f"--workload={job.name}"]
    words += [f"--cluster={job.cluster}"] if job.cluster is not None else []
    words += [f"--project={job.project}"] if job.project is not None else []
    words += [f"--zone={job.zone}"] if job.zone is not None else []
    words += [
        f"--tpu-type={cloud.accelerator_type.format(job.where.number)}",
        f"--num-slices={job.where.slices}",
        f"--docker-image={job.image}",
        f"--max-restarts={job.restarts}",
        "--restart-on-exit-codes=43",
    ]
    words += [f"--env={name}={value}" for name, value in job.environment.items()]
    return f"# by xpk: {shlex.join([*words, f'--command={job.shell}'])}\n"
