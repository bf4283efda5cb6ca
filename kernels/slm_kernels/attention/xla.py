"""Attention as two batched products that XLA fuses; keys and values are read once a group."""

import jax
import jax.numpy as jnp

from slm_kernels.attention.mask import visible

# Finite, so that a row that sees nothing stays free of NaN in the backward pass.
_HIDDEN = -1e30


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
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Attention in O(S T) memory; arguments and result as in `slm_kernels.attention.attention`."""
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    mask = visible(
        q_positions, kv_positions, q_segments, kv_segments, causal=causal, window=window
    )[:, None, None]
    grouped = q.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, _HIDDEN)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    # A row that sees nothing has top = _HIDDEN and p = 1 everywhere: return zeros instead.
    p = p / total * (top > _HIDDEN / 2)
    out = jnp.einsum("bkgst,btkd->bskgd", p.astype(v.dtype), v)
    return out.reshape(batch, length, n_heads, head_dim).astype(q.dtype)
