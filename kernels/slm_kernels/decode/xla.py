"""Decode attention as two batched products that XLA fuses; reads the whole cache."""

import jax
import jax.numpy as jnp

from slm_kernels.dispatch import reshape_rows

# Finite, so that a row that sees nothing stays free of NaN.
_HIDDEN = -1e30


def decode_attention_xla(
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
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.decode.reference`."""
    del start, end, fixed, holes
    batch, n_heads, head_dim = q.shape
    f32 = jnp.float32
    rows = reshape_rows(q, batch, k.shape[2], -1, head_dim)
    mask = seen[:, None, None]
    scores = jnp.einsum("bkgd,bskd->bkgs", rows, k.astype(q.dtype), preferred_element_type=f32)
    if k_scale is not None:
        scores = scores * k_scale.astype(f32).transpose(0, 2, 1)[:, :, None]
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, _HIDDEN)
    top = jnp.max(scores, axis=3, keepdims=True)
    p = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(p, axis=3)
    if v_scale is not None:
        p = p * v_scale.astype(f32).transpose(0, 2, 1)[:, :, None]
    out = jnp.einsum(
        "bkgs,bskd->bkgd", p.astype(q.dtype), v.astype(q.dtype), preferred_element_type=f32
    )
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top[..., 0] + jnp.log(total))
    return reshape_rows(out, *q.shape).astype(q.dtype), reshape_rows(lse, batch, n_heads)
