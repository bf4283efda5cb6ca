"""Attention over a part of the keys, and how the parts of a row become one softmax.

With lse = log2 sum_t 2^(s_t) of each part, where s are the scores times log2(e), the softmax over
all parts is their mean weighted by 2^lse (Dao et al. 2022, arXiv:2205.14135, section 3.1). Arrays
are heads first: `q` `[B, n_kv_heads, group, S, head_dim]`, `k` and `v` `[B, n_kv_heads, T,
head_dim]`, `lse` `[B, n_kv_heads, group, S]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_kernels.attention.mask import visible
from slm_kernels.base2 import LOG2E

# Finite, so that a row that sees nothing stays free of NaN.
_HIDDEN = -1e30

Ids = tuple[jax.Array | None, ...]
"""q_positions, kv_positions, q_segments, kv_segments: `[B or 1, 1, S or T]` int32, or `None`."""


class Mask(NamedTuple):
    """Who sees whom, and the scores; fields as arguments of `slm_kernels.attention.attention`."""

    causal: bool
    in_order: bool
    window: int | None
    softcap: float | None
    scale: float


def part_forward(
    mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids
) -> tuple[jax.Array, jax.Array]:
    """Attention over these keys alone: like `q`, and lse, -1e30 where nothing is seen."""
    scores, _ = _scores(mask, q, k, ids)
    top = jnp.max(scores, axis=-1)
    p = jnp.exp2(scores - top[..., None])
    total = jnp.sum(p, axis=-1)
    seen = top > _HIDDEN / 2
    out = jnp.einsum("bkgst,bktd->bkgsd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out * (seen / total)[..., None]
    return out.astype(q.dtype), jnp.where(seen, top + jnp.log2(total), _HIDDEN)


def part_backward(
    mask: Mask,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Ids,
    out: jax.Array,
    lse: jax.Array,
    do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, and the gradients of k and v.

    Args:
        mask: as in `part_forward`.
        q: as in `part_forward`.
        k: as in `part_forward`.
        v: as in `part_forward`.
        ids: as in `part_forward`.
        out: attention over all keys.
        lse: of all keys.
        do: gradient of `out`.
    """
    f32 = jnp.float32
    scores, slope = _scores(mask, q, k, ids)
    # A row that has seen nothing has no weight anywhere.
    p = jnp.exp2(scores - jnp.where(lse < _HIDDEN / 2, -_HIDDEN, lse)[..., None])
    delta = jnp.sum(do.astype(f32) * out.astype(f32), axis=-1)
    dp = jnp.einsum("bkgsd,bktd->bkgst", do, v, preferred_element_type=f32)
    ds = p * (dp - delta[..., None]) * mask.scale
    if slope is not None:
        ds = ds * slope
    ds, weights = ds.astype(q.dtype), p.astype(do.dtype)
    dq = jnp.einsum("bkgst,bktd->bkgsd", ds, k, preferred_element_type=f32)
    dk = jnp.einsum("bkgst,bkgsd->bktd", ds, q, preferred_element_type=f32)
    dv = jnp.einsum("bkgst,bkgsd->bktd", weights, do, preferred_element_type=f32)
    return dq, dk, dv


def _scores(mask: Mask, q: jax.Array, k: jax.Array, ids: Ids) -> tuple[jax.Array, jax.Array | None]:
    """Scores to base 2, `[B, n_kv_heads, group, S, T]` float32, and the slope of the soft-cap."""
    scores = jnp.einsum("bkgsd,bktd->bkgst", q, k, preferred_element_type=jnp.float32) * mask.scale
    slope = None
    if mask.softcap is not None:
        bent = jnp.tanh(scores / mask.softcap)
        scores, slope = mask.softcap * bent, 1 - jnp.square(bent)
    q_positions, kv_positions, *segments = (None if x is None else x[:, 0] for x in ids)
    assert q_positions is not None
    assert kv_positions is not None
    seen = visible(q_positions, kv_positions, *segments, causal=mask.causal, window=mask.window)
    return jnp.where(seen[:, None, None], scores * LOG2E, _HIDDEN), slope


def merge(
    out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over two sets of keys from that over each: like `out`, and lse."""
    top = jnp.maximum(lse, more_lse)
    a, b = jnp.exp2(lse - top), jnp.exp2(more_lse - top)
    joined = (out * a[..., None] + more * b[..., None]) / (a + b)[..., None]
    return joined, top + jnp.log2(a + b)
