"""Backward kernel of flash attention on TPU; see `slm_kernels.attention.tpu` for the mathematics.

One kernel gives all three gradients, so scores are recomputed once. It walks the queries under
each block of keys, scores transposed (keys on sublanes): what belongs to a query, its log-sum-exp
and delta, is then a row that broadcasts for free.

    grid (batch, kv head, query chunk, key block, query block)        the last two in order
    q, do  [group, q, head_dim]      k, v, dk, dv  [kv, head_dim]      lse, delta  [group, q]
    dq     [group, queries of a chunk, head_dim] float32, on chip until its chunk is done

A chunk is as many queries as fit on the chip, where its dq is twice and takes a third of what a
kernel may take; every chunk gives a part of dk and dv.
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
    pad,
    round_up,
    shape_like,
    vmem_limit,
)
from slm_kernels.base2 import LOG2E
from slm_kernels.pallas import interpret


def backward(
    t: Tiling,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: tuple[jax.Array | None, ...],
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lengths: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward`, before the factor `scale` on those of q and k: float32.

    Args:
        t: as in `forward`.
        q: as in `forward`.
        k: as in `forward`.
        v: as in `forward`.
        ids: as in `forward`.
        do: gradient of the output, like `q`.
        lse: log-sum-exp from `forward`.
        delta: sum over head_dim of do * output, float32, like `lse`.
        lengths: as in `forward`.

    Returns:
        dq, dk, dv, in the shapes of `q`, `k`, `v`.
    """
    batch, n_kv_heads, group, length, head_dim = q.shape
    row_bytes = 4 * group * round_up(head_dim, LANES)
    n_q, n_kv = length // t.q, k.shape[2] // t.kv
    chunks = min(n_q, -(-length * row_bytes // (vmem_limit() // 6)))
    chunk_q = -(-n_q // chunks)
    chunks = -(-n_q // chunk_q)
    whole = chunks * chunk_q * t.q
    q, do = (pad(x, 3, whole) for x in (q, do))
    lse, delta = (pad(x, 3, whole) for x in (lse, delta))
    ids = tuple(
        pad(x, 2, whole, value) if x is not None and of_q else x
        for x, of_q, value in zip(ids, (True, False) * 2, (-1, -1, 0, 0), strict=True)
    )

    def q_block(c: Any, j: Any, step: Any) -> Any:
        first = jnp.maximum(t.first_q(j), c * chunk_q)
        block = jnp.minimum(first + step, jnp.minimum(t.last_q(j), (c + 1) * chunk_q - 1))
        return jnp.maximum(block, c * chunk_q)

    q_spec = pl.BlockSpec(
        (1, 1, group, t.q, head_dim), lambda b, h, c, j, s: (b, h, 0, q_block(c, j, s), 0)
    )
    row_spec = pl.BlockSpec((1, 1, group, t.q), lambda b, h, c, j, s: (b, h, 0, q_block(c, j, s)))
    kv_spec = pl.BlockSpec((1, 1, t.kv, head_dim), lambda b, h, c, j, s: (b, h, j, 0))
    part_spec = pl.BlockSpec((1, 1, 1, t.kv, head_dim), lambda b, h, c, j, s: (c, b, h, j, 0))
    dq_spec = pl.BlockSpec(
        (1, 1, group, chunk_q * t.q, head_dim), lambda b, h, c, j, s: (b, h, 0, c, 0)
    )

    def id_spec(x: jax.Array | None, of_q: bool) -> pl.BlockSpec | None:
        if x is None:
            return None
        rows = x.shape[0] > 1

        def index(b: Any, h: Any, c: Any, j: Any, s: Any) -> tuple[Any, ...]:
            return b if rows else 0, 0, q_block(c, j, s) if of_q else j

        return pl.BlockSpec((1, 1, t.q if of_q else t.kv), index)

    pairs = batch * n_kv_heads * group * t.visible_pairs(*lengths)
    moved = sum(x.size * x.dtype.itemsize for x in (q, do, k, v, lse, delta))
    moved += 4 * (q.size + k.size + v.size)
    part = (chunks, batch, n_kv_heads, *k.shape[2:])
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, t, chunk_q),
        out_shape=(
            shape_like(q.shape, jnp.float32, q),
            shape_like(part, jnp.float32, q),
            shape_like(part, jnp.float32, q),
        ),
        grid=(batch, n_kv_heads, chunks, n_kv, t.q_steps(chunk_q)),
        in_specs=[
            q_spec,
            kv_spec,
            kv_spec,
            [id_spec(x, of_q) for x, of_q in zip(ids, (True, False) * 2, strict=True)],
            q_spec,
            row_spec,
            row_spec,
        ],
        out_specs=(dq_spec, part_spec, part_spec),
        scratch_shapes=[
            [
                pltpu.VMEM((t.kv, LANES), jnp.int32) if x is not None else None
                for x in (ids[1], ids[3])
            ],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=interpret(),
        name="attention_backward",
    )(q, k, v, list(ids), do, lse, delta)
    return dq[:, :, :, :length], dk.sum(axis=0), dv.sum(axis=0)


def _kernel(
    t: Tiling,
    chunk_q: int,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    id_refs: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    column_refs: Any,
) -> None:
    c, j, step = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    first = c * chunk_q
    i = jnp.maximum(t.first_q(j), first) + step
    last = jnp.minimum(t.last_q(j), first + chunk_q - 1)
    group = q_ref.shape[2]

    @pl.when((j == 0) & (step == 0))
    def _start_chunk() -> None:
        for g in range(group):
            dq_ref[0, 0, g] = jnp.zeros_like(dq_ref[0, 0, g])

    @pl.when(step == 0)
    def _start_keys() -> None:
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)
        for row_ref, column_ref in zip(id_refs[1::2], column_refs, strict=True):
            if row_ref is not None:
                column_ref[...] = column(row_ref[0])

    def tile(g: Any, q_at: int, kv_at: int, masked: bool) -> None:
        """Equations (5) to (9) on one tile, transposed."""
        rows, keys = pl.ds(q_at, t.q_tile), pl.ds(kv_at, t.kv_tile)
        q, do = q_ref[0, 0, g, rows], do_ref[0, 0, g, rows]
        k, v = k_ref[0, 0, keys], v_ref[0, 0, keys]
        s = t.scores(dot(k, q, 1, 1))
        capped = s
        if masked:
            of_q = [None if r is None else r[0, :, rows] for r in id_refs[::2]]
            of_kv = [None if r is None else lanes(r[keys], t.q_tile) for r in column_refs]
            ids = (of_q[0], of_kv[0], of_q[1], of_kv[1])
            s = jnp.where(t.mask(i * t.q + q_at, j * t.kv + kv_at, 1, ids), s, HIDDEN)
        p = jnp.exp2(s - lse_ref[0, 0, pl.ds(g, 1), rows])
        dv_ref[0, 0, 0, keys] += dot(p.astype(do.dtype), do, 1, 0)
        dp = dot(v, do, 1, 1)
        ds = p * (dp - delta_ref[0, 0, pl.ds(g, 1), rows])
        if t.softcap is not None:
            ds *= 1 - (capped * (1 / (t.softcap * LOG2E))) ** 2
        ds = ds.astype(q.dtype)
        dk_ref[0, 0, 0, keys] += dot(ds, q, 1, 0)
        of_chunk = pl.ds((i - first) * t.q + q_at, t.q_tile)
        dq_ref[0, 0, g, of_chunk] += dot(ds, k, 0, 0)

    def places(masked: bool) -> list[tuple[int, int]]:
        return [
            (q_at, kv_at) for kv_at in range(0, t.kv, t.kv_tile) for q_at in range(0, t.q, t.q_tile)
        ]

    @pl.when(i <= last)
    def _pair() -> None:
        each_tile(t, i, j, group, places, tile)
