"""The KV cache of attention: full, a ring of the last tokens, or either in int8.

The token at position p stands in slot p % capacity. So a row's length is where its next token goes:
to take tokens back is to write the next ones over them, and until then no query looks that far
ahead. Rows of a batch may stand at different positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        k: `[B, capacity, n_kv_heads, head_dim]`, of a float type or int8.
        v: the same.
        positions: `[B, capacity]` int32, of the token in each slot; -1 where there is none.
        k_scale: `[B, capacity, n_kv_heads]` float32, `None` unless k is int8: k times it is meant.
        v_scale: the same of v.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def empty_cache(
    batch: int, capacity: int, heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """A cache without tokens; `dtype` is that of keys and values, int8 for a quantised one."""
    shape = (batch, capacity, heads, head_dim)
    scale = jnp.zeros(shape[:3], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
    nowhere = jnp.full((batch, capacity), -1, jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), nowhere, scale, scale)


def packed(cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
    """New tokens in the form in which `cache` keeps them.

    Args:
        cache: says the type.
        k: `[B, S, n_kv_heads, head_dim]`.
        v: the same.
        positions: `[B, S]` int32, -1 for padding.
    """
    if cache.k_scale is None:
        return KVCache(k.astype(cache.k.dtype), v.astype(cache.v.dtype), positions)
    (k, k_scale), (v, v_scale) = _quantised(k), _quantised(v)
    return KVCache(k, v, positions, k_scale, v_scale)


def _quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of 8 bits and a scale a token and head: off by at most 1/254 of its largest number."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return codes.astype(jnp.int8), scale


def numbers(cache: KVCache, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all slots as numbers of type `dtype`."""
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k.astype(dtype), cache.v.astype(dtype)
    k = cache.k.astype(jnp.float32) * cache.k_scale[..., None]
    v = cache.v.astype(jnp.float32) * cache.v_scale[..., None]
    return k.astype(dtype), v.astype(dtype)


def slots_of(positions: jax.Array, capacity: int) -> jax.Array:
    """The slots that new tokens are written to: `[B, S]` int32.

    It is `capacity`, one beyond the last, for what is not written: padding, and of two tokens with
    one slot the earlier.
    """
    last = jnp.max(positions, axis=1, keepdims=True)
    written = (positions >= 0) & (positions > last - capacity)
    return jnp.where(written, positions % capacity, capacity)


def written(cache: KVCache, new: KVCache) -> KVCache:
    """The cache with the tokens of `new`, which `packed` made."""
    slots = slots_of(new.positions, cache.positions.shape[1])

    def row(old: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots].set(new, mode="drop")

    return jax.tree.map(lambda old, new: jax.vmap(row)(old, slots, new), cache, new)


def beside(cache: KVCache, new: KVCache) -> KVCache:
    """All that several new tokens may see of a ring in which they overwrite one another's keys.

    What the cache holds from the first new position on was taken back.
    """
    ahead = jnp.where(new.positions >= 0, new.positions, jnp.iinfo(jnp.int32).max)
    first = jnp.min(ahead, axis=1, keepdims=True)
    cache = cache._replace(positions=jnp.where(cache.positions < first, cache.positions, -1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), cache, new)
