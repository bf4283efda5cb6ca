"""Backward kernels of attention on Hopper; equations as in `slm_kernels.attention.gpu`.

Two kernels, as each gradient is a sum over the other side. `gradient_q` keeps 128 queries; tiles
of 64 keys pass by, as in the forward kernel. `gradient_kv` keeps 128 keys; tiles of 64 queries pass
by, all heads of the group one after another, so that their sum needs no memory:

               queries of head 0            queries of head 1
    keys     +--------+--------+--------+--------+--------+--------+
     0..63   | masked | masked |        | masked | masked |        |   warpgroup 0
    64..127  | masked | masked |        | masked | masked |        |   warpgroup 1
             +--------+--------+--------+--------+--------+--------+   causal, in order

It works with the transposes, since wgmma takes only its left operand from registers:

    s'  [64, 64] = k q^T     dp' [64, 64] = v do^T
    dv  [64, D] += p' do     dk  [64, D] += ds' q
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

_TILE = 64  # rows of a tile that passes by: two products of it are in registers at a time
_SUMS = ("lse", "delta")


def gradient_q(
    t: Tiling,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    q_ids: Ids,
    kv_ids: Ids,
) -> jax.Array:
    """Gradient of the queries.

    Args:
        t: what is static.
        q: `[B, S, n_heads, D]`, S whole blocks of 128, D a multiple of 64.
        k: `[B, T, n_kv_heads, D]`, T whole blocks.
        v: as `k`.
        do: gradient of the output, as `q`.
        lse: `[B, n_heads, S]` float32, as `forward` gives it.
        delta: `[B, n_heads, S]` float32, sum of `do` times the output.
        q_ids: `[B, S]` int32 each.
        kv_ids: `[B, T]` int32 each.
    """
    batch, _, n_heads, head_dim = q.shape
    group = n_heads // k.shape[2]
    shape = (ROWS, _TILE)

    def kernel(
        q: Any, k: Any, v: Any, do: Any, sums: Any, q_ids: Any, kv_ids: Any, dq: Any,
        q_s: Any, do_s: Any, k_s: Any, v_s: Any, sums_s: Any, q_ids_s: Any, kv_ids_s: Any,
        q_ready: Any, kv_ready: Any, kv_free: Any,
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
                vecs = [(sums[n].at[b, h, rows], sums_s[n]) for n in _SUMS]
                vecs += [(q_ids[n].at[b, rows], q_ids_s[n]) for n in t.ids]
                fetch([(q.at[b, rows, h], q_s), (do.at[b, rows, h], do_s), *vecs], w, q_ready)

            def tile(n: Any) -> list[tuple[Any, Any]]:
                rows = pl.ds((first + n) * _TILE, _TILE)
                ids = [(kv_ids[n].at[b, rows], kv_ids_s[n]) for n in t.ids]
                return [(k.at[b, rows, kv_head], k_s), (v.at[b, rows, kv_head], v_s), *ids]

            fill_ring(end - first, [(tile, kv_ready, kv_free)])

        @pl.when(wg < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.barrier_wait(q_ready.at[wg])
            my_ids, my_sums = load(q_ids_s, wg, BY_ROW), load(sums_s, wg, BY_ROW)

            def accumulate(dq: Any) -> jax.Array:
                def tile(j: Any, _: None, masked: bool) -> None:
                    slot = (j - first) & (SLOTS - 1)
                    plgpu.barrier_wait(kv_ready.at[slot])

                    def products(s: Any, dp: Any) -> jax.Array:
                        plgpu.wgmma(s, q_s.at[wg], k_s.at[slot].transpose((1, 0)))  # (1)
                        plgpu.wgmma(dp, do_s.at[wg], v_s.at[slot].transpose((1, 0)))
                        # The second product goes on while the exponentials of the first are taken.
                        x = t.capped(plgpu.wgmma_accumulator_load(s, wait_n=1))
                        p = jnp.exp2(t.slope * x - along(my_sums["lse"], shape, 0))  # (5)
                        if masked:
                            mask = t.visible(shape, my_ids, load(kv_ids_s, slot, BY_COLUMN))
                            p = jnp.where(mask, p, 0.0)
                        if t.softcap is not None:
                            p = p * (1 - x * x)
                        return p * (dp[...] - along(my_sums["delta"], shape, 0))  # (7)

                    ds = pl.run_scoped(products, *[Accumulator(shape, jnp.float32)] * 2)
                    plgpu.wgmma(dq, ds.astype(k.dtype), k_s.at[slot])  # (9)
                    plgpu.wgmma_wait(0)
                    if masked:
                        plgpu.commit_smem()  # a TMA will overwrite the identifiers just read
                    plgpu.barrier_arrive(kv_free.at[slot])

                if not t.always_masked:
                    unmasked = functools.partial(tile, masked=False)
                    jax.lax.fori_loop(first, masked_from, unmasked, None)
                jax.lax.fori_loop(masked_from, end, functools.partial(tile, masked=True), None)
                return dq[...]

            total = pl.run_scoped(accumulate, Accumulator((ROWS, head_dim), jnp.float32))
            q_s.at[wg][...] = (total * t.scale).astype(dq.dtype)  # nobody reads the queries now
            plgpu.commit_smem()
            rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

    cost, n_ids = _cost(t, q, k, q_ids, kv_ids, products=3, written=q.size), len(t.ids)
    return launch(
        kernel,
        "attention_gradient_q",
        (n_heads, t.n_q, batch),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            matrices(COMPUTE, ROWS, head_dim, q.dtype),
            matrices(COMPUTE, ROWS, head_dim, do.dtype),
            matrices(SLOTS, _TILE, head_dim, k.dtype),
            matrices(SLOTS, _TILE, head_dim, v.dtype),
            vectors(_SUMS, COMPUTE, ROWS, jnp.float32),
            vectors(t.ids, COMPUTE, ROWS),
            vectors(t.ids, SLOTS, _TILE),
            plgpu.Barrier(num_arrivals=4 + n_ids, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=2 + n_ids, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
        ],
        cost,
    )(q, k, v, do, {"lse": lse, "delta": delta}, dict(q_ids), dict(kv_ids))


def gradient_kv(
    t: Tiling,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    q_ids: Ids,
    kv_ids: Ids,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the keys and of the values; arguments as of `gradient_q`."""
    batch, _, n_heads, head_dim = q.shape
    n_kv_heads, group = k.shape[2], n_heads // k.shape[2]
    shape = (ROWS, _TILE)

    def kernel(
        q: Any, k: Any, v: Any, do: Any, sums: Any, q_ids: Any, kv_ids: Any, dk: Any, dv: Any,
        k_s: Any, v_s: Any, q_s: Any, do_s: Any, sums_s: Any, q_ids_s: Any, kv_ids_s: Any,
        kv_ready: Any, q_ready: Any, q_free: Any,
    ) -> None:  # fmt: skip
        def place() -> list[Any]:
            """Read again where it is wanted: kept, it would be spilled."""
            return [jax.lax.axis_index(axis) for axis in ("row", "head", "block")]

        wg = jax.lax.axis_index("warpgroup")

        @pl.when(wg == COMPUTE)
        def _copy() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            b, h, i = place()
            first, _, end = t.queries(i, _TILE)
            length = end - first
            for w in range(COMPUTE):
                rows = pl.ds(i * BLOCK + w * ROWS, ROWS)
                ids = [(kv_ids[n].at[b, rows], kv_ids_s[n]) for n in t.ids]
                fetch([(k.at[b, rows, h], k_s), (v.at[b, rows, h], v_s), *ids], w, kv_ready)

            @pl.loop(0, group)
            def _head(g: Any) -> None:
                head = h * group + g

                def tile(n: Any) -> list[tuple[Any, Any]]:
                    rows = pl.ds((first + n) * _TILE, _TILE)
                    vecs = [(sums[n].at[b, head, rows], sums_s[n]) for n in _SUMS]
                    vecs += [(q_ids[n].at[b, rows], q_ids_s[n]) for n in t.ids]
                    return [(q.at[b, rows, head], q_s), (do.at[b, rows, head], do_s), *vecs]

                fill_ring(length, [(tile, q_ready, q_free)], before=g * length)

        @pl.when(wg < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first, masked_to, end = t.queries(place()[2], _TILE)
            length = end - first
            plgpu.barrier_wait(kv_ready.at[wg])
            my_ids = load(kv_ids_s, wg, BY_ROW)

            def accumulate(dk: Any, dv: Any) -> tuple[jax.Array, jax.Array]:
                def tile(j: Any, g: Any, masked: bool) -> Any:
                    slot = (g * length + (j - first)) & (SLOTS - 1)
                    plgpu.barrier_wait(q_ready.at[slot])

                    def products(s: Any, dp: Any) -> jax.Array:
                        plgpu.wgmma(s, k_s.at[wg], q_s.at[slot].transpose((1, 0)))  # (1)
                        plgpu.wgmma(dp, v_s.at[wg], do_s.at[slot].transpose((1, 0)))
                        # The second product goes on while the exponentials of the first are taken,
                        x = t.capped(plgpu.wgmma_accumulator_load(s, wait_n=1))
                        lse = plgpu.load(sums_s["lse"].at[slot], layout=BY_COLUMN)
                        p = jnp.exp2(t.slope * x - along(lse, shape, 1))  # (5)
                        if masked:
                            ids = load(q_ids_s, slot, BY_COLUMN)
                            p = jnp.where(t.visible(shape, ids, my_ids, q_axis=1), p, 0.0)
                        plgpu.wgmma(dv, p.astype(v.dtype), do_s.at[slot])  # (6)
                        if t.softcap is not None:
                            p = p * (1 - x * x)
                        delta = plgpu.load(sums_s["delta"].at[slot], layout=BY_COLUMN)
                        # and the third while the second is used.
                        dp = plgpu.wgmma_accumulator_load(dp, wait_n=1)
                        return p * (dp - along(delta, shape, 1))  # (7)

                    ds = pl.run_scoped(products, *[Accumulator(shape, jnp.float32)] * 2)
                    plgpu.wgmma(dk, ds.astype(q.dtype), q_s.at[slot])  # (8)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # a TMA will overwrite the vectors just read
                    plgpu.barrier_arrive(q_free.at[slot])
                    return g

                @pl.loop(0, group)
                def _head(g: Any) -> None:
                    jax.lax.fori_loop(first, masked_to, functools.partial(tile, masked=True), g)
                    if not t.always_masked:
                        unmasked = functools.partial(tile, masked=False)
                        jax.lax.fori_loop(masked_to, end, unmasked, g)

                return dk[...], dv[...]

            totals = pl.run_scoped(
                accumulate, *[Accumulator((ROWS, head_dim), jnp.float32) for _ in range(2)]
            )
            # Nobody reads the keys and values now.
            k_s.at[wg][...] = (totals[0] * t.scale).astype(dk.dtype)
            v_s.at[wg][...] = totals[1].astype(dv.dtype)
            plgpu.commit_smem()
            b, h, i = place()
            rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(k_s.at[wg], dk.at[b, rows, h])
            plgpu.copy_smem_to_gmem(v_s.at[wg], dv.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

    cost, n_ids = _cost(t, q, k, q_ids, kv_ids, products=4, written=2 * k.size), len(t.ids)
    return launch(
        kernel,
        "attention_gradient_kv",
        (n_kv_heads, t.n_kv, batch),
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [
            matrices(COMPUTE, ROWS, head_dim, k.dtype),
            matrices(COMPUTE, ROWS, head_dim, v.dtype),
            matrices(SLOTS, _TILE, head_dim, q.dtype),
            matrices(SLOTS, _TILE, head_dim, do.dtype),
            vectors(_SUMS, SLOTS, _TILE, jnp.float32),
            vectors(t.ids, SLOTS, _TILE),
            vectors(t.ids, COMPUTE, ROWS),
            plgpu.Barrier(num_arrivals=2 + n_ids, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=4 + n_ids, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
        ],
        cost,
    )(q, k, v, do, {"lse": lse, "delta": delta}, dict(q_ids), dict(kv_ids))


def _cost(
    t: Tiling, q: jax.Array, k: jax.Array, q_ids: Ids, kv_ids: Ids, products: int, written: int
) -> pl.CostEstimate:
    """Of a kernel that multiplies `products` pairs of matrices and writes so many numbers."""
    batch, n_queries, n_heads, head_dim = q.shape
    pairs = batch * n_heads * t.visible_pairs(n_queries, k.shape[1])
    read = 2 * q.size + 2 * k.size  # queries, the output's gradient, keys, values
    vecs = 2 * batch * n_heads * n_queries  # log-sum-exp and delta
    vecs += sum(x.size for ids in (q_ids, kv_ids) for x in ids.values())
    return pl.CostEstimate(
        flops=2 * products * head_dim * pairs,
        transcendentals=pairs,
        bytes_accessed=(read + written) * q.dtype.itemsize + 4 * vecs,
    )
