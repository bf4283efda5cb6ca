"""Tries meshes, recomputation and microbatches of a run on a slice, and ranks what fits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slm_jax.errors import UserError
from slm_jax.models.presets import summary
from slm_jax.models.trm import n_parameters
from slm_jax.parallel import MeshConfig
from slm_jax.plan.memory import least_bytes
from slm_jax.plan.program import Compiled, Run, compile_run
from slm_jax.plan.report import Plan, make_plan
from slm_jax.slices import Slice, row_parts
from slm_jax.train.experiment import Experiment, rows_add_up

AXES = ("data", "fsdp", "tensor")
"""Mesh axes that are tried."""


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        fitting: plans that fit, the fastest first.
        too_large: plans that the compiler refused for their memory.
        pruned: candidates whose lower bound of memory is above the device's: not compiled.
        refused: candidates that the model does not divide over, or the compiler cannot, and why.
        untried: candidates left when `limit` were compiled.
    """

    fitting: Sequence[Plan]
    too_large: Sequence[Plan]
    pruned: Sequence[Run]
    refused: Sequence[tuple[Run, str]]
    untried: Sequence[Run]


def search(
    run: Run,
    where: Slice,
    *,
    limit: int,
    progress: Callable[[str], None],
    compile_one: Callable[[Run, Slice], Compiled] = compile_run,
) -> Found:
    """Compiles candidates for a slice, those first that promise to be fastest.

    Args:
        run: the configuration; its rows and its model stay what they are.
        where: the slice.
        limit: most candidates that are compiled.
        progress: is told a line before and after each of them.
        compile_one: the compiler.
    """
    pruned, refused, left = [], [], []
    for candidate in candidates(run, where):
        try:
            least = least_bytes(candidate, where.devices)
        except UserError as error:
            refused.append((candidate, str(error)))
            continue
        if least > where.hbm:
            pruned.append(candidate)
        else:
            left.append((_guess(candidate, where), least, candidate))
    left.sort(key=lambda guessed: guessed[:2])
    progress(
        f"{len(left)} candidates, {len(pruned)} pruned by their least memory, {len(refused)} that "
        f"the model does not divide over; compiling {min(limit, len(left))}"
    )
    plans = []
    for n, (*_, candidate) in enumerate(left[:limit], 1):
        progress(f"{n}/{min(limit, len(left))} {describe(candidate, where)}")
        try:
            plan = make_plan(candidate, where, compile_one(candidate, where))
        except UserError as error:
            refused.append((candidate, str(error)))
            progress(f"  refused: {error}")
            continue
        plans.append(plan)
        share = f"{_used(plan) / where.hbm:.0%} of the memory"
        seconds = f", {seconds_of(plan) * 1e3:.3g} ms a step" if plan.compiled.fits else ""
        progress(f"  {'fits' if plan.compiled.fits else 'does not fit'}: {share}{seconds}")
    return Found(
        fitting=sorted((p for p in plans if p.compiled.fits), key=seconds_of),
        too_large=[p for p in plans if not p.compiled.fits],
        pruned=pruned,
        refused=refused,
        untried=[candidate for *_, candidate in left[limit:]],
    )


def seconds_of(plan: Plan) -> float:
    """What a plan is ranked by: the compiler's estimate, or the largest bound where that is more.

    The estimate has no collectives in it, as if all were hidden, and the bounds have.
    """
    return max(plan.estimate or 0.0, plan.bound[1])


def describe(run: Run, where: Slice) -> str:
    """`fsdp 32 x tensor 8, remat full, 2 microbatches`."""
    sizes = zip(AXES, _along(run.mesh, where.devices), strict=True)
    mesh = " x ".join(f"{axis} {n}" for axis, n in sizes if n > 1) or "one device"
    parts = "1 microbatch" if run.accumulate == 1 else f"{run.accumulate} microbatches"
    return f"{mesh}, remat {run.model.remat}, {parts}"


def candidates(run: Run, where: Slice) -> Iterator[Run]:
    """Every mesh over `AXES`, every remat that the model has and every number of microbatches.

    Rows divide over the mesh and the microbatches; the numbers of microbatches are powers of two,
    and only the run's own where another would change what is computed.
    """
    remats = ("none", "dots", "full") if isinstance(run, Experiment) else ("none", "full")
    free = isinstance(run, Experiment) and rows_add_up(run.model)
    rest = run.mesh.expert * run.mesh.sequence
    if rest < 1 or where.devices % rest:
        raise UserError(
            f"mesh.expert={run.mesh.expert}, mesh.sequence={run.mesh.sequence}: give numbers that "
            f"divide {where.devices} devices; the search is over {', '.join(AXES)}"
        )
    for data, fsdp, tensor in _splits(where.devices // rest):
        mesh = replace(run.mesh, data=data, fsdp=fsdp, tensor=tensor)
        rows, more = divmod(run.batch_size, row_parts(mesh, where.devices))
        if more or not rows:
            continue
        powers = [2**i for i in range(rows.bit_length())] if free else [run.accumulate]
        for accumulate in (n for n in powers if rows % n == 0):
            for remat in remats:
                given: Any = replace(run, mesh=mesh, accumulate=accumulate)
                yield replace(given, model=replace(given.model, remat=remat))


def _splits(n: int) -> Iterator[tuple[int, int, int]]:
    """Every (a, b, c) with a b c = n."""
    for a in (d for d in range(1, n + 1) if n % d == 0):
        for b in (d for d in range(1, n // a + 1) if n // a % d == 0):
            yield a, b, n // a // b


def _along(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    data, fsdp, _, _, tensor = mesh.resolve(devices)
    return data, fsdp, tensor


def _used(plan: Plan) -> float:
    c = plan.compiled
    return c.device_bytes if c.fits else c.temporary_bytes


def _guess(run: Run, where: Slice) -> float:
    """Seconds that say in which order to compile, from the configuration alone.

    Matrix products at their peak, and then what a device sends: with fsdp the weights in the
    compute dtype, forward, backward and as gradients, in each microbatch; with data the gradients,
    twice; with tensor the activations of each layer, four times, twice each.
    """
    data, fsdp, tensor = _along(run.mesh, where.devices)
    plan = make_plan(run, where, Compiled({}))
    wide = 2 if run.model.dtype == "bfloat16" else 4
    weights = _n_weights(run) / tensor
    sent = 3 * run.accumulate * wide * weights * (fsdp - 1) / fsdp
    sent += 2 * 4 * weights / fsdp * (data - 1) / data
    if isinstance(run, Experiment):
        tokens = run.batch_size * run.seq_len / row_parts(run.mesh, where.devices)
        layers = run.model.n_layers
        sent += 8 * wide * tokens * run.model.d_model * layers * (tensor - 1) / tensor
    least = plan.bounds["matrix units"] + sent / where.interconnect
    return least * (1 + math.log2(run.accumulate) / 1000)  # of equals, the fewest microbatches


def _n_weights(run: Run) -> int:
    if isinstance(run, Experiment):
        return summary(run.model, run.seq_len).total
    return n_parameters(run.model)
