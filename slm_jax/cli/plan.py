"""`slm plan`: memory, communication and least time of a run on devices that are not there."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.table import Table

from slm_jax.cli.experiment import (
    PRESET_NAMES,
    Run,
    default_run,
    has_option,
    is_preset,
    read_run,
    slice_list,
    take_option,
)
from slm_jax.cli.model import DEFAULT_PRESET, split_preset
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.errors import UserError
from slm_jax.plan import Plan, compile_run, make_plan
from slm_jax.plan.report import remedies
from slm_jax.plan.search import describe, search, seconds_of
from slm_jax.slices import Slice, find_slice, row_parts
from slm_jax.train.experiment import Experiment

DESCRIPTION = f"""Compiles the training step of a run for a TPU slice or nodes of GPUs that are not
there, and says what it would need: slm plan [PRESET] --on SLICE [OPTIONS].

The preset comes first, {DEFAULT_PRESET} by default; options are those of `slm train`. Mesh,
recomputation, microbatches and compiler flags are those of tpu_configs/ where no option says
otherwise. A run of a language model has one row a device (a group of them, with --mesh.tensor), of
the model's context or 4096 tokens, unless --batch-size and --seq-len say otherwise.

--search N compiles up to N meshes, ways to recompute and microbatches, the most promising first,
and ranks them. --compare A B, two presets or two slices, prints their plans side by side.

Slices and nodes (--on): {slice_list("tpu", "gpu")}

{PRESET_NAMES}"""

_LONGEST = 4096  # tokens of a row by default
# What a good run reaches: arXiv 2204.02311, table 3, and later reports are around it.
_USUAL_MFU = 0.4


def command(args: Sequence[str]) -> None:
    """Prints the plan of what `args` describe.

    Raises:
        UserError: on a mistake in `args`, or if the step does not fit the memory.
    """
    if {"-h", "--help"} & set(args):
        name, words = split_preset([w for w in args if w not in ("--search", "--compare")])
        _, words = take_option(words, "--on")
        full_size(name, find_slice("tpu-v5e-4"), words)
    on, words = take_option(args, "--on")
    if "--compare" in words:
        _compare(on, words)
        return
    most, words = take_option(words, "--search")
    where = _find(on)
    name, words = split_preset(words)
    run = full_size(name, where, words)
    if most is not None:
        _search(name, run, where, most)
        return
    plan = _plan(run, where)
    out = console()
    out.print(f"{name} on {_slice_text(plan)}", highlight=False)
    out.print(_memory(plan))
    if not plan.compiled.fits:
        raise UserError(_too_large(plan))
    if plan.compiled.collectives:
        out.print(_collectives(plan))
    out.print(facts(_times(plan)))


def _find(on: str | None) -> Slice:
    if on is None:
        raise UserError("on=None: say which slice, as in --on tpu-v5e-256")
    where = find_slice(on)
    _ = where.device  # raises for a CPU
    return where


def full_size(name: str, where: Slice, words: Sequence[str] = ()) -> Run:
    """The run of a preset on a slice, with as many rows as the mesh splits a batch into.

    Args:
        name: of the preset.
        where: the slice.
        words: options, which may say otherwise.
    """
    start = default_run(name, where)
    if isinstance(start, Experiment):
        length = min(start.model.max_seq_len, _LONGEST)
        start = replace(start, seq_len=length, batch_size=where.devices)
    prog = f"slm plan {name} --on {where.name}"
    run = read_run(start, name, where, words, description=DESCRIPTION, prog=prog)
    if isinstance(run, Experiment) and not has_option(words, "--batch-size"):
        run = replace(run, batch_size=row_parts(run.mesh, where.devices) * run.accumulate)
    return run


def _plan(run: Run, where: Slice) -> Plan:
    _say(f"compiling for {where.name}, minutes for a large model")
    return make_plan(run, where, compile_run(run, where))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _search(name: str, run: Run, where: Slice, most: str) -> None:
    if not most.isdecimal() or int(most) < 1:
        raise UserError(f"search={most!r}: give the most candidates to compile, as in --search 12")
    found = search(run, where, limit=int(most), progress=_say)
    table = Table(title=f"{name} on {where.name}, {_rows(run)}", title_justify="left")
    for heading in ("", "memory", "share", "a step", "bound by", "MFU"):
        table.add_column(heading, justify="right" if heading else "left")
    for plan in found.fitting:
        seconds, used = seconds_of(plan), plan.compiled.device_bytes
        table.add_row(
            describe(plan.run, where),
            nbytes(used),
            f"{used / where.hbm:.0%}",
            _seconds(seconds),
            plan.bound[0] if seconds == plan.bound[1] else "the estimate",
            f"{plan.mfu(seconds):.0%}",
        )
    out = console()
    out.print(table)
    for said, runs in (
        ("compiled, too large", [plan.run for plan in found.too_large]),
        ("not compiled, too large by their state and activations alone", found.pruned),
        ("not compiled, the limit was reached", found.untried),
    ):
        shown = "; ".join(describe(r, where) for r in runs[:4]) + ("; ..." if len(runs) > 4 else "")
        if runs:
            out.print(f"{len(runs)} {said}: {shown}", highlight=False)
    if found.refused:
        out.print(f"{len(found.refused)} refused: {found.refused[0][1]}", highlight=False)
    if not found.fitting:
        if not found.too_large and not found.pruned:
            raise UserError(found.refused[-1][1])
        raise UserError(f"on={where.name}: nothing that was tried fits: take more chips")
    best = found.fitting[0].run
    options = [f"--mesh.{axis} {n}" for axis, n in found.fitting[0].mesh.items()]
    options += [f"--model.remat {best.model.remat}", f"--accumulate {best.accumulate}"]
    out.print(f"the first: {' '.join(options)}", highlight=False)


def _compare(on: str | None, words: Sequence[str]) -> None:
    """Two presets on one slice, or one preset on two slices."""
    at = list(words).index("--compare")
    pair, words = words[at + 1 : at + 3], [*words[:at], *words[at + 3 :]]
    if len(pair) < 2:
        raise UserError("--compare takes two names, of presets or of slices")
    if all(map(is_preset, pair)):
        where = _find(on)
        plans = [_plan(full_size(name, where, words), where) for name in pair]
    elif on is not None:
        raise UserError(
            f"compare={' '.join(pair)}: with --on these are two presets, and {on} is for both"
        )
    else:
        name, words = split_preset(words)
        plans = [_plan(full_size(name, _find(other), words), _find(other)) for other in pair]
    table = Table()
    table.add_column("")
    for name in pair:
        table.add_column(name, justify="right")
    sides = [_side(plan) for plan in plans]
    for row in dict.fromkeys([*sides[0], *sides[1]]):
        table.add_row(row, *(side.get(row, "") for side in sides))
    console().print(table)


def _side(plan: Plan) -> Mapping[str, str]:
    """The column of one plan."""
    c, where = plan.compiled, plan.where
    rows = {
        "slice": f"{where.name}, {where.chips:,} chips",
        "mesh, remat, microbatches": describe(plan.run, where),
        "a step": _rows(plan.run),
    }
    rows |= {name: nbytes(n) for name, n in c.arguments.items() if n}
    used = c.device_bytes if c.fits else c.temporary_bytes
    if c.fits:
        rows["temporaries"] = nbytes(c.temporary_bytes)
    rows["memory of a device"] = f"{nbytes(used)}, {used / where.hbm:.0%}"
    if not c.fits:
        return rows | {"fits": "no"}
    for kind in dict.fromkeys(x.kind for x in c.collectives):
        of_kind = [x for x in c.collectives if x.kind == kind]
        rows[f"{kind}, sent"] = (
            f"{sum(x.count for x in of_kind):,}, {nbytes(sum(x.sent for x in of_kind))}"
        )
    bound, seconds = plan.bound
    best = seconds_of(plan)
    return rows | {
        "FLOPs": f"{count(plan.model_flops)}FLOP",
        "least time": f"{_seconds(seconds)}, {bound}",
        "estimate": "none" if plan.estimate is None else _seconds(plan.estimate),
        "MFU": f"{plan.mfu(best):.0%}",
        "chip-seconds": f"{best * where.chips:.3g}",
    }


def _slice_text(plan: Plan) -> str:
    where, run = plan.where, plan.run
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    micro = f" in {run.accumulate} microbatches" if run.accumulate > 1 else ""
    shape = where.shape if where.slices == 1 else f"{where.slices} slices of {where.shape}"
    return (
        f"{where.name} ({where.chips:,} chips, {shape}), mesh {axes}: "
        f"{_rows(run)} a step{micro}, {run.model.dtype}, remat {run.model.remat}"
    )


def _rows(run: Run) -> str:
    if isinstance(run, Experiment):
        return f"{run.batch_size:,} rows of {run.seq_len:,} tokens"
    return f"{run.batch_size:,} puzzles"


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
            "no GPU is simulated" if where.platform == "gpu" else "a loop's length depends on data"
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
