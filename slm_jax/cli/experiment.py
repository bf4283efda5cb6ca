"""The run that a command line describes: a preset, a slice (`--on`) and options."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slm_jax.cli.model import preset_list
from slm_jax.cli.script import parse
from slm_jax.errors import UserError, named
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import PRESETS
from slm_jax.slices import Slice, accumulate_for, apply_choices, choices_of, row_parts, slice_names
from slm_jax.train.experiment import Experiment, rows_add_up
from slm_jax.train.trm_experiment import TRMExperiment
from slm_jax.train.trm_presets import TRM_PRESETS

Run = Experiment | TRMExperiment

PRESET_NAMES = f"""Language models: {preset_list()}

Puzzles: {textwrap.fill(", ".join(TRM_PRESETS), width=80)}"""

_PRESETS: dict[str, LMConfig | TRMExperiment] = {**PRESETS, **TRM_PRESETS}


def slice_list(*platforms: str) -> str:
    """Names of slices, for `--help`."""
    return textwrap.fill(", ".join(slice_names(*platforms)), width=80, break_on_hyphens=False)


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not the run's, as in `--on NAME`, and the other words.

    Raises:
        UserError: if it has no value.
    """
    out: list[str] = []
    value = None
    rest = iter(words)
    for word in rest:
        if word == name:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{name} is the last word: give it a value")
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            out.append(word)
    return value, out


def is_preset(name: str) -> bool:
    """Whether a run has this name."""
    return name in _PRESETS


def default_run(name: str, where: Slice | None) -> Run:
    """The run of a preset as a slice chooses it.

    Raises:
        UserError: if there is no such preset.
    """
    found = named("preset", name, _PRESETS)
    run: Run = Experiment(model=found) if isinstance(found, LMConfig) else found
    if where is None:
        return run
    return apply_choices(run, where, choices_of(where, name, defaults=isinstance(found, LMConfig)))


def read_run(
    start: Run, name: str, where: Slice | None, words: Sequence[str], **parsing: Any
) -> Run:
    """The run that options make of another.

    A slice's microbatch becomes `accumulate`, unless the options say how many, or microbatches
    would change what is computed.

    Args:
        start: what holds where the options say nothing.
        name: of its preset.
        where: its slice.
        words: the options.
        **parsing: `description` and `prog` of `parse`.

    Raises:
        UserError: on a mistake in the options.
    """
    run = parse(type(start), start, args=words, **parsing)
    if where is None or not isinstance(run, Experiment) or has_option(words, "--accumulate"):
        return run
    most = choices_of(where, name, defaults=True).microbatch
    shards = row_parts(run.mesh, where.devices)
    if most is None or run.batch_size % shards or not rows_add_up(run.model):
        return run
    return replace(run, accumulate=accumulate_for(run.batch_size // shards, most))


def has_option(words: Sequence[str], option: str) -> bool:
    """Whether an option is among the words."""
    return any(word.partition("=")[0] == option for word in words)
