"""The launchers by name, what each is for, and the tool that takes its text."""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slm_jax.errors import UserError, named
from slm_jax.launch import gke, scripts, skypilot
from slm_jax.launch.job import Job


@dataclass(frozen=True)
class Launcher:
    """A launcher.

    Attributes:
        render: the text of a job.
        platforms: what it starts runs on.
        tool: command that must be installed.
        submit: words of the command that takes the text on its standard input.
    """

    render: Callable[[Job], str]
    platforms: tuple[str, ...]
    tool: str
    submit: tuple[str, ...]


LAUNCHERS: Mapping[str, Launcher] = {
    "gke": Launcher(gke.render, ("tpu",), "kubectl", ("kubectl", "apply", "-f", "-")),
    "queued-resources": Launcher(scripts.queued_resources, ("tpu",), "gcloud", ("bash",)),
    "skypilot": Launcher(
        skypilot.render, ("tpu", "gpu"), "sky", ("sky", "jobs", "launch", "-y", "/dev/stdin")
    ),
    "slurm": Launcher(scripts.slurm, ("gpu",), "sbatch", ("sbatch",)),
}


def render(name: str, job: Job) -> str:
    """What the launcher called `name` makes of a job.

    Raises:
        UserError: if there is no such launcher, or it is not for the job's slice.
    """
    launcher = named("with", name, LAUNCHERS)
    if job.where.platform not in launcher.platforms:
        fitting = [n for n, other in LAUNCHERS.items() if job.where.platform in other.platforms]
        raise UserError(
            f"with={name!r} does not start runs on {job.where.name}: "
            + (f"choose {', '.join(fitting)}" if fitting else "run `slm train` here instead")
        )
    return launcher.render(job)


def submit(name: str, job: Job) -> None:
    """Gives a job to the launcher's own tool.

    Raises:
        UserError: if the tool is not installed, or refuses the job.
    """
    text, launcher = render(name, job), LAUNCHERS[name]
    if shutil.which(launcher.tool) is None:
        raise UserError(
            f"with={name!r} needs {launcher.tool}, which is not installed: install it, or add "
            "--dry-run and take the text elsewhere"
        )
    done = subprocess.run(launcher.submit, input=text, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(launcher.submit)} ended with exit code {done.returncode}")
