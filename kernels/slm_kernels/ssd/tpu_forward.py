"""Forward kernel of state-space duality, and what it shares with the backward: see `tpu.py`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.pallas import interpret
from slm_kernels.ssd.decay import FINE
from slm_kernels.ssd.layout import LANES, Layout

F32 = jnp.float32
NN, NT = ((1,), (0,)), ((1,), (1,))  # contracted dimensions


def dot(x: jax.Array, y: jax.Array, contract: Any = NN) -> jax.Array:
    """Product in float32, exact but for the rounding of float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == F32 else None
    return jax.lax.dot_general(
        x, y, (contract, ((), ())), precision=precision, preferred_element_type=F32
    )


def transposed(x: jax.Array) -> jax.Array:
    """Of a matrix; transposes are of 32 bits."""
    return x.astype(F32).T.astype(x.dtype)


def order(lay: Layout) -> tuple[jax.Array, jax.Array]:
    """Index of row and column in a matrix of steps."""
    shape = lay.chunk, lay.chunk
    row, col = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, col


def fill_rows(x: dict[str, Any], lay: Layout, chunk: Any) -> None:
    """`high`, `passed` = exp(high), `p`, `q` and `v` of all heads, equations (1) and (5)."""
    row, column = order(lay)
    upto = jnp.where(row <= column, 1.0, 0.0)
    log = x["log"][chunk]
    rough = jnp.floor(log * FINE + 0.5) * (1 / FINE)
    high, low = dot(rough, upto), dot(log - rough, upto)
    end = slice(lay.chunk - 1, lay.chunk)
    x["high"][...] = high
    x["passed"][...] = jnp.exp2(high)
    x["p"][...] = jnp.exp2(low)
    x["q"][...] = x["dt"][chunk] * jnp.exp2(-low)
    x["v"][...] = jnp.exp2(high[:, end] - high) * jnp.exp2(low[:, end])


def row_of(ref: Any, head: Any) -> jax.Array:
    """`[1, Q]` of one head."""
    return ref[pl.ds(head, 1), :]


def column(row: jax.Array) -> jax.Array:
    """`[1, Q]` to `[Q, Q]`, constant along rows."""
    return jnp.broadcast_to(row, (row.shape[1], row.shape[1])).T


def spread(ref: Any, lay: Layout, head: Any) -> jax.Array:
    """Rows of a tile's heads to `[Q, 128]`, each over the lanes of its head."""
    rows = [
        jnp.broadcast_to(row_of(ref, head + r), (lay.p, lay.chunk)) for r in range(lay.per_tile)
    ]
    return jnp.concatenate(rows, axis=0).T


def only(x: jax.Array, lay: Layout, r: int) -> jax.Array:
    """`x` with the lanes of a tile's other heads 0."""
    if lay.per_tile == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= r * lay.p) & (lane < (r + 1) * lay.p), x, jnp.zeros_like(x))


def tile_at(lay: Layout, group: Any, k: Any) -> tuple[Any, Any]:
    """Lanes and first head of tile k of a group."""
    tile = group * lay.tiles + k
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES), tile * lay.per_tile


def steps_at(lay: Layout, chunk: Any) -> Any:
    """Steps of a chunk in the block."""
    return pl.ds(pl.multiple_of(chunk * lay.chunk, 8), lay.chunk)


def next_state(
    x: dict[str, Any], lay: Layout, b_t: jax.Array, xs: jax.Array, state: jax.Array, head: Any
) -> jax.Array:
    """Equation (4) for a tile."""
    end = slice(lay.chunk - 1, lay.chunk)
    passed, p, q, v = (spread(x[name], lay, head) for name in ("passed", "p", "q", "v"))
    return (passed * p)[end] * state + dot(b_t, (v * q * xs).astype(b_t.dtype))


def call(
    kernel: Any,
    lay: Layout,
    at: Any,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    scratch: dict[str, Any],
    *,
    name: str,
    flops: int,
    exps: int,
) -> dict[str, Any]:
    """`pallas_call` by names.

    Args:
        kernel: called with the references by name, and the layout.
        lay: how the arrays are cut.
        at: maps the grid's time axis to the block.
        inputs: arrays by name; a name says how an array is cut.
        outputs: shapes by name; one that is None is None in the kernel too.
        scratch: memory beside the rows of `fill_rows`.
        name: of the kernel.
        flops: that it does.
        exps: exponentials.
    """
    row = pltpu.VMEM((lay.n_rows, lay.chunk), F32)
    scratch = dict.fromkeys(("high", "passed", "p", "q", "v"), row) | scratch
    outs = {k: v for k, v in outputs.items() if v is not None}
    steps, rows = (None, lay.steps, lay.width), (None, lay.chunks, lay.n_rows, lay.chunk)
    projection = None, lay.groups, lay.steps, lay.n
    state = None, lay.n, lay.width
    shapes: dict[str, tuple[Any, Any]] = {
        **{k: (steps, lambda b, t: (b, at(t), 0)) for k in ("x", "y", "dy", "dx")},
        **{k: (rows, lambda b, t: (b, at(t), 0, 0)) for k in ("dt", "log", "ddt", "dlog")},
        **{k: (projection, lambda b, t: (b, 0, at(t), 0)) for k in ("b", "c", "db", "dc")},
        **{k: (state, lambda b, t: (b, 0, 0)) for k in ("h0", "last", "dlast", "dh0")},
        "starts": ((None, *state), lambda b, t: (b, at(t), 0, 0)),
        "d": ((1, lay.width), lambda b, t: (0, 0)),
        "dd": ((None, 1, lay.width), lambda b, t: (b, 0, 0)),
    }
    names = [*inputs, *outs, *scratch]
    arrays = {**inputs, **outs}
    held = 2 * sum(
        math.prod(size or 1 for size in shapes[k][0]) * v.dtype.itemsize for k, v in arrays.items()
    ) + sum(math.prod(s.shape) * s.dtype.itemsize for s in scratch.values())
    got = pl.pallas_call(
        lambda *refs: kernel(dict.fromkeys(outputs) | dict(zip(names, refs, strict=True)), lay),
        grid=(lay.shape[0], lay.blocks),
        in_specs=[pl.BlockSpec(*shapes[k]) for k in inputs],
        out_specs=[pl.BlockSpec(*shapes[k]) for k in outs],
        out_shape=list(outs.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=held * 5 // 4 + 2**23,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=exps,
            bytes_accessed=sum(v.size * v.dtype.itemsize for v in arrays.values()),
        ),
        interpret=interpret(),
        name=name,
    )(*inputs.values())
    return dict.fromkeys(outputs) | dict(zip(outs, got, strict=True))


# --- forward


def _forward_kernel(x: dict[str, Any], lay: Layout) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        x["last"][...] = x["h0"][...]

    if x["starts"] is not None:
        x["starts"][...] = x["last"][...]
    i, j = order(lay)

    @pl.loop(0, lay.chunks)
    def _(chunk: jax.Array) -> None:
        fill_rows(x, lay, chunk)
        at = steps_at(lay, chunk)

        @pl.loop(0, lay.groups)
        def _(group: jax.Array) -> None:
            b, c = x["b"][group, at], x["c"][group, at]
            scores, b_t = dot(c, b, NT), transposed(b)

            @pl.loop(0, lay.tiles, unroll=2 if lay.tiles & 1 == 0 else 1)
            def _(k: jax.Array) -> None:
                lanes, head = tile_at(lay, group, k)
                xs, state = x["x"][at, lanes].astype(F32), x["last"][:, lanes]
                y = spread(x["passed"], lay, head) * dot(c, state.astype(c.dtype))  # (3)
                for r in range(lay.per_tile):
                    high = row_of(x["high"], head + r)
                    between = jnp.where(i >= j, column(high) - high, -jnp.inf)
                    m = jnp.exp2(between) * (scores * row_of(x["q"], head + r))
                    y += dot(m.astype(c.dtype), only(xs, lay, r).astype(c.dtype))  # (2)
                y = spread(x["p"], lay, head) * y + x["d"][:, lanes] * xs
                x["y"][at, lanes] = y.astype(x["y"].dtype)
                x["last"][:, lanes] = next_state(x, lay, b_t, xs, state, head)


def products(lay: Layout) -> tuple[int, int, int]:
    """Flops of a head's product within chunks, of a tile's with the state, of a group's scores."""
    steps, tiles = lay.shape[0] * lay.blocks * lay.steps, lay.groups * lay.tiles
    within = 2 * steps * tiles * lay.per_tile * lay.chunk * lay.p
    return within, 2 * steps * tiles * LANES * lay.n, 2 * steps * lay.groups * lay.chunk * lay.n


def forward(lay: Layout, save: bool, *args: Any) -> dict[str, Any]:
    """`y` and `last`, and with `save` the states before each block, `[B, blocks, N, width]`.

    Args:
        lay: how the arrays are cut.
        save: whether a backward pass follows.
        *args: x, dt, log, b, c, d and the initial state, in the layout of the kernels.
    """
    inputs = dict(zip(("x", "dt", "log", "b", "c", "d", "h0"), args, strict=True))
    x, h0 = inputs["x"], inputs["h0"]
    starts = jax.ShapeDtypeStruct((h0.shape[0], lay.blocks, *h0.shape[1:]), F32)
    within, state, scores = products(lay)
    return call(
        _forward_kernel,
        lay,
        lambda t: t,
        inputs,
        {
            "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "last": jax.ShapeDtypeStruct(h0.shape, F32),
            "starts": starts if save else None,
        },
        {},
        name="ssd_forward",
        flops=within + 2 * state + scores,
        exps=within // (2 * lay.p),
    )
