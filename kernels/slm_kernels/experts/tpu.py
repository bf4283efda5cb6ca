"""Grouped matrix product on TPU: each group's matrix is read once a block of columns, as it is.

    y[m, n] = scale[g, n] sum_k x[m, k] w[g, k, n]        for the rows m of group g             (1)

Rows go in tiles of tm. A visit is a tile and a group that has rows in it, in the order of the
rows, so at most rows / tm + groups visits (the idea of arXiv 2211.15841, section 5.1):

    rows    | tile 0 | tile 1 | tile 2 |       visit   0  1  2  3  4
    groups  | 0  | 1        | 2  | none        tile    0  0  1  1  2      2: its rows of no group
                                               group   0  1  1  2  2         stay zero

    grid (columns / bn, visits)     x, y [tm, K or bn]     w [K, bn], bfloat16 or int8

A visit writes the rows of its group; a tile stays in VMEM from visit to visit, as does a matrix.
int8 weights become the type of x in VMEM and the scale multiplies the sum: they are never written
in another type. Which visit is which is data, and prefetched; it is stored as the difference from
one visit a tile and groups of one size, so that a table of zeros is a schedule that runs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.attention.tpu_tiles import LANES, shape_like, varying, vmem_limit
from slm_kernels.experts.xla import grouped_matmul_xla
from slm_kernels.pallas import interpret

_TILE = 128  # rows
_WEIGHTS = 2**21  # of a block of w, bytes
_LONGEST = 16384  # K, of which a block holds all


def grouped_matmul_tpu(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    w_scale: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Arguments and result as in `slm_kernels.experts.grouped_matmul`.

    The gradients are those of the "xla" form.

    Raises:
        ValueError: if K is larger than 16,384, or `w` neither int8 nor of the dtype of `x`.
    """
    if x.shape[1] > _LONGEST:
        raise ValueError(f"x{x.shape}: K is {_LONGEST} at most: use implementation='xla'")
    if w.dtype not in (x.dtype, jnp.int8):
        raise ValueError(f"x is {x.dtype}, w {w.dtype}: convert w to {x.dtype}")
    return _grouped(jnp.dtype(out_dtype), *varying(x, w, group_sizes, w_scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(dtype: jnp.dtype, x: Any, w: Any, group_sizes: Any, w_scale: Any) -> jax.Array:
    (rows, inner), (groups, _, columns) = x.shape, w.shape
    tm = min(_TILE, rows)
    tiles = -(-rows // tm)
    visits = tiles + groups
    widest = max(LANES, _WEIGHTS // (inner * w.dtype.itemsize) // LANES * LANES)
    bn = columns if columns <= widest else widest
    table = _schedule(group_sizes, rows, tm, tiles, visits)
    at = functools.partial(_visit, tiles=tiles, groups=groups, visits=visits)

    def scale_spec() -> pl.BlockSpec | None:
        if w_scale is None:
            return None
        return pl.BlockSpec((1, 1, bn), lambda n, i, t: (at(t, i)[1], 0, n))

    moved = [x, w, *([] if w_scale is None else [w_scale])]
    written = rows * columns * dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, at),
        out_shape=shape_like((rows, columns), dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-columns // bn), visits),
            in_specs=[
                pl.BlockSpec((tm, inner), lambda n, i, t: (at(t, i)[0], 0)),
                pl.BlockSpec((1, inner, bn), lambda n, i, t: (at(t, i)[1], 0, n)),
                scale_spec(),
            ],
            out_specs=pl.BlockSpec((tm, bn), lambda n, i, t: (at(t, i)[0], n)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved) + written,
        ),
        interpret=interpret(),
        name="grouped_matmul",
    )(table, x, w, None if w_scale is None else w_scale.astype(jnp.float32)[:, None])


def _kernel(at: Any, table: Any, x_ref: Any, w_ref: Any, scale_ref: Any, y_ref: Any) -> None:
    i = pl.program_id(1)
    begin, end = table[2, i], table[3, i]  # rows of the tile that are the group's

    @pl.when(table[4, i] == 0)
    def _first() -> None:
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(table[5, i] == 0)
    def _rows() -> None:
        x = x_ref[...]
        total = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32
        y = jax.lax.dot_general(
            x,
            w_ref[0].astype(x.dtype),
            (((1,), (0,)), ((), ())),
            precision="highest" if x.dtype == jnp.float32 else None,
            preferred_element_type=total,
        )
        if scale_ref is not None:
            y = y * scale_ref[0]
        row = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
        y_ref[...] = jnp.where((row >= begin) & (row < end), y, y_ref[...].astype(total)).astype(
            y_ref.dtype
        )


# --- who visits what


def _even(i: Any, tiles: int, groups: int, visits: int) -> tuple[Any, Any]:
    """Tile and group of visit i if each tile had one visit and groups one size."""
    return jnp.minimum(i, tiles - 1), (i * ((groups << 12) // visits)) >> 12


def _visit(table: Any, i: Any, *, tiles: int, groups: int, visits: int) -> tuple[Any, Any]:
    """Tile and group of visit i."""
    tile, group = _even(i, tiles, groups, visits)
    return tile + table[0, i], group + table[1, i]


def _schedule(group_sizes: jax.Array, rows: int, tm: int, tiles: int, visits: int) -> jax.Array:
    """`[6, visits]` int32, a column a visit.

    Tile and group less those of `_even`; first row of the tile that is the group's, and the one
    after the last; 0 if it is the first visit of its tile; 0 if it has rows to compute.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.asarray(group_sizes, jnp.int32)
    ends = jnp.minimum(jnp.cumsum(sizes), rows)
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    # Rows of no group are those of one more, whose visits only write zeros.
    begins, ends = (
        jnp.concatenate([x, y]) for x, y in ((begins, ends[-1:]), (ends, ends[-1:] * 0 + rows))
    )
    first = begins // tm
    count = jnp.where(ends > begins, (ends - 1) // tm - first + 1, 0)
    total = jnp.cumsum(count)
    # Visits beyond the last repeat it, which copies nothing, and compute nothing.
    index = jnp.arange(visits, dtype=jnp.int32)
    visit = jnp.minimum(index, total[-1] - 1)
    group = jnp.sum(visit[:, None] >= total, axis=1, dtype=jnp.int32)
    tile = first[group] + visit - (total - count)[group]
    again = jnp.concatenate([jnp.zeros_like(tile[:1]), (tile[1:] == tile[:-1]).astype(jnp.int32)])
    idle = (group == groups) | (index > visit)
    even_tile, even_group = _even(index, tiles, groups, visits)
    return jnp.stack(
        [
            tile - even_tile,
            jnp.minimum(group, groups - 1) - even_group,
            begins[group] - tile * tm,
            ends[group] - tile * tm,
            again,
            idle.astype(jnp.int32),
        ]
    )


# --- gradients


def _forward(dtype: jnp.dtype, *args: Any) -> tuple[jax.Array, Any]:
    return _grouped(dtype, *args), args


def _backward(dtype: jnp.dtype, args: Any, dy: jax.Array) -> tuple[Any, ...]:
    run = functools.partial(grouped_matmul_xla, out_dtype=dtype)
    return jax.vjp(run, *args)[1](dy)


_grouped.defvjp(_forward, _backward)
