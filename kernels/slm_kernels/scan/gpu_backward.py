"""Backward kernels of the scan on Hopper, equations (4) to (9) and (11) of `gpu.py`."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slm_kernels.base2 import LOG2E
from slm_kernels.scan.gpu_forward import (
    CHANNELS,
    F32,
    GROUPS,
    ROWS,
    Layout,
    Refs,
    Steps,
    launch,
    load,
    over_pieces,
    passed_on,
    place,
    rates,
    scan_from_zero,
    slots,
    zeros,
)

# Of a row in shared memory: threads that read 8 rows at once then meet different banks.
_COLUMNS = 8  # of the narrowest tile
_STRIDE = CHANNELS + _COLUMNS


def _ends_kernel(x: Refs, lay: Layout) -> None:
    row, span, channels = place()
    a2 = rates(x, lay)

    def piece(_: Any, slot: Any, carry: list[jax.Array]) -> list[jax.Array]:
        s = Steps(x, slot, a2)

        def step(i: Any, carry: list[jax.Array]) -> list[jax.Array]:
            t = lay.piece - 1 - i
            *e, total = carry
            long, dy = s.long(t, s.channels("dt", t)), s.channels("dy", t)
            e = [jnp.exp2(long * a2[n]) * (e[n] + dy * s.scalar("c", t, n)) for n in range(lay.n)]
            return [*e, total + long]

        return jax.lax.fori_loop(0, lay.piece, step, carry)

    names = [k for k in ("dt", "c", "dy", "reset") if k in x]
    # The first span is not wanted.
    carry = over_pieces(x, lay, names, piece, zeros(lay.n + 1), span=span + 1, backwards=True)
    for n in range(lay.n):
        x["ends"].at[row, span, n, channels][...] = carry[n]
    x["totals"].at[row, span, channels][...] = carry[-1]


def _backward_kernel(x: Refs, lay: Layout) -> None:
    row, span, channels = place()
    a2, skip = rates(x, lay), load(x["d"].at[channels])
    last = lay.spans - 1
    # `ends` and `totals` have no entry of the first span.
    e = passed_on(x, lay, a2, ("dlast", "ends"), last - span, lambda i: last - 1 - i)

    def write(name: str, at: Any, values: list[jax.Array]) -> None:
        for n, value in enumerate(values):
            x[name].at[at * lay.n + n, pl.ds(0, CHANNELS)][...] = value

    def read(name: str, at: Any) -> list[jax.Array]:
        return [load(x[name].at[at * lay.n + n]) for n in range(lay.n)]

    def sum_channels(out: Any) -> None:
        """Sums the rows over channels: (8) of a group's steps and states, `[64]`."""
        plgpu.commit_smem()
        tiles = [
            plgpu.load(
                x["rows_s"].at[:, pl.ds(i, _COLUMNS)], layout=plgpu.Layout.WGMMA, optimized=False
            )
            for i in range(0, CHANNELS, _COLUMNS)
        ]
        out[...] = jnp.sum(functools.reduce(operator.add, tiles), axis=1)
        plgpu.commit_smem()  # everyone has read the rows

    def piece(i: Any, slot: Any, carry: list[jax.Array]) -> list[jax.Array]:
        s = Steps(x, slot, a2)
        start = [load(x["starts"].at[row, i, n, channels]) for n in range(lay.n)]

        def replay(t: Any, h: list[jax.Array]) -> list[jax.Array]:
            dt = s.channels("dt", t)
            return s.advance(t, h, s.long(t, dt), dt * s.channels("u", t))

        def mark(group: Any, h: list[jax.Array]) -> list[jax.Array]:
            first = group * lay.group
            h = jax.lax.fori_loop(first, first + lay.group, replay, h)
            write("marks_s", group, h)
            return h

        # marks_s[g] is the state after group g: nobody wants it after the last.
        jax.lax.fori_loop(0, GROUPS - 1, mark, start)

        def reverse(turn: Any, carry: list[jax.Array]) -> list[jax.Array]:
            group = GROUPS - 1 - turn
            first = group * lay.group
            begin = jax.lax.cond(group == 0, lambda: start, lambda: read("marks_s", group - 1))

            def again(j: Any, h: list[jax.Array]) -> list[jax.Array]:
                t = first + j
                h = replay(t, h)
                dy = s.channels("dy", t)
                write("rows_s", j, [dy * state for state in h])
                pl.when(j < lay.group - 1)(lambda: write("states_s", j, h))
                return h

            jax.lax.fori_loop(0, lay.group, again, begin)
            sum_channels(x["dc_s"].at[group])

            def back(step: Any, carry: list[jax.Array]) -> list[jax.Array]:
                j = lay.group - 1 - step
                t = first + j
                e, da, dd = carry[: lay.n], carry[lay.n : -1], carry[-1]
                before = jax.lax.cond(j == 0, lambda: begin, lambda: read("states_s", j - 1))
                u, dt, dy = (s.channels(name, t) for name in ("u", "dt", "dy"))
                long, dtu = s.long(t, dt), dt * u
                db = []
                sum_b, sum_a = zeros(2)
                for n in range(lay.n):
                    grad = e[n] + dy * s.scalar("c", t, n)  # (4)
                    db.append(dtu * grad)
                    sum_b += grad * s.scalar("b", t, n)  # (6)
                    e[n] = jnp.exp2(long * a2[n]) * grad
                    q = e[n] * before[n]  # (5)
                    sum_a += q * a2[n]
                    da[n] = da[n] + q * dt  # (9)
                write("rows_s", j, db)
                # (7), in the place of what nobody reads again.
                new = {"u": dt * sum_b + skip * dy, "dt": u * sum_b + sum_a * (1 / LOG2E)}
                for name, value in new.items():
                    x[f"{name}_s"].at[slot, t][...] = value.astype(x[name].dtype)
                return [*e, *da, dd + dy * u]

            carry = jax.lax.fori_loop(0, lay.group, back, carry)
            sum_channels(x["db_s"].at[group])
            return carry

        carry = jax.lax.fori_loop(0, GROUPS, reverse, carry)
        plgpu.commit_smem()
        steps, groups = pl.ds(i * lay.piece, lay.piece), pl.ds(i * GROUPS, GROUPS)
        block = jax.lax.axis_index("block")
        plgpu.copy_smem_to_gmem(x["u_s"].at[slot], x["du"].at[row, steps, channels])
        plgpu.copy_smem_to_gmem(x["dt_s"].at[slot], x["ddt"].at[row, steps, channels])
        for name in ("db", "dc"):
            plgpu.copy_smem_to_gmem(x[f"{name}_s"], x[name].at[row, block, groups])
        plgpu.wait_smem_to_gmem(0)  # the slot takes another piece
        return carry

    names = [k for k in ("u", "dt", "dy", "b", "c", "reset") if k in x]
    carry = [*e, *zeros(lay.n + 1)]
    carry = over_pieces(x, lay, names, piece, carry, span=span, backwards=True)
    for n in range(lay.n):
        x["da"].at[row, span, n, channels][...] = carry[lay.n + n]
    x["dd"].at[row, span, channels][...] = carry[-1]

    @pl.when(span == 0)
    def _() -> None:
        for n in range(lay.n):
            x["dinitial"].at[row, n, channels][...] = carry[n]


def backward(
    lay: Layout,
    args: Mapping[str, Any],
    starts: jax.Array,
    dy: jax.Array,
    dlast: jax.Array,
) -> dict[str, jax.Array]:
    """Gradients by name, `du`, `ddt`, `da`, `db`, `dc`, `dd`, `dinitial`, shaped as the arguments.

    Args:
        lay: how the arrays are cut.
        args: what `forward` took.
        starts: the states before each piece, that it returned.
        dy: gradient of `y`.
        dlast: gradient of `last`.
    """
    u, dt = args["u"], args["dt"]
    batch, length, width = u.shape
    blocks, work = width // CHANNELS, u.size * lay.n

    def result(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    first = {k: args[k] for k in ("dt", "c", "reset")} | {"dy": dy}
    ends = scan_from_zero(_ends_kernel, "selective_scan_gradient_ends", lay, first, args["a2"])
    inputs = {k: args[k] for k in ("u", "dt", "b", "c", "reset")} | {"dy": dy}
    sums = result(blocks, lay.steps * lay.n // ROWS, ROWS)
    out = launch(
        lambda x: _backward_kernel(x, lay),
        "selective_scan_backward",
        (blocks, lay.spans, batch),
        inputs | {k: args[k] for k in ("a2", "d")} | ends | {"starts": starts, "dlast": dlast},
        {
            "du": result(length, width, dtype=u.dtype),
            "ddt": result(length, width, dtype=dt.dtype),
            "db": sums,
            "dc": sums,
            "da": result(lay.spans, lay.n, width),
            "dd": result(lay.spans, width),
            "dinitial": result(lay.n, width),
        },
        slots(lay, inputs)
        | {
            "marks_s": plgpu.SMEM(((GROUPS - 1) * lay.n, CHANNELS), F32),
            "states_s": plgpu.SMEM(((lay.group - 1) * lay.n, CHANNELS), F32),
            "rows_s": plgpu.SMEM((ROWS, _STRIDE), F32),
            "db_s": plgpu.SMEM((GROUPS, ROWS), F32),
            "dc_s": plgpu.SMEM((GROUPS, ROWS), F32),
        },
        flops=24 * work + 9 * u.size,
        exps=3 * work,
    )
    for name in ("db", "dc"):
        out[name] = out[name].sum(1).reshape(batch, length, lay.n)
    return out | {"da": out["da"].sum((0, 1)), "dd": out["dd"].sum((0, 1))}
