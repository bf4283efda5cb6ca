"""The specification: one head at a time, in float32."""

import jax
import jax.numpy as jnp

from slm_kernels.attention.mask import visible


def attention_reference(
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
    """Plain attention; arguments and result as in `slm_kernels.attention.attention`."""
    mask = visible(q_positions, kv_positions, q_segments, kv_segments, causal=causal, window=window)
    group = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        qh, kh, vh = (
            a.astype(jnp.float32) for a in (q[:, :, h], k[:, :, h // group], v[:, :, h // group])
        )
        scores = jnp.einsum("bsd,btd->bst", qh, kh, precision="highest") * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(mask, scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        p = p / jnp.where(total == 0, 1.0, total)
        heads.append(jnp.einsum("bst,btd->bsd", p, vh, precision="highest"))
    return jnp.stack(heads, axis=2).astype(q.dtype)
