"""`slm plan`: memory, communication and least time of a run on devices that are not there."""

import sys
import textwrap
from collections.abc import Sequence

from rich.table import Table

from slm_jax.cli.model import DEFAULT_PRESET, preset_list, split_preset
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.errors import UserError, named
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import PRESETS
from slm_jax.plan import Plan, compile_run, find_slice, make_plan
from slm_jax.plan.report import remedies
from slm_jax.plan.slices import Node, Slice, slice_names
from slm_jax.train.experiment import Experiment
from slm_jax.train.trm_experiment import TRMExperiment
from slm_jax.train.trm_presets import TRM_PRESETS

DESCRIPTION = f"""Compiles the training step of a run for a TPU slice or a node of GPUs that is not
there, and says what it would need: slm plan [PRESET] --on SLICE [OPTIONS].

The preset comes first, {DEFAULT_PRESET} by default; options are those of `slm train`. A run of a
language model has one row a device, of the model's context or 4096 tokens, unless --batch-size and
--seq-len say otherwise.

Slices and nodes (--on): {textwrap.fill(", ".join(slice_names()), width=80)}

Language models: {preset_list()}

Puzzles: {textwrap.fill(", ".join(TRM_PRESETS), width=80)}"""

_LONGEST = 4096  # tokens of a row by default
_DEFAULTS: dict[str, LMConfig | TRMExperiment] = {**PRESETS, **TRM_PRESETS}
# What a good run reaches: arXiv 2204.02311, table 3, and later reports are around it.
_USUAL_MFU = 0.4


def command(args: Sequence[str]) -> None:
    """Prints the plan of what `args` describe.

    Raises:
        UserError: on a mistake in `args`, or if the step does not fit the memory.
    """
    where, rest = _split_slice(args)
    name, rest = split_preset(rest)
    found = named("preset", name, _DEFAULTS)
    run: Experiment | TRMExperiment
    prog = f"slm plan {name} --on {where.name}"
    if isinstance(found, LMConfig):
        rows = Experiment(
            model=found, batch_size=where.devices, seq_len=min(found.max_seq_len, _LONGEST)
        )
        run = parse(Experiment, rows, description=DESCRIPTION, args=rest, prog=prog)
    else:
        run = parse(TRMExperiment, found, description=DESCRIPTION, args=rest, prog=prog)
    print(f"compiling for {where.name}, minutes for a large model", file=sys.stderr, flush=True)
    plan = make_plan(run, where, compile_run(run, where))
    out = console()
    out.print(f"{name} on {_slice_text(plan)}", highlight=False)
    out.print(_memory(plan))
    if not plan.compiled.fits:
        raise UserError(_too_large(plan))
    if plan.compiled.collectives:
        out.print(_collectives(plan))
    out.print(facts(_times(plan)))


def _split_slice(args: Sequence[str]) -> tuple[Slice | Node, list[str]]:
    """The slice that `--on` names, and the other words."""
    words = [
        part for word in args for part in (word.split("=", 1) if word[:5] == "--on=" else [word])
    ]
    if "--on" in words and words[-1] != "--on":
        at = words.index("--on")
        return find_slice(words[at + 1]), words[:at] + words[at + 2 :]
    if {"-h", "--help"} & set(words):
        return find_slice("tpu-v5e-4"), words
    raise UserError("on=None: say which slice, as in --on tpu-v5e-256")


def _slice_text(plan: Plan) -> str:
    where, run = plan.where, plan.run
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    if isinstance(run, Experiment):
        size = f"{run.batch_size:,} rows of {run.seq_len:,} tokens"
    else:
        size = f"{run.batch_size:,} puzzles"
    micro = f" in {run.accumulate} microbatches" if run.accumulate > 1 else ""
    return (
        f"{where.name} ({where.chips:,} chips, {where.topology.partition(':')[2]}), mesh {axes}: "
        f"{size} a step{micro}, {run.model.dtype}, remat {run.model.remat}"
    )


def _memory(plan: Plan) -> Table:
    c = plan.compiled
    table = Table(title="memory of a device", title_justify="left", show_footer=True)
    fits = c.fits
    total = c.device_bytes if fits else c.temporary_bytes
    table.add_column("", "of " + nbytes(plan.where.hbm))
    table.add_column("bytes", ("" if fits else "> ") + nbytes(total), justify="right")
    table.add_column("share", f"{total / plan.where.hbm:.1%}", justify="right")
    rows = {f"{name} (argument)": n for name, n in c.arguments.items() if n}
    if fits:
        rows["padding of arguments"] = max(0, c.argument_bytes - sum(c.arguments.values()))
        rows |= {"new results": c.new_bytes, "temporaries": c.temporary_bytes}
        rows["program"] = c.code_bytes
    for name, n in rows.items():
        table.add_row(name, nbytes(n), f"{n / plan.where.hbm:.1%}")
    return table


def _too_large(plan: Plan) -> str:
    needed = nbytes(plan.compiled.temporary_bytes)
    return (
        f"on={plan.where.name}: the step does not fit, it needs {needed} of "
        f"{nbytes(plan.where.hbm)} a device: {'; or '.join(remedies(plan))}"
    )


def _collectives(plan: Plan) -> Table:
    table = Table(title="collectives of a device in a step", title_justify="left")
    for heading in ("", "devices", "count", "bytes", "sent"):
        table.add_column(heading, justify="right" if heading else "left")
    for c in plan.compiled.collectives:
        table.add_row(c.kind, f"{c.group:,}", f"{c.count:,}", nbytes(c.bytes), nbytes(c.sent))
    return table


def _times(plan: Plan) -> dict[str, str]:
    where, run, c = plan.where, plan.run, plan.compiled
    name, bound = plan.bound
    parts = ", ".join(f"{n} {_seconds(s)}" for n, s in plan.bounds.items())
    rows = {
        "operations of a step": f"{count(plan.model_flops)}FLOP, with recomputation "
        f"{count(plan.flops)}FLOP; peak {count(where.device.flops * where.devices)}FLOP/s",
        "least time of a step": f"{_seconds(bound)}, by the {name} ({parts})",
        "MFU at most": f"{plan.mfu(bound):.0%}",
    }
    if plan.estimate is not None:
        rows["compiler's estimate"] = (
            f"{_seconds(plan.estimate)}, MFU {plan.mfu(plan.estimate):.0%}; collectives hidden, "
            f"{sum(call.runs for call in c.pallas):,} calls of Pallas kernels at their roofline"
        )
    else:
        why = (
            "no GPU is simulated" if isinstance(where, Node) else "a loop's length depends on data"
        )
        rows["compiler's estimate"] = f"none: {why}"
    total = run.steps * plan.model_flops
    rows["training"] = (
        f"{run.steps:,} steps, {count(total)}FLOP: at least {_hours(run.steps * bound)}, at "
        f"{_USUAL_MFU:.0%} MFU {_hours(run.steps * plan.at_mfu(_USUAL_MFU))}"
    )
    if plan.estimate is not None:
        rows["training"] += f", by the estimate {_hours(run.steps * plan.estimate)}"
    rows["compilation"] = (
        f"{c.trace_seconds:.1f} s traced, {c.compile_seconds:.1f} s compiled, here"
    )
    return rows


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _hours(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:.3g} hours" if seconds < 72 * 3600 else f"{seconds / 86400:.3g} days"
