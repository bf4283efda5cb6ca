"""What is launched: one command on every host of a slice, and what is known of its surroundings."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from slm_jax.errors import UserError
from slm_jax.exit_codes import DIVERGED, MISTAKE
from slm_jax.slices import Slice, process_environment

FINAL = (MISTAKE, DIVERGED)
"""Exit codes of `slm` after which a run is not started again; others may pass."""


@dataclass(frozen=True)
class Job:
    """A run on a slice.

    Attributes:
        name: of the job; lower case, digits and dashes, as Kubernetes and Google Cloud want it.
        command: words of the command that each process runs.
        where: the slice.
        image: container that holds slm_jax, for launchers of containers.
        volume: claim of the shared disk on which run folders are, for GKE.
        project: of Google Cloud; `None` is the one that gcloud is set to.
        zone: likewise.
        cluster: of xpk.
        setup: shell command that each host runs first.
        restarts: how often a run that failed is started again.
        spot: take machines that may be preempted.
        options: further options of the launcher, as they stand in a Slurm script.
    """

    name: str
    command: tuple[str, ...]
    where: Slice
    image: str | None = None
    volume: str = "slm-runs"
    project: str | None = None
    zone: str | None = None
    cluster: str | None = None
    setup: str | None = None
    restarts: int = 100
    spot: bool = False
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"name={self.name!r}: give at most 40 lower-case letters, digits and dashes, a "
                "letter first"
            )
        if self.restarts < 0:
            raise UserError(f"restarts={self.restarts} must be at least 0")

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of every process."""
        return process_environment(self.where)

    @property
    def shell(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command)

    @property
    def exports(self) -> str:
        """Lines of a shell script that set the environment."""
        lines = (f"export {n}={shlex.quote(v)}\n" for n, v in self.environment.items())
        return "".join(lines)

    def header(self) -> str:
        """Comment lines that say what runs where."""
        w = self.where
        hosts = "1 host" if w.hosts == 1 else f"{w.hosts:,} hosts"
        of = ("chip" if w.platform == "tpu" else "GPU") + "s" * (w.chips_per_host > 1)
        processes = w.hosts * w.processes_per_host
        total = "1 process" if processes == 1 else f"{processes:,} processes"
        environment = "".join(f"{n}={shlex.quote(v)} " for n, v in self.environment.items())
        return (
            f"# {w.name}: {hosts} of {w.chips_per_host} {of}, {total}\n"
            f"# each runs: {environment}{self.shell}\n"
        )
