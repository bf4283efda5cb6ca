"""Attention as two batched products that XLA fuses; keys and values are read once a group.

Where queries and keys are known to stand in one order, queries go in blocks and each block meets
only the keys it can see: half the work of a causal mask, a window's share of a long row.
"""

import itertools

import jax
import jax.numpy as jnp

from slm_kernels.attention.mask import visible
from slm_kernels.dispatch import reshape_rows

# Finite, so that a row that sees nothing stays free of NaN in the backward pass.
_HIDDEN = -1e30

# Queries of a block, at least; and blocks, at most: each is code of its own.
_BLOCK, _MOST_BLOCKS = 128, 8


def attention_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    in_order: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Attention in O(S T) memory; arguments and result as in `slm_kernels.attention.attention`."""
    length = q.shape[1]
    n_blocks = min(_MOST_BLOCKS, length // _BLOCK) if causal and in_order else 1
    if n_blocks < 2:
        bounds = [(0, length, 0, k.shape[1])]
    else:
        edges = [length * i // n_blocks for i in range(n_blocks + 1)]
        bounds = [
            (lo, hi, 0 if window is None else max(0, lo - window + 1), hi)
            for lo, hi in itertools.pairwise(edges)
        ]
    parts = [
        _attend(
            q[:, lo:hi],
            k[:, first:last],
            v[:, first:last],
            q_positions=q_positions[:, lo:hi],
            kv_positions=kv_positions[:, first:last],
            q_segments=None if q_segments is None else q_segments[:, lo:hi],
            kv_segments=None if kv_segments is None else kv_segments[:, first:last],
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
        )
        for lo, hi, first, last in bounds
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """One block of queries against all keys given."""
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    group = n_heads // n_kv_heads
    mask = visible(
        q_positions, kv_positions, q_segments, kv_segments, causal=causal, window=window
    )[:, None, None]

    # Heads first and the group folded into the queries: two plain batched products, which XLA:CPU
    # does not transpose inside its fusions.
    q = reshape_rows(q, batch, length, n_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = reshape_rows(q, batch, n_kv_heads, group * length, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bksd,bktd->bkst", q, k, preferred_element_type=jnp.float32) * scale
    scores = reshape_rows(scores, batch, n_kv_heads, group, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, _HIDDEN)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    p = jnp.exp(scores - top)
    # A row that sees nothing has top = _HIDDEN and p = 1 everywhere: return zeros instead.
    # Divided after the second product: the normalised weights are never written to memory.
    share = (top > _HIDDEN / 2) / jnp.sum(p, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkst,bktd->bksd",
        reshape_rows(p, batch, n_kv_heads, group * length, -1).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = reshape_rows(out, batch, n_kv_heads, group, length, head_dim) * share
    out = reshape_rows(out.transpose(0, 3, 1, 2, 4), batch, length, n_heads, head_dim)
    return out.astype(q.dtype)
