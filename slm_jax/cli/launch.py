"""`slm launch`: starts a run on a slice with a launcher, or prints what would be started."""

import argparse
import re
from collections.abc import Sequence

from slm_jax.cli.experiment import PRESET_NAMES, default_run, read_run, slice_list
from slm_jax.cli.model import split_preset
from slm_jax.errors import UserError
from slm_jax.launch import LAUNCHERS, Job, render, submit
from slm_jax.slices import find_slice

DESCRIPTION = f"""Starts a run on every host of a slice: slm launch [PRESET] --on SLICE --with
LAUNCHER [OPTIONS]. Options that are not listed here are those of `slm train`. In place of a preset
the path of an experiment, experiments/NAME.py, starts that with the options.

A run that was preempted or hung starts again from its newest checkpoint; one that diverged, or
whose options are wrong, does not.

Launchers (--with): {", ".join(LAUNCHERS)}

Slices and nodes (--on): {slice_list("tpu", "gpu")}

{PRESET_NAMES}"""


def command(args: Sequence[str]) -> None:
    """Launches what `args` describe.

    Raises:
        UserError: on a mistake in `args`, or if the launcher's tool is not installed.
    """
    given, words = _parser().parse_known_args(list(args))
    if given.on is None or given.launcher is None:
        raise UserError(
            f"on={given.on}, with={given.launcher}: say where and by what, as in "
            "--on tpu-v5e-16 --with gke"
        )
    where = find_slice(given.on)
    what, rest = split_preset(words)
    if what.endswith(".py"):
        line = ("python", what, *rest)
    else:
        # Reads it here, so that a mistake is found before machines are paid for.
        read_run(default_run(what, where), what, where, rest, prog=f"slm launch {what}")
        line = ("slm", "train", what, "--on", where.name, *rest)
    job = Job(
        name=given.name or _name(what),
        command=line,
        where=where,
        image=given.image,
        volume=given.volume,
        project=given.project,
        zone=given.zone,
        cluster=given.cluster,
        setup=given.setup,
        restarts=given.restarts,
        spot=given.spot,
        options=tuple(given.sbatch),
    )
    if given.dry_run:
        print(render(given.launcher, job), end="")
    else:
        submit(given.launcher, job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "slm launch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--on", metavar="SLICE", help="where to run")
    add("--with", metavar="LAUNCHER", dest="launcher", help=", ".join(LAUNCHERS))
    add("--dry-run", action="store_true", help="print what would be given to the launcher")
    add("--name", help="of the job (default: the preset)")
    add("--image", help="container that holds slm_jax (gke, skypilot)")
    add("--volume", default="slm-runs", help="claim of the shared disk (gke; default %(default)s)")
    add("--project", help="of Google Cloud (default: gcloud's)")
    add("--zone", help="of Google Cloud (default: gcloud's)")
    add("--cluster", help="of the xpk command that gke prints")
    add("--setup", metavar="COMMAND", help="shell command that each host runs first")
    add("--restarts", type=int, default=100, help="most restarts (default %(default)s)")
    add("--spot", action="store_true", help="take machines that may be preempted")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--time=2-0")
    return parser


def _name(what: str) -> str:
    """A job's name from that of a preset or a file."""
    stem = what.rpartition("/")[2].removesuffix(".py").lower()
    return "slm-" + re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:36].rstrip("-")
