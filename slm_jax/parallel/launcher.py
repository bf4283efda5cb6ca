"""What a launcher tells a process: how many there are, which one it is, where process 0 is.

It is read from the environment, in this order:

    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID    given: all three
    what jax finds itself: Slurm, Open MPI, Cloud TPU (GKE or VM), indexed Kubernetes jobs
    nothing: a process alone

For all of them, optional:

    SLM_WAIT_SECONDS=300        longest wait for another process
    SLM_HEARTBEAT_SECONDS=100   how long a silent process counts as alive
    JAX_COORDINATOR_BIND_ADDRESS=host:port   where process 0 listens, without authentication; by
        default the coordinator's address if it is an IP, else every interface of the machine
"""

import ipaddress
import os
from collections.abc import Sequence
from typing import NamedTuple

from jax._src.clusters import ClusterEnv

from slm_jax.errors import UserError

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Launch(NamedTuple):
    """What a launcher told this process.

    Attributes:
        coordinator: `host:port` of process 0.
        processes: how many there are.
        process: the number of this one.
        local_devices: which devices of the machine are its own; `None` is all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: Sequence[int] | None = None

    @property
    def bind(self) -> str:
        """`host:port` that process 0 listens on; host `[::]` is every interface."""
        host, _, port = self.coordinator.rpartition(":")
        default = self.coordinator if _is_ip(host.strip("[]")) else f"[::]:{port}"
        return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", default)


def find_launch() -> Launch | None:
    """Reads the launcher's environment; `None` for a process alone.

    Raises:
        UserError: if the variables do not fit together.
    """
    given = {name: os.environ[name] for name in _GIVEN if os.environ.get(name)}
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        missing = [name for name in _GIVEN if name not in given]
        if missing:
            raise UserError(f"{', '.join(given)} without {', '.join(missing)}: set all or none")
        coordinator, *counts = (given[name] for name in _GIVEN)
        processes, process = (
            _integer(name, text) for name, text in zip(_GIVEN[1:], counts, strict=True)
        )
        local = None
    else:
        if "KUBERNETES_SERVICE_HOST" in os.environ and not (
            {"JOB_COMPLETION_INDEX", "TPU_WORKER_ID"} & os.environ.keys()
        ):
            return None  # somebody's pod, not a job; jax would ask the cluster for one
        found = ClusterEnv.auto_detect_unset_distributed_params(
            given.get(_GIVEN[0]), None, None, None, None, wait_seconds()
        )
        if found[1] is None and given:
            raise UserError(f"{_GIVEN[0]} without {', '.join(_GIVEN[1:])}: set all or none")
        if found[1] in (None, 1):
            return None
        coordinator, processes, process, local = found  # type: ignore[assignment]
    if not 0 <= process < processes:
        raise UserError(
            f"JAX_PROCESS_ID={process} is not below JAX_NUM_PROCESSES={processes}: number the "
            "processes from 0"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={coordinator} is not host:port")
    return Launch(coordinator, processes, process, local) if processes > 1 else None


def wait_seconds() -> int:
    """Longest wait for another process."""
    return _integer("SLM_WAIT_SECONDS", os.environ.get("SLM_WAIT_SECONDS", "300"), least=1)


def heartbeat_seconds() -> int:
    """How long a process that sends no heartbeat counts as alive."""
    name = "SLM_HEARTBEAT_SECONDS"
    return _integer(name, os.environ.get(name, "100"), least=1)


def _integer(name: str, text: str, *, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} must be an integer, at least {least}")
    return int(text)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
