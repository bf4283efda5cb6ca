"""Backward kernel of state-space duality, equations (6) to (13) of `tpu.py`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.ssd.layout import Layout
from slm_kernels.ssd.tpu_forward import (
    F32,
    NT,
    call,
    column,
    dot,
    fill_rows,
    next_state,
    only,
    order,
    products,
    row_of,
    spread,
    steps_at,
    tile_at,
    transposed,
)


def _head_sums(x: jax.Array, lay: Layout) -> list[jax.Array]:
    """`[Q, 128]` to a row `[1, Q]` for each head of the tile."""
    x = x.T
    heads = [x[r * lay.p : (r + 1) * lay.p] for r in range(lay.per_tile)]
    return [jnp.sum(head, axis=0, keepdims=True) for head in heads]


def _replay(x: dict[str, Any], lay: Layout) -> None:
    """The states before each chunk of the block."""
    x["states"][0] = x["starts"][...]

    @pl.loop(0, lay.chunks - 1)
    def _(chunk: jax.Array) -> None:
        fill_rows(x, lay, chunk)
        at = steps_at(lay, chunk)

        @pl.loop(0, lay.groups)
        def _(group: jax.Array) -> None:
            b_t = transposed(x["b"][group, at])

            @pl.loop(0, lay.tiles)
            def _(k: jax.Array) -> None:
                lanes, head = tile_at(lay, group, k)
                xs, state = x["x"][at, lanes].astype(F32), x["states"][chunk, :, lanes]
                x["states"][chunk + 1, :, lanes] = next_state(x, lay, b_t, xs, state, head)


def _tile(
    x: dict[str, Any], lay: Layout, chunk: Any, group: Any, k: Any, given: dict[str, jax.Array]
) -> None:
    """Gradients of one tile in one chunk; adds to those of its group."""
    at, end = steps_at(lay, chunk), slice(lay.chunk - 1, lay.chunk)
    lanes, head = tile_at(lay, group, k)
    xs, dy = x["x"][at, lanes].astype(F32), x["dy"][at, lanes].astype(F32)
    state, g = x["states"][chunk, :, lanes], x["dh0"][:, lanes]
    b, c = given["b"], given["c"]
    passed, p, q, v = (spread(x[name], lay, head) for name in ("passed", "p", "q", "v"))
    dyp, xq = p * dy, q * xs
    dyp_low = dyp.astype(b.dtype)
    i, j = given["i"], given["j"]

    across, bg = [], dot(b, g.astype(b.dtype))
    dxq = v * bg
    for r in range(lay.per_tile):
        high = row_of(x["high"], head + r)
        decay = jnp.exp2(jnp.where(j <= i, high - column(high), -jnp.inf))
        t = decay * given["scores_t"]
        z = dot(only(xq, lay, r).astype(b.dtype), dyp_low, NT)  # (6)
        dxq += dot(t.astype(b.dtype), only(dyp, lay, r).astype(b.dtype))  # (7)
        x["dscores"][...] += z * decay  # (8)
        pair = z * t
        since = dot(pair.astype(b.dtype), given["since"].astype(b.dtype))
        across.append(jnp.sum(jnp.where(j < i, since, 0.0), axis=0, keepdims=True))  # (12)
    x["dx"][at, lanes] = (q * dxq + x["d"][:, lanes] * dy).astype(x["dx"].dtype)
    x["dd"][:, lanes] += jnp.sum(dy * xs, axis=0, keepdims=True)

    e_dy = passed * dyp
    e_dy_low = e_dy.astype(b.dtype)
    decay_end = (passed * p)[end]
    x["db_sum"][...] += dot((v * xq).astype(b.dtype), g.astype(b.dtype), NT)  # (9)
    x["dc_sum"][...] += dot(e_dy_low, state.astype(b.dtype), NT)  # (10)
    x["dh0"][:, lanes] = decay_end * g + dot(given["c_t"], e_dy_low)  # (11)

    # The terms of (12), each at the step from which on, or up to which, it counts, and (13).
    inflow = _head_sums(e_dy * dot(c, state.astype(b.dtype)), lay)
    outflow, direct = _head_sums(v * bg * xq, lay), _head_sums(xs * dxq, lay)
    through = decay_end * jnp.sum(g * state, axis=0, keepdims=True)
    last = jax.lax.broadcasted_iota(jnp.int32, (1, lay.chunk), 1) == lay.chunk - 1
    for r in range(lay.per_tile):
        whole = jnp.sum(only(through, lay, r), axis=1, keepdims=True)
        at_head = pl.ds(head + r, 1), slice(None)
        x["across"][at_head] = across[r]
        x["from"][at_head] = inflow[r] + jnp.where(last, whole, 0.0)
        x["until"][at_head] = outflow[r]
        x["direct"][at_head] = direct[r]


def _backward_kernel(x: dict[str, Any], lay: Layout) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        x["dh0"][...] = x["dlast"][...]
        x["dd"][...] = jnp.zeros(x["dd"].shape, F32)
        for name in ("across", "from", "until", "direct"):  # rows of no head
            x[name][...] = jnp.zeros(x[name].shape, F32)

    _replay(x, lay)
    row, col = order(lay)
    since, before = (jnp.where(w, 1.0, 0.0) for w in (row >= col, row < col))

    @pl.loop(0, lay.chunks)
    def _(turn: jax.Array) -> None:
        chunk = lay.chunks - 1 - turn
        fill_rows(x, lay, chunk)
        at = steps_at(lay, chunk)

        @pl.loop(0, lay.groups)
        def _(group: jax.Array) -> None:
            b, c = x["b"][group, at], x["c"][group, at]
            given = {"b": b, "c": c, "scores_t": dot(b, c, NT), "c_t": transposed(c)}
            given |= {"j": row, "i": col, "since": since}
            for name in ("dscores", "db_sum", "dc_sum"):
                x[name][...] = jnp.zeros(x[name].shape, F32)

            @pl.loop(0, lay.tiles)
            def _(k: jax.Array) -> None:
                _tile(x, lay, chunk, group, k, given)

            dscores = x["dscores"][...]
            db = x["db_sum"][...] + dot(dscores.astype(c.dtype), c)
            dc = x["dc_sum"][...] + dot(dscores.T.astype(b.dtype), b)
            x["db"][group, at], x["dc"][group, at] = db.astype(b.dtype), dc.astype(b.dtype)

        dlog = dot(x["from"][...], since) + dot(x["until"][...], before)  # (12)
        x["dlog"][chunk] = (x["across"][...] + dlog) * math.log(2)
        x["ddt"][chunk] = x["direct"][...] / x["p"][...]  # (13)


def backward(lay: Layout, args: Any, starts: Any, dy: Any, dlast: Any) -> dict[str, Any]:
    """Gradients of all arguments; that of d for each sequence of the batch.

    Args:
        lay: how the arrays are cut.
        args: what `forward` took, without the initial state.
        starts: the states that it saved.
        dy: gradient of `y`, laid out as `y`.
        dlast: gradient of the last state.
    """
    inputs = dict(zip(("x", "dt", "log", "b", "c", "d"), args, strict=True))
    inputs |= {"starts": starts, "dy": dy, "dlast": dlast}

    def like(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype)

    row = pltpu.VMEM((lay.n_rows, lay.chunk), F32)
    projection = pltpu.VMEM((lay.chunk, lay.n), F32)
    within, state, scores = products(lay)
    return call(
        _backward_kernel,
        lay,
        lambda t: lay.blocks - 1 - t,
        inputs,
        {
            "dx": like("x"),
            "ddt": like("dt"),
            "dlog": like("log"),
            "db": like("b"),
            "dc": like("c"),
            "dd": jax.ShapeDtypeStruct((lay.shape[0], 1, lay.width), F32),
            "dh0": like("dlast"),
        },
        {
            "states": pltpu.VMEM((lay.chunks, lay.n, lay.width), F32),
            "dscores": pltpu.VMEM((lay.chunk, lay.chunk), F32),
            "db_sum": projection,
            "dc_sum": projection,
            "across": row,
            "from": row,
            "until": row,
            "direct": row,
        },
        name="ssd_backward",
        # Z, dx', and the sums of (12); five products with states, and one to have them again.
        flops=(2 * lay.p + lay.chunk) * (within // lay.p) + 6 * state + 3 * scores,
        exps=within // (2 * lay.p),
    )
