"""Attention mixer: MHA, GQA and MQA, sliding window, soft-cap, QK-norm, and its KV cache."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from slm_kernels.attention import attention, ring_attention
from slm_kernels.decode import decode_attention

from slm_jax.errors import UserError
from slm_jax.nn.kv_cache import KVCache, beside, empty_cache, numbers, packed, written
from slm_jax.nn.linear import Linear
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.nn.rope import RopeConfig, apply_rope, rope_tables
from slm_jax.parallel.rules import MeshAxes, lead_spec, spec, split_as
from slm_jax.parallel.sequence import on_parts, whole


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

        With one byte it is int8, which has a float32 scale a token and head. The position of each
        slot (4 bytes) is bookkeeping and not counted.
        """
        slots = length if self.window is None else min(length, self.window)
        scale = 4 if itemsize == 1 else 0
        return 2 * slots * self.n_kv_heads * (self.head_dim * itemsize + scale)


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a causal query sees, itself included, on average over the positions of a row."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) // 2 + (seq_len - w) * w) / seq_len


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

    def init_state(
        self, batch: int, max_len: int, dtype: jax.typing.DTypeLike, spare: int = 0
    ) -> KVCache:
        """An empty cache of `max_len` slots, or of `window + spare` slots if that is fewer.

        Args:
            batch: rows.
            max_len: tokens that a row will have at most.
            dtype: of keys and values; int8 is a quantised cache.
            spare: the last tokens of a row that may be taken back.
        """
        c = self.config
        slots = max_len if c.window is None else min(max_len, c.window + spare)
        return empty_cache(batch, slots, c.n_kv_heads, c.head_dim, dtype)

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
            return self.out(self._attend_row(q, k, v, positions, segments, causal)), None
        positions = jnp.broadcast_to(positions, x.shape[:2])
        kv_positions = positions if segments is None else jnp.where(segments > 0, positions, -1)
        state, new = _split_as_keys(state, k), packed(state, k, v, kv_positions)
        extended = written(state, new)
        return self.out(self._attend(q, positions, state, new, extended)), extended

    def remember(self, x: jax.Array, positions: jax.Array, state: KVCache) -> KVCache:
        """The cache with tokens `[B, S, embed]` at `positions` `[B, S]` that attend to nothing."""
        k, v, rope = self.k(x), self.v(x), self.config.rope
        if self.k_norm is not None:
            k = self.k_norm(k)
        if rope is not None:
            k = apply_rope(k, *rope_tables(rope, self.config.head_dim, positions), rope.layout)
        return written(_split_as_keys(state, k), packed(state, k, v, positions))

    def _attend_row(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None,
        causal: bool,
    ) -> jax.Array:
        """Attention of the tokens of each row to each other, whether or not rows are split."""
        c = self.config
        options: dict[str, Any] = dict(window=c.window, softcap=c.softcap, scale=c.scale)
        seq = lead_spec(q, 2)[1]
        if seq is None:
            return attention(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                causal=causal,
                in_order=causal,
                **options,
            )
        part = ring_attention if spec(("kv_seq",))[0] == seq else _attend_whole
        given = {"q": q, "k": k, "v": v, "positions": positions, "segments": segments}
        return on_parts(partial(part, axis=seq, causal=causal, **options), given, like="q")

    def _attend(
        self, q: jax.Array, positions: jax.Array, old: KVCache, new: KVCache, extended: KVCache
    ) -> jax.Array:
        """Attention `[B, S, heads, head_dim]` of new queries over the tokens so far and the new."""
        c = self.config
        length, capacity = q.shape[1], extended.positions.shape[1]
        options: dict[str, Any] = dict(window=c.window, softcap=c.softcap, scale=c.scale)
        if length == 1:
            at = positions[:, 0]
            y, _ = decode_attention(
                q[:, 0],
                extended.k,
                extended.v,
                lengths=jnp.minimum(at + 1, capacity),
                q_positions=at,
                kv_positions=extended.positions,
                k_scale=extended.k_scale,
                v_scale=extended.v_scale,
                **options,
            )
            return y[:, None]
        # In a ring without room to spare the last of the new tokens overwrite what the first see.
        in_place = c.window is None or capacity >= c.window + length - 1
        keys = extended if in_place else beside(old, new)
        k, v = numbers(keys, q.dtype)
        return attention(q, k, v, q_positions=positions, kv_positions=keys.positions, **options)


def _split_as_keys(cache: KVCache, k: jax.Array) -> KVCache:
    """Splits a cache over devices as new keys are."""
    return jax.tree.map(lambda a: split_as(a, k, (0, None, 2, 3)[: a.ndim]), cache)


def _attend_whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array | None,
    axis: MeshAxes,
    **options: Any,
) -> jax.Array:
    """The queries of one device's part of a row against the gathered keys of the whole row."""
    return attention(
        q,
        whole(k, axis),
        whole(v, axis),
        q_positions=positions,
        kv_positions=whole(positions, axis),
        q_segments=segments,
        kv_segments=None if segments is None else whole(segments, axis),
        **options,
    )
