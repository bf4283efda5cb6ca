"""Forward kernel of flash attention on TPU; see `slm_kernels.attention.tpu` for the mathematics.

One program holds a block of queries of one key/value head with all `group` query heads that
read it, and walks along the keys:

    grid (batch, kv head, query block, key block)      the last axis in order
    q, out  [group, q, head_dim]        k, v  [kv, head_dim]        lse  [group, q]
    scratch, float32: max and sum [group, q, 128 lanes], acc [group, q, head_dim]

The maximum is the same on all lanes. The sum is not: lane t holds the sum over keys t modulo 128,
so that only the end of the row needs a sum across lanes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.attention.tpu_tiles import (
    HIDDEN,
    LANES,
    Tiling,
    column,
    dot,
    each_tile,
    lanes,
    shape_like,
    vmem_limit,
)
from slm_kernels.pallas import interpret


def forward(
    t: Tiling,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: tuple[jax.Array | None, ...],
    lengths: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Attention and its log-sum-exp to base 2.

    Args:
        t: mask and blocks; lengths below are multiples of them.
        q: `[B, n_kv_heads, group, S, head_dim]`.
        k: `[B, n_kv_heads, T, head_dim]`.
        v: `[B, n_kv_heads, T, head_dim]`.
        ids: q_positions, kv_positions, q_segments, kv_segments, each `[B or 1, 1, S or T]` int32,
            or `None` where the mask does not read it.
        lengths: queries and keys without padding, for the cost estimate.

    Returns:
        `[B, n_kv_heads, group, S, head_dim]` in the dtype of `q`, and `[B, n_kv_heads, group, S]`
        float32 (+1e30 where nothing is seen).
    """
    batch, n_kv_heads, group, length, head_dim = q.shape
    n_q, n_kv = length // t.q, k.shape[2] // t.kv

    def kv_block(i: Any, j: Any) -> Any:
        return jnp.minimum(t.first_kv(i) + j, t.last_kv(i))

    q_spec = pl.BlockSpec((1, 1, group, t.q, head_dim), lambda b, h, i, j: (b, h, 0, i, 0))
    kv_spec = pl.BlockSpec((1, 1, t.kv, head_dim), lambda b, h, i, j: (b, h, kv_block(i, j), 0))
    lse_spec = pl.BlockSpec((1, 1, group, t.q), lambda b, h, i, j: (b, h, 0, i))

    def id_spec(x: jax.Array | None, of_q: bool) -> pl.BlockSpec | None:
        if x is None:
            return None
        rows = x.shape[0] > 1

        def index(b: Any, h: Any, i: Any, j: Any) -> tuple[Any, ...]:
            return b if rows else 0, 0, i if of_q else kv_block(i, j)

        return pl.BlockSpec((1, 1, t.q if of_q else t.kv), index)

    pairs = batch * n_kv_heads * group * t.visible_pairs(*lengths)
    moved = sum(x.size * x.dtype.itemsize for x in (q, q, k, v))
    return pl.pallas_call(
        functools.partial(_kernel, t),
        out_shape=(
            shape_like(q.shape, q.dtype, q),
            shape_like(q.shape[:4], jnp.float32, q),
        ),
        grid=(batch, n_kv_heads, n_q, min(t.kv_steps(), n_kv)),
        in_specs=[
            q_spec,
            kv_spec,
            kv_spec,
            [id_spec(x, of_q) for x, of_q in zip(ids, (True, False) * 2, strict=True)],
        ],
        out_specs=(q_spec, lse_spec),
        scratch_shapes=[
            pltpu.VMEM((group, t.q, LANES), jnp.float32),
            pltpu.VMEM((group, t.q, LANES), jnp.float32),
            pltpu.VMEM((group, t.q, head_dim), jnp.float32),
            [
                pltpu.VMEM((t.q, LANES), jnp.int32) if x is not None else None
                for x in (ids[0], ids[2])
            ],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=interpret(),
        name="attention_forward",
    )(q, k, v, list(ids))


def _kernel(
    t: Tiling,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    id_refs: Any,
    out_ref: Any,
    lse_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    acc_ref: Any,
    column_refs: Any,
) -> None:
    i, step = pl.program_id(2), pl.program_id(3)
    j, last = t.first_kv(i) + step, t.last_kv(i)
    group = q_ref.shape[2]
    head_dim = q_ref.shape[4]

    @pl.when(step == 0)
    def _start() -> None:
        max_ref[...] = jnp.full_like(max_ref, HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for row_ref, column_ref in zip(id_refs[::2], column_refs, strict=True):
            if row_ref is not None:
                column_ref[...] = column(row_ref[0])

    def tile(g: Any, q_at: int, kv_at: int, masked: bool) -> None:
        """Equations (1) to (4) on one tile."""
        rows = pl.ds(q_at, t.q_tile if masked else t.q)
        keys = pl.ds(kv_at, t.kv_tile)
        s = t.scores(dot(q_ref[0, 0, g, rows], k_ref[0, 0, keys], 1, 1))
        if masked:
            of_q = [None if r is None else lanes(r[rows], t.kv_tile) for r in column_refs]
            of_kv = [None if r is None else r[0, :, keys] for r in id_refs[1::2]]
            ids = (of_q[0], of_kv[0], of_q[1], of_kv[1])
            s = jnp.where(t.mask(i * t.q + q_at, j * t.kv + kv_at, 0, ids), s, HIDDEN)
        old = max_ref[g, rows]
        new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
        shrink = jnp.exp2(old - new)
        p = jnp.exp2(s - lanes(new, t.kv_tile))
        max_ref[g, rows] = new
        parts = [p[:, at : at + LANES] for at in range(0, t.kv_tile, LANES)]
        sum_ref[g, rows] = shrink * sum_ref[g, rows] + sum(parts[1:], parts[0])
        product = dot(p.astype(v_ref.dtype), v_ref[0, 0, keys], 1, 0)
        acc_ref[g, rows] = lanes(shrink, head_dim) * acc_ref[g, rows] + product

    def places(masked: bool) -> list[tuple[int, int]]:
        # Without a mask no tile can be left out: the widest product latches keys least often.
        q_tile = t.q_tile if masked else t.q
        return [
            (q_at, kv_at) for q_at in range(0, t.q, q_tile) for kv_at in range(0, t.kv, t.kv_tile)
        ]

    @pl.when(j <= last)
    def _pair() -> None:
        each_tile(t, i, j, group, places, tile)

    @pl.when(j == last)
    def _end() -> None:
        for g in range(group):
            top = max_ref[g]
            seen = top > HIDDEN / 2
            total = jnp.sum(sum_ref[g], axis=1, keepdims=True)
            share = jnp.where(seen, 1 / total, 0.0)
            out_ref[0, 0, g] = (acc_ref[g] * lanes(share, head_dim)).astype(out_ref.dtype)
            lse_ref[0, 0, g : g + 1] = jnp.where(seen, top + jnp.log2(total), -HIDDEN).T[:1]
