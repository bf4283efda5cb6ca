"""Attention mixer: MHA, GQA and MQA, sliding window, soft-cap, QK-norm, and its KV cache."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from slm_kernels.attention import attention

from slm_jax.errors import UserError
from slm_jax.nn.linear import Linear
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.nn.rope import RopeConfig, apply_rope, rope_tables
from slm_jax.parallel.rules import split_as


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention over all earlier tokens, or over a window of them."""

    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key/value heads: n_heads is MHA, 1 is MQA, between is GQA (arXiv 2305.13245)."""
    head_dim: int
    """Width of one head."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions, or none (NoPE, Jamba)."""
    window: int | None = None
    """Keys a query sees, itself included; `None` sees all."""
    softcap: float | None = None
    """Scores are squashed to +-softcap (Gemma 2)."""
    scale: float | None = None
    """Multiplies the scores; `None` is head_dim^-1/2."""
    qk_norm: Literal["head", "full"] | None = None
    """Normalise queries and keys per head (Qwen3) or over the full width (OLMo-2)."""
    qkv_bias: bool = False
    """Biases on the three input projections (Qwen2)."""
    out_bias: bool = False
    """Bias on the output projection."""

    def __post_init__(self) -> None:
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            divisors = [d for d in range(1, self.n_heads + 1) if self.n_heads % d == 0]
            raise UserError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}: "
                f"choose {', '.join(map(str, divisors[:-1]))} or {divisors[-1]}"
                if len(divisors) > 1
                else f"n_heads={self.n_heads} allows only n_kv_heads=1"
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1, or None for full attention")
        if self.rope is not None and int(self.head_dim * self.rope.fraction) % 2:
            raise UserError(
                f"head_dim={self.head_dim}: rope rotates pairs, so head_dim x fraction must be even"
            )

    @property
    def out_fan_in(self) -> int:
        """Inputs of the output projection."""
        return self.n_heads * self.head_dim

    def flops(self, d_model: int, seq_len: int, causal: bool) -> dict[str, float]:
        """Forward operations a token by part of `FlopBreakdown`, on average over a row."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        keys = visible_keys(seq_len, self.window) if causal else seq_len
        return {
            "attention_projections": 2 * d_model * heads * self.head_dim,
            "attention_products": 4 * self.n_heads * self.head_dim * keys,
        }

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Keys and values of one row after `length` tokens of `itemsize` bytes a number.

        The position of each slot (4 bytes) is bookkeeping and not counted.
        """
        slots = length if self.window is None else min(length, self.window)
        return 2 * slots * self.n_kv_heads * self.head_dim * itemsize


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a causal query sees, itself included, on average over the positions of a row."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) // 2 + (seq_len - w) * w) / seq_len


class KVCache(NamedTuple):
    """Keys and values seen so far; with a window, a ring of the last ones.

    Attributes:
        k: `[B, capacity, n_kv_heads, head_dim]`.
        v: the same.
        positions: `[B, capacity]` int32, -1 where a slot is empty or was padding.
        written: `[]` int32, slots written since the start, padding included.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    written: jax.Array


class Attention(nnx.Module):
    """`mixer(x, positions, segments, state) -> (y, state)` by softmax attention."""

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        norm: NormConfig,
        *,
        key: jax.Array,
        out_std: float,
    ) -> None:
        sizes = {
            "embed": d_model,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
        }
        kv_axes = "embed -> kv_heads head_dim"
        if config.n_kv_heads == 1:  # MQA's one head is on every device that has query heads
            kv_axes = "embed -> kv_head head_dim"
            sizes["kv_head"] = sizes.pop("kv_heads")
        kq, kk, kv, ko = jax.random.split(key, 4)
        bias = config.qkv_bias
        self.config = config
        self.q = Linear("embed -> heads head_dim", sizes, key=kq, bias=bias)
        self.k = Linear(kv_axes, sizes, key=kk, bias=bias)
        self.v = Linear(kv_axes, sizes, key=kv, bias=bias)
        self.out = Linear(
            "heads head_dim -> embed", sizes, key=ko, bias=config.out_bias, std=out_std
        )
        weighted = replace(norm, bias=False)
        q_shape: int | tuple[int, int] = config.head_dim
        k_shape: int | tuple[int, int] = config.head_dim
        if config.qk_norm == "full":
            q_shape = (config.n_heads, config.head_dim)
            k_shape = (config.n_kv_heads, config.head_dim)
        self.q_norm = Norm(weighted, q_shape) if config.qk_norm else None
        self.k_norm = Norm(weighted, k_shape) if config.qk_norm else None

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> KVCache:
        """An empty cache of `max_len` slots, or of `window` slots if that is fewer."""
        c = self.config
        capacity = max_len if c.window is None else min(max_len, c.window)
        shape = (batch, capacity, c.n_kv_heads, c.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.full((batch, capacity), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array | None,
        state: KVCache | None = None,
        causal: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes tokens.

        Args:
            x: `[B, S, embed]`.
            positions: `[B or 1, S]` int32.
            segments: `[B, S]` int32, 0 = padding; `None` = one document a row. With a state a
                row is one document and only padding is read from it.
            state: cache to extend, or `None` in training.
            causal: hide later tokens; false only without a state.

        Returns:
            `[B, S, embed]` and the extended cache (`None` without one).
        """
        c = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rope is not None:
            # The barrier keeps XLA from computing sines again, a head at a time, in every fusion.
            tables = rope_tables(c.rope, c.head_dim, positions)
            cos, sin = jax.lax.optimization_barrier(tables)
            q, k = (apply_rope(a, cos, sin, c.rope.layout) for a in (q, k))
        if state is None:
            y = attention(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                causal=causal,
                in_order=causal,
                window=c.window,
                softcap=c.softcap,
                scale=c.scale,
            )
            return self.out(y), None
        positions = jnp.broadcast_to(positions, x.shape[:2])
        kv_positions = positions if segments is None else jnp.where(segments > 0, positions, -1)
        state = KVCache(
            split_as(state.k, k, (0, None, 2, 3)),
            split_as(state.v, v, (0, None, 2, 3)),
            split_as(state.positions, k, (0, None)),
            state.written,
        )
        extended, keys = _extend(state, k, v, kv_positions, ring=c.window is not None)
        y = attention(
            q,
            keys.k.astype(q.dtype),
            keys.v.astype(q.dtype),
            q_positions=positions,
            kv_positions=keys.positions,
            window=c.window,
            softcap=c.softcap,
            scale=c.scale,
        )
        return self.out(y), extended


def _extend(
    cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array, *, ring: bool
) -> tuple[KVCache, KVCache]:
    """Appends new keys; returns the new cache and the keys the new queries may look at."""
    capacity, new = cache.positions.shape[1], positions.shape[1]
    k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    kept = min(new, capacity)
    slots = (cache.written + new - kept + jnp.arange(kept)) % capacity
    extended = KVCache(
        cache.k.at[:, slots].set(k[:, -kept:]),
        cache.v.at[:, slots].set(v[:, -kept:]),
        cache.positions.at[:, slots].set(positions[:, -kept:]),
        cache.written + new,
    )
    if not ring or new == 1:
        return extended, extended
    # Several tokens may overwrite keys that the first of them still sees: look at old and new.
    return extended, KVCache(
        jnp.concatenate([cache.k, k], axis=1),
        jnp.concatenate([cache.v, v], axis=1),
        jnp.concatenate([cache.positions, positions], axis=1),
        cache.written,
    )
