"""Backward kernel of the TPU scan, equations (4) to (9) of `tpu.py`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.base2 import LOG2E
from slm_kernels.scan.tpu_forward import (
    F32,
    LANES,
    Layout,
    call,
    each,
    full,
    narrow,
    reader,
    shared,
    specs,
    spread_all,
    wide,
    writer,
)


def _backward_kernel(x: dict[str, Any], lay: Layout) -> None:
    rows, group, resets = lay.rows, lay.group, x["reset"] is not None
    turns = lay.chunk // lay.unroll
    begins = pl.program_id(1) == 0
    spread_all(x, lay)

    def channels(block: Any) -> None:
        @pl.when(begins)
        def _() -> None:
            x["dinitial"][block] = x["dlast"][block]
            x["da"][block] = jnp.zeros(x["da"].shape[1:], F32)
            x["dd"][block] = jnp.zeros(x["dd"].shape[1:], F32)

        u, dt, dy = (reader(x[k], x[f"{k}_wide"], block, lay) for k in ("u", "dt", "dy"))
        du, ddt = (writer(x[k], x[f"{k}_wide"], block, lay) for k in ("du", "ddt"))
        skip = x["d"][block]

        def decay_steps(i: Any, j: int) -> jax.Array:
            dt_t = dt.get(i, j)
            if resets:
                dt_t = dt_t + full(x["r_full"], slice(None), i * lay.unroll + j, rows)[0]
            return dt_t

        def states(g: Any) -> None:
            of = pl.ds(g * group, group)

            def replay(i: jax.Array, h: jax.Array) -> jax.Array:
                for j in range(lay.unroll):
                    t = i * lay.unroll + j
                    x["h"][t] = h
                    decay = jnp.exp2(decay_steps(i, j) * x["a2"][block, of])
                    dtu = dt.get(i, j) * u.get(i, j)
                    h = decay * h + dtu * full(x["b_full"], of, t, rows)
                return h

            x["h"][lay.chunk] = jax.lax.fori_loop(0, turns, replay, x["start"][block, of])

            def sum_rows(i: Any, j: int) -> None:
                """Adds steps j .. j + 7 of (8) over sublanes."""
                for name in ("db", "dc"):
                    rows_ref, lanes_ref = x[f"{name}_rows"], x[f"{name}_lanes"]
                    at = of, pl.ds(pl.multiple_of(i * lay.unroll + j, 8), 8)
                    total = jnp.where(block == 0, 0.0, lanes_ref[at])
                    if rows == 8:  # a load takes 8 rows of 32, no more: sums of 4, then of 2
                        for half in (0, 32):
                            some = (j * 8 + half + r for r in range(4))
                            fours = [rows_ref[:, pl.ds(r, 8, stride=4), :] for r in some]
                            rows_ref[:, pl.ds(j * 8 + half // 4, 8)] = sum(fours[1:], fours[0])
                        for r in range(2):
                            total += rows_ref[:, pl.ds(j * 8 + r, 8, stride=2), :]
                    else:
                        for r in range(rows):
                            total += rows_ref[:, pl.ds(j * rows + r, 8, stride=rows), :]
                    lanes_ref[at] = total

            def reverse(turn: jax.Array, carry: Any) -> Any:
                i = turns - 1 - turn
                e, da, dd = list(carry[0]), list(carry[1]), carry[2]
                for j in reversed(range(lay.unroll)):
                    t = i * lay.unroll + j
                    u_t, dt_t, dy_t = u.get(i, j), dt.get(i, j), dy.get(i, j)
                    b_t, c_t = (full(x[name], of, t, rows) for name in ("b_full", "c_full"))
                    before, db = x["h"][t], []
                    x["dc_rows"][:, pl.ds(j * rows, rows)] = dy_t * x["h"][t + 1]
                    dtu, long, a2 = dt_t * u_t, decay_steps(i, j), x["a2"][block, of]
                    s, s_a = jnp.zeros_like(u_t), jnp.zeros_like(u_t)
                    # State by state: all of a group at once would spill registers.
                    for k in range(group):
                        grad = e[k] + dy_t * c_t[k]
                        db.append(dtu * grad)
                        s = s + grad * b_t[k]
                        e[k] = jnp.exp2(long * a2[k]) * grad
                        q = e[k] * before[k]
                        s_a = s_a + q * a2[k]
                        da[k] = da[k] + q * dt_t
                    x["db_rows"][:, pl.ds(j * rows, rows)] = jnp.stack(db)
                    dd = dd + dy_t * u_t
                    du_t, ddt_t = skip * dy_t, s_a * (1 / LOG2E)
                    if lay.n != group:
                        du_t = jnp.where(g == 0, du_t, du.get(i, j))
                        ddt_t += jnp.where(g == 0, 0.0, ddt.get(i, j))
                    du.set(i, j, du_t + dt_t * s)
                    ddt.set(i, j, ddt_t + u_t * s)
                    if j & 7 == 0:
                        sum_rows(i, j)
                return tuple(e), tuple(da), dd

            zero = jnp.zeros((rows, LANES), F32)
            e = tuple(x["dinitial"][block, g * group + k] for k in range(group))
            carry = e, (zero,) * group, zero
            e, da, dd = jax.lax.fori_loop(0, turns, reverse, carry)
            x["dinitial"][block, of] = jnp.stack(e)
            x["da"][block, of] += jnp.stack(da)
            x["dd"][block] += jnp.where(g == 0, dd, 0.0)

        each(lay.n // group, states)
        for k in ("du", "ddt"):
            narrow(x[k], x[f"{k}_wide"], block)

    each(lay.blocks, channels)

    def sum_lanes(g: Any) -> None:
        for name in ("db", "dc"):
            for k in range(group):
                turned = x[f"{name}_lanes"][g * group + k].T
                total = jnp.sum(turned, axis=0, keepdims=True)
                x[name][pl.ds(g * group + k, 1), :] = total

    each(lay.n // group, sum_lanes)


def backward(lay: Layout, args: Any, starts: Any, dy: Any, dlast: Any) -> dict[str, Any]:
    """Gradients of all arguments; those of a and d for each sequence of the batch.

    Args:
        lay: how the arrays are cut.
        args: what `forward` took, without the initial state.
        starts: the states that it saved.
        dy: gradient of `y`, laid out as `y`.
        dlast: gradient of the last state.
    """
    u, dt, a, b, _, d, _ = args
    batch, chunks = b.shape[:2]
    spec = specs(lay, lambda t: chunks - 1 - t)
    inputs, scratch = shared(lay, spec, *args)
    lanes = pltpu.VMEM((lay.n, lay.chunk, LANES), F32)
    sums = pltpu.VMEM((lay.group, lay.unroll * lay.rows, LANES), F32)
    work = u.size * lay.n

    def like(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return call(
        _backward_kernel,
        lay,
        inputs
        | {
            "dy": (dy, spec["steps"]),
            "start": (starts, spec["start"]),
            "dlast": (dlast, spec["state"]),
        },
        {
            "du": (like(*u.shape, dtype=u.dtype), spec["steps"]),
            "ddt": (like(*dt.shape, dtype=dt.dtype), spec["steps"]),
            "da": (like(batch, *a.shape), spec["state"]),
            "db": (like(*b.shape), spec["b"]),
            "dc": (like(*b.shape), spec["b"]),
            "dd": (like(batch, *d.shape), spec["skip"]),
            "dinitial": (like(*dlast.shape), spec["state"]),
        },
        scratch
        | {
            "dy_wide": wide(dy, lay),
            "du_wide": wide(u, lay),
            "ddt_wide": wide(dt, lay),
            "h": pltpu.VMEM((lay.chunk + 1, lay.group, lay.rows, LANES), F32),
            "db_rows": sums,
            "dc_rows": sums,
            "db_lanes": lanes,
            "dc_lanes": lanes,
        },
        name="selective_scan_backward",
        flops=20 * work + 9 * u.size,
        exps=work,
    )
