"""Gives a run what its slice chooses, and the process what the compiler and jax read."""

import math
import os
from dataclasses import replace
from typing import Any

import jax

from slm_jax.errors import UserError
from slm_jax.parallel import MESH_AXES, MeshConfig
from slm_jax.parallel.rules import names, spec
from slm_jax.slices.kind import Choices
from slm_jax.slices.slice import Slice


def choices_of(where: Slice, preset: str, *, defaults: bool) -> Choices:
    """What a slice chooses for a run.

    Args:
        where: the slice.
        preset: name of the run's preset.
        defaults: whether a preset that the slice does not know gets the slice's defaults.
    """
    fallback = where.kind.defaults if defaults else Choices()
    return where.kind.experiments.get(preset, fallback)


def apply_choices[T](run: T, where: Slice, choices: Choices) -> T:
    """`run`, a configuration with `mesh` and `model.remat`, with the mesh and remat chosen.

    Several slices are as many times the replicas.
    """
    given: Any = run
    mesh = choices.mesh or given.mesh
    if mesh.data != -1:
        mesh = replace(mesh, data=mesh.data * where.slices)
    given = replace(given, mesh=mesh)
    if choices.remat is not None:
        given = replace(given, model=replace(given.model, remat=choices.remat))
    return given


def row_parts(mesh: MeshConfig, devices: int) -> int:
    """Parts that the rows of a batch are split into on so many devices.

    Raises:
        UserError: if the mesh does not fill the devices.
    """
    sizes = dict(zip(MESH_AXES, mesh.resolve(devices), strict=True))
    return math.prod(sizes[axis] for axis in names(spec(("batch",))[0]))


def accumulate_for(rows: int, microbatch: int) -> int:
    """Microbatches of a step: the fewest of at most `microbatch` rows that divide its rows.

    Args:
        rows: of a device in a step.
        microbatch: most that a device works on at a time.
    """
    least = math.ceil(rows / microbatch)
    return next(n for n in range(least, rows + 1) if rows % n == 0)


def compiler_flags(where: Slice) -> dict[str, str]:
    """Flags of the compiler, by the environment variable that it reads."""
    return {
        name: " ".join(flag.format(devices=where.devices) for flag in flags)
        for name, flags in where.kind.flags.items()
    }


def process_environment(where: Slice) -> dict[str, str]:
    """The environment variables that a process on the slice gets."""
    return compiler_flags(where) | dict(where.kind.environment)


def prepare_process(where: Slice) -> None:
    """Sets the environment of this process, before jax looks for devices.

    What is set outside wins: a variable that is there is left, and so is a flag in one of flags.
    """
    for name, value in process_environment(where).items():
        if name not in where.kind.flags:
            os.environ.setdefault(name, value)
            continue
        outside = os.environ.get(name, "").split()
        known = {flag.partition("=")[0] for flag in outside}
        ours = [flag for flag in value.split() if flag.partition("=")[0] not in known]
        os.environ[name] = " ".join([*outside, *ours])


def check_hardware(where: Slice) -> None:
    """Checks that jax sees the slice here.

    Raises:
        UserError: if it sees something else.
    """
    found = jax.devices()
    kinds = sorted({d.device_kind for d in found})
    if len(found) != where.devices or kinds != [where.kind.device_kind]:
        raise UserError(
            f"on={where.name!r} is {where.devices} devices {where.kind.device_kind!r}, here are "
            f"{len(found)} {' and '.join(map(repr, kinds))}: start it there with `slm launch`, or "
            "leave out --on"
        )
