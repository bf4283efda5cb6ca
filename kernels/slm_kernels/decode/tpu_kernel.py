"""Kernel of decode attention on TPU; see `slm_kernels.decode.tpu` for mathematics and layouts."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.attention.tpu_tiles import (
    HIDDEN,
    LANES,
    dot,
    lanes,
    log2,
    pad,
    round_up,
    shape_like,
    vmem_limit,
)
from slm_kernels.base2 import LOG2E
from slm_kernels.pallas import interpret

_F32 = jnp.float32


@dataclass(frozen=True)
class Layout:
    """How a cache lies and is cut.

    Attributes:
        order: `"rows"`, `"heads"` or `"lanes"`.
        slots: of the cache.
        heads: key heads, K.
        group: query heads of one of them.
        block: slots of a block: a power of two, or all.
        fixed: first slot that every row sees and the one after the last, if known before.
        holes: whether a row's mask is given.
        softcap: bound of the scores, or `None`.
        scale: of the scores.
    """

    order: str
    slots: int
    heads: int
    group: int
    block: int
    fixed: tuple[int, int] | None
    holes: bool
    softcap: float | None
    scale: float

    @property
    def planes(self) -> int:
        """Products a block."""
        return 1 if self.order == "rows" else self.heads

    @property
    def fold(self) -> int:
        """Columns of scores a slot."""
        return self.heads if self.order == "rows" else 1

    def first(self, start: Any) -> Any:
        """Block of slot `start`."""
        return start >> log2(self.block) if self.block < self.slots else start * 0

    def last(self, end: Any) -> Any:
        """Block of slot `end - 1`; -1 if `end` is 0."""
        return (end - 1) >> (log2(self.block) if self.block < self.slots else 31)

    def steps(self) -> int:
        """Most blocks that a row sees."""
        start, end = self.fixed or (0, self.slots)
        return int(self.last(end) - self.first(start)) + 1

    def bounds(self, table: Any, b: Any) -> tuple[Any, Any]:
        """First slot that row b sees and the one after the last."""
        return self.fixed or (table[0, b], self.slots - table[1, b])


def call(
    lay: Layout,
    table: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    hidden: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel.

    Args:
        lay: how the cache lies.
        table: `[2, B]` int32, slots before the first and after the last that a row sees, or `None`
            where they are fixed.
        q: `[B, planes, heads, D]`.
        k: `[B, planes, S fold, D]`, or `[B, planes, D, S]` with slots on lanes.
        v: as `k`.
        hidden: `[B, 1, S]`, added to the scores, or `None`.
        k_scale: `[B, K, S]` or `None`.
        v_scale: as `k_scale`.

    Returns:
        `[B, planes, heads, D]`, and the natural log-sum-exp on every lane of
        `[B, planes, heads, 128]`.
    """
    batch, planes, heads, head_dim = q.shape
    rows, columns = planes * round_up(heads, 8), lay.block * lay.fold

    def at(b: Any, j: Any, table: Any) -> Any:
        start, end = lay.bounds(table, b)
        return jnp.minimum(lay.first(start) + j, jnp.maximum(lay.last(end), 0))

    def row_spec(x: jax.Array | None) -> pl.BlockSpec | None:
        if x is None:
            return None
        slots = round_up(lay.block, LANES)
        return pl.BlockSpec((1, x.shape[1], slots), lambda b, j, r: (b, 0, at(b, j, r)))

    if lay.order == "lanes":
        cache = pl.BlockSpec((1, planes, head_dim, columns), lambda b, j, r: (b, 0, 0, at(b, j, r)))
    else:
        cache = pl.BlockSpec((1, planes, columns, head_dim), lambda b, j, r: (b, 0, at(b, j, r), 0))
    whole = pl.BlockSpec((1, planes, heads, head_dim), lambda b, j, r: (b, 0, 0, 0))
    sums = pl.BlockSpec((1, planes, heads, LANES), lambda b, j, r: (b, 0, 0, 0))
    moved = [q, q, k, v, *(x for x in (hidden, k_scale, v_scale) if x is not None)]
    pairs = batch * lay.heads * lay.group * lay.slots
    return pl.pallas_call(
        functools.partial(_kernel, lay),
        out_shape=(
            shape_like(q.shape, q.dtype, q),
            shape_like((*q.shape[:3], LANES), _F32, q),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, lay.steps()),
            in_specs=[whole, cache, cache, *map(row_spec, (hidden, k_scale, v_scale))],
            out_specs=(whole, sums),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), _F32),
                pltpu.VMEM((rows, LANES), _F32),
                pltpu.VMEM((rows, head_dim), _F32),
                pltpu.VMEM((rows, columns), _F32) if lay.fold > 1 else None,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * head_dim,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret(),
        name="decode_attention",
    )(table, q, k, v, hidden, k_scale, v_scale)


def _kernel(
    lay: Layout,
    table: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    hidden_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    acc_ref: Any,
    other_ref: Any,
) -> None:
    b, step = pl.program_id(0), pl.program_id(1)
    planes, heads, head_dim = q_ref.shape[1:]
    rows = round_up(heads, 8)  # of a plane
    start, end = lay.bounds(table, b)
    j, last = lay.first(start) + step, lay.last(end)
    columns = lay.block * lay.fold
    on_lanes = lay.order == "lanes"
    of = [slice(plane * rows, (plane + 1) * rows) for plane in range(planes)]

    @pl.when(step == 0)
    def _start() -> None:
        max_ref[...] = jnp.full_like(max_ref, HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if other_ref is not None:
            # Columns run through the heads; those of another head are hidden.
            row = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
            column = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
            ahead = row - (column & (lay.heads - 1)) * lay.group
            other_ref[...] = jnp.where((ahead >= 0) & (ahead < lay.group), 0.0, HIDDEN)

    def within(shape: tuple[int, ...], axis: int) -> jax.Array:
        """Whether a column's slot lies between the bounds."""
        column = j * columns + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (column >= start * lay.fold) & (column < end * lay.fold)

    def row_of(ref: Any, plane: int) -> jax.Array:
        """What each column of a plane has in `ref` `[1, K or 1, block]`: `[1, columns]`."""
        return _interleave(lay, ref) if lay.fold > 1 else ref[0, plane : plane + 1, :columns]

    def scaled(x: jax.Array, scale_ref: Any, plane: int) -> jax.Array:
        return x if scale_ref is None else x * row_of(scale_ref, plane)

    def block(edge: bool) -> None:
        """Equations (1) to (4), each for all planes, so that the chains of a plane overlap."""
        parts = []
        for plane in range(planes):
            q = pad(q_ref[0, plane], 0, rows)
            products = dot(q, k_ref[0, plane].astype(q.dtype), 1, 0 if on_lanes else 1)
            parts.append(scaled(products, k_scale_ref, plane))
        s = jnp.concatenate(parts)
        if lay.softcap is None:
            s = s * (lay.scale * LOG2E)
        else:
            s = jnp.tanh(s * (lay.scale / lay.softcap)) * (lay.softcap * LOG2E)
        if hidden_ref is not None:
            s = s + row_of(hidden_ref, 0)
        if other_ref is not None:
            s = s + other_ref[...]
        if edge:
            s = jnp.where(within(s.shape, 1), s, HIDDEN)
        old = max_ref[...]
        new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        shrink = jnp.exp2(old - new)
        p = jnp.exp2(s - new[:, :1])
        max_ref[...] = new
        sum_ref[...] = shrink * sum_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        parts = []
        for plane in range(planes):
            weights = scaled(p[of[plane]], v_scale_ref, plane)
            v = v_ref[0, plane].astype(q_ref.dtype)
            if edge:  # Out there may be NaN, which a weight of zero does not remove.
                if v_scale_ref is not None:
                    weights = jnp.where(within(weights.shape, 1), weights, 0)
                v = jnp.where(within(v.shape, 1 if on_lanes else 0), v, 0)
            parts.append(dot(weights.astype(v.dtype), v, 1, 1 if on_lanes else 0))
        acc_ref[...] = lanes(shrink, head_dim) * acc_ref[...] + jnp.concatenate(parts)

    inner = (j * lay.block >= start) & ((j + 1) * lay.block <= end)
    pl.when(inner)(lambda: block(False))
    pl.when((j <= last) & jnp.logical_not(inner))(lambda: block(True))

    @pl.when(step == lay.steps() - 1)
    def _end() -> None:
        top, total = max_ref[...], sum_ref[...]
        some = top > HIDDEN / 2
        share = jnp.where(some, 1 / total, 0.0)
        out = (acc_ref[...] * lanes(share, head_dim)).astype(out_ref.dtype)
        lse = jnp.where(some, (top + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
        for plane in range(planes):
            out_ref[0, plane] = out[of[plane]][:heads]
            lse_ref[0, plane] = lse[of[plane]][:heads]


def _interleave(lay: Layout, ref: Any) -> jax.Array:
    """Numbers of slots and heads, `[1, K or 1, block]`, in the columns' order: `[1, columns]`.

    128 columns at a time: each slot of a head goes to K lanes, and each lane keeps its own head's.
    """
    heads = lay.heads
    lane = jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 1)
    own = (lane & (heads - 1)) == jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 0)
    parts = []
    for at in range(0, lay.block, LANES):
        some = jnp.broadcast_to(ref[0, :, at : at + LANES], (heads, LANES))
        for i in range(heads):
            spread = jnp.take_along_axis(some, (lane + i * LANES) >> log2(heads), axis=1)
            parts.append(jnp.sum(jnp.where(own, spread, 0), axis=0, keepdims=True))
    return jnp.concatenate(parts, axis=1)[:, : lay.block * heads]
