"""Forward kernel of attention on Hopper; equations as in `slm_kernels.attention.gpu`.

A block of threads has 128 queries of one head; tiles of 128 keys and values pass by.

                 keys 0..127    128..255      256..383
    queries    +-------------+-------------+-------------+
    256..319   | no mask     | no mask     | masked      |   warpgroup 0
    320..383   | no mask     | no mask     | masked      |   warpgroup 1
               +-------------+-------------+-------------+   causal, in order: the rest is skipped

    s  [64, 128]  = q k^T   operands in shared memory, result in registers
    p  [64, 128]            registers, rounded to the dtype of v
    o  [64, D]    = p v     left operand in registers
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slm_kernels.attention.gpu_tiles import (
    BLOCK,
    BY_COLUMN,
    BY_ROW,
    COMPUTE,
    COMPUTE_REGISTERS,
    COPIER_REGISTERS,
    ROWS,
    SLOTS,
    WGMMA,
    Accumulator,
    Ids,
    Tiling,
    along,
    fetch,
    fill_ring,
    launch,
    load,
    matrices,
    vectors,
)

_TILE = 128  # keys of a tile
_COLUMNS = 64  # of a product p v: less of it is in registers at a time


def forward(
    t: Tiling, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp (base 2) of every query.

    Args:
        t: what is static.
        q: `[B, S, n_heads, D]`, S whole blocks of 128, D a multiple of 64.
        k: `[B, T, n_kv_heads, D]`, T whole blocks.
        v: as `k`.
        q_ids: `[B, S]` int32 each.
        kv_ids: `[B, T]` int32 each.

    Returns:
        `[B, S, n_heads, D]` in the dtype of `q` and `[B, n_heads, S]` float32; a query that sees
        nothing has zeros in both.
    """
    batch, n_queries, n_heads, head_dim = q.shape
    n_keys, group = k.shape[1], n_heads // k.shape[2]
    shape = (ROWS, _TILE)
    parts = [pl.ds(c, _COLUMNS) for c in range(0, head_dim, _COLUMNS)]

    def kernel(
        q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, out: Any, lse: Any,
        q_s: Any, k_s: Any, v_s: Any, lse_s: Any, q_ids_s: Any, kv_ids_s: Any,
        q_ready: Any, k_ready: Any, v_ready: Any, k_free: Any, v_free: Any,
    ) -> None:  # fmt: skip
        b, h, i = (jax.lax.axis_index(axis) for axis in ("row", "head", "block"))
        if t.in_order:
            i = t.n_q - 1 - i  # the longest first: the short ones fill the gaps at the end
        first, masked_from, end = t.keys(i, _TILE)
        wg = jax.lax.axis_index("warpgroup")

        @pl.when(wg == COMPUTE)
        def _copy() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            kv_head = jax.lax.div(h, jnp.int32(group))
            for w in range(COMPUTE):
                rows = pl.ds(i * BLOCK + w * ROWS, ROWS)
                ids = [(q_ids[n].at[b, rows], q_ids_s[n]) for n in t.ids]
                fetch([(q.at[b, rows, h], q_s), *ids], w, q_ready)

            def keys(n: Any) -> list[tuple[Any, Any]]:
                rows = pl.ds((first + n) * _TILE, _TILE)
                ids = [(kv_ids[n].at[b, rows], kv_ids_s[n]) for n in t.ids]
                return [(k.at[b, rows, kv_head], k_s), *ids]

            def values(n: Any) -> list[tuple[Any, Any]]:
                return [(v.at[b, pl.ds((first + n) * _TILE, _TILE), kv_head], v_s)]

            fill_ring(end - first, [(keys, k_ready, k_free), (values, v_ready, v_free)])

        @pl.when(wg < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.barrier_wait(q_ready.at[wg])
            my_ids = load(q_ids_s, wg, BY_ROW)

            def tile(j: Any, carry: tuple[Any, Any, Any], masked: bool) -> tuple[Any, Any, Any]:
                o, m, l = carry  # noqa: E741
                slot = (j - first) & (SLOTS - 1)
                plgpu.barrier_wait(k_ready.at[slot])

                def products(s: Any) -> jax.Array:
                    plgpu.wgmma(s, q_s.at[wg], k_s.at[slot].transpose((1, 0)))
                    return s[...]

                s = t.capped(pl.run_scoped(products, Accumulator(shape, jnp.float32)))  # (1)
                if masked:
                    mask = t.visible(shape, my_ids, load(kv_ids_s, slot, BY_COLUMN))
                    s = jnp.where(mask, s, -jnp.inf)
                    plgpu.commit_smem()  # a TMA will overwrite what was just read
                plgpu.barrier_arrive(k_free.at[slot])
                m_new = jnp.maximum(m, t.slope * jnp.max(s, axis=1))
                # A row that has seen nothing yet: 2^(-inf - 0) = 0, not 2^(-inf + inf).
                base = jnp.where(m_new == -jnp.inf, 0.0, m_new) if t.always_masked else m_new
                p = jnp.exp2(t.slope * s - along(base, shape, 0))  # (2)
                decay = jnp.exp2(m - base)
                l = decay * l + jnp.sum(p, axis=1)  # (3)  # noqa: E741
                p = p.astype(v.dtype)
                plgpu.barrier_wait(v_ready.at[slot])

                def outputs(*o: Any) -> list[jax.Array]:
                    for part, columns in zip(o, parts, strict=True):
                        plgpu.wgmma(part, p, v_s.at[slot, :, columns])
                    return [part[...] for part in o]

                new = pl.run_scoped(
                    outputs, *[Accumulator((ROWS, _COLUMNS), jnp.float32) for _ in parts]
                )
                plgpu.barrier_arrive(v_free.at[slot])
                # (4): one multiply-add, as much as scaling what wgmma would add to.
                o = [along(decay, a.shape, 0) * a + x for a, x in zip(o, new, strict=True)]
                return o, m_new, l

            def full(value: float, *shape: int) -> jax.Array:
                x = jnp.full(shape, value, jnp.float32)
                return plgpu.layout_cast(x, BY_ROW if len(shape) == 1 else WGMMA)

            carry: Any = (
                [full(0.0, ROWS, _COLUMNS) for _ in parts],
                full(-jnp.inf, ROWS),
                full(0.0, ROWS),
            )
            if not t.always_masked:
                unmasked = functools.partial(tile, masked=False)
                carry = jax.lax.fori_loop(first, masked_from, unmasked, carry)
            o, m, l = jax.lax.fori_loop(  # noqa: E741
                masked_from, end, functools.partial(tile, masked=True), carry
            )
            share = jnp.where(l > 0, 1 / l, 0.0)
            for part, columns in zip(o, parts, strict=True):
                x = part * along(share, part.shape, 0)
                q_s.at[wg, :, columns][...] = x.astype(out.dtype)  # nobody reads the queries now
            lse_s.at[wg][...] = jnp.where(l > 0, m + jnp.log2(l), 0.0)
            plgpu.commit_smem()
            rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_s.at[wg], out.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

    pairs = batch * n_heads * t.visible_pairs(n_queries, n_keys)
    n_ids = len(t.ids)
    lse_type = jax.ShapeDtypeStruct((batch, n_heads, n_queries), jnp.float32)
    id_bytes = sum(x.nbytes for ids in (q_ids, kv_ids) for x in ids.values())
    return launch(
        kernel,
        "attention_forward",
        (n_heads, t.n_q, batch),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), lse_type],
        [
            matrices(COMPUTE, ROWS, head_dim, q.dtype),
            matrices(SLOTS, _TILE, head_dim, k.dtype),
            matrices(SLOTS, _TILE, head_dim, v.dtype),
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            vectors(t.ids, COMPUTE, ROWS),
            vectors(t.ids, SLOTS, _TILE),
            plgpu.Barrier(num_arrivals=1 + n_ids, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=1 + n_ids, num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
        ],
        pl.CostEstimate(
            flops=4 * head_dim * pairs,
            transcendentals=pairs,
            bytes_accessed=2 * q.nbytes + k.nbytes + v.nbytes + lse_type.size * 4 + id_bytes,
        ),
    )(q, k, v, dict(q_ids), dict(kv_ids))
