"""Decode attention on TPU: the seen part of the cache streams through VMEM once.

With the running maximum m, sum l and output o of a query head (Dao et al. 2022, arXiv:2205.14135,
algorithm 1), for a block of slots t after another:

    s  = scale log2(e) kscale_t (q . k_t)            unseen slots: -1e30                        (1)
    m' = max(m, max_t s_t),   p_t = 2^(s_t - m')                                                (2)
    l' = 2^(m - m') l + sum_t p_t                                                               (3)
    o' = 2^(m - m') o + sum_t p_t vscale_t v_t       at the end o / l and lse = m + log2(l)     (4)

The time is that of reading the cache, so nothing may move it first. XLA keeps `[B, S, K, D]` in the
order that pads least, and the kernel takes each order as it lies (a transpose that only renames):

    "rows"   D a multiple of 128, K a power of two: slots and heads are rows of one matrix,

                 [S K, D]   slot 0 head 0 | slot 0 head 1 | .. | slot 1 head 0 | ..

             and all H queries meet all of its rows; a query keeps every K-th score, those of its
             own head. The matrix unit has that time to spare: it waits for the memory.
    "heads"  D a multiple of 128, any other K: `[K, S, D]`, a product a head.
    "lanes"  D not a multiple of 128: `[K, D, S]`, a product a head with slots on the lanes.

Grid: batch x blocks of slots. From the first and the last slot that a row sees, prefetched, follow
its first and last block; steps beyond repeat the last block, which copies nothing, and compute
nothing. The end is prefetched as the number of slots behind it: a table of zeros is a full cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.attention.tpu_tiles import (
    HIDDEN,
    LANES,
    log2,
    pad,
    round_up,
    varying,
)
from slm_kernels.decode.tpu_kernel import Layout, call

_BLOCK_BYTES = 2**20  # of keys: copies are long, and keys and values fit twice


def order_of(k: jax.Array) -> str:
    """How XLA keeps a cache `[B, S, K, D]` on a TPU."""
    heads, head_dim = k.shape[2:]
    if head_dim % LANES:
        return "lanes"
    packed = 4 // k.dtype.itemsize  # rows in a sublane
    return "heads" if heads & (heads - 1) or heads < packed else "rows"


def decode_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    seen: jax.Array,
    start: jax.Array,
    end: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    fixed: tuple[int, int] | None,
    holes: bool,
    softcap: float | None,
    scale: float,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.decode.reference`.

    Args:
        q: `[B, H, D]`.
        k: `[B, S, K, D]`.
        v: `[B, S, K, D]`.
        seen: `[B, S]` bool; read only with `holes`.
        start: `[B]` int32.
        end: `[B]` int32.
        k_scale: `[B, S, K]` or `None`.
        v_scale: `[B, S, K]` or `None`.
        fixed: `start` and `end` if they are known before and those of every row.
        holes: whether a slot from `start` to `end` may be unseen.
        softcap: bound of the scores, or `None`.
        scale: multiplies the scores.
        block: slots of a block, a power of two from 128; `None` chooses.

    Raises:
        ValueError: if the block is none, or on differentiation.
    """
    slots, heads, head_dim = k.shape[1:]
    if block is None:
        row = heads * round_up(head_dim, 8) * k.dtype.itemsize
        block = max(LANES, 1 << log2(max(1, _BLOCK_BYTES // row)))
    if block < LANES or block & (block - 1):
        raise ValueError(f"block={block} is not a power of two from {LANES}")
    lay = Layout(
        order=order_of(k),
        slots=slots,
        heads=heads,
        group=q.shape[1] // heads,
        block=min(block, slots),
        fixed=fixed,
        holes=holes,
        softcap=softcap,
        scale=float(scale),
    )
    arrays = varying(q, k, v, seen if holes else None, start, end, k_scale, v_scale)
    return _attend(lay, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(lay: Layout, q: Any, k: Any, v: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """The arguments of `decode_attention_tpu` to those of the kernel, and back."""
    seen, start, end, k_scale, v_scale = rest
    batch, n_heads, head_dim = q.shape
    queries = q.reshape(batch, lay.planes, -1, head_dim)
    if lay.order == "rows":
        k, v = (x.reshape(batch, 1, -1, head_dim) for x in (k, v))
    else:
        axes = (0, 2, 1, 3) if lay.order == "heads" else (0, 2, 3, 1)
        k, v = k.transpose(axes), v.transpose(axes)
    # Slots on the lanes, as XLA keeps them; whole registers of them.
    spare = round_up(lay.block, LANES) - lay.block
    scales = [
        None if x is None else pad(x.transpose(0, 2, 1).astype(jnp.float32), 2, lay.slots + spare)
        for x in (k_scale, v_scale)
    ]
    hidden = None
    if seen is not None:
        row = jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)[:, None]
        hidden = pad(row, 2, lay.slots + spare)
    table = None if lay.fixed else jnp.stack([start, lay.slots - end])
    out, lse = call(lay, table, queries, k, v, hidden, *scales)
    return out.reshape(q.shape), lse[..., 0].reshape(batch, n_heads)


def _no_gradient(*_: Any) -> Any:
    raise ValueError(
        "implementation='tpu' of decode_attention has no gradient: use implementation='xla', or "
        "attention() in training"
    )


_attend.defvjp(_no_gradient, _no_gradient)
