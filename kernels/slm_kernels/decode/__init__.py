"""Attention of one new token a row over a long cache of keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_kernels.attention.mask import visible
from slm_kernels.decode.reference import decode_attention_reference
from slm_kernels.decode.tpu import decode_attention_tpu
from slm_kernels.decode.xla import decode_attention_xla
from slm_kernels.dispatch import KERNELS, per_shard, pick, platform, spec_of, whole_rows

IMPLEMENTATIONS = {
    "reference": decode_attention_reference,
    "xla": decode_attention_xla,
    "tpu": decode_attention_tpu,
}


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of one query a row over the slots of its cache (Dao et al., 2205.14135).

    A row sees slot s if s < lengths and, with positions, if 0 <= kv_positions[s] <= q_positions
    and q_positions - kv_positions[s] < window. Without positions slot s holds token s and the
    query is the last of them, token lengths - 1. Positions may stand in any order, as in a ring.
    Numbers in slots that a row does not see must be finite.

    The TPU kernel neither fetches nor computes blocks of slots beyond `lengths`, or, without
    positions, left of the window; these slots may hold NaN too.

    Args:
        q: `[B, H, D]`, bfloat16 or float32.
        k: `[B, S, K, D]`, bfloat16, float32 or int8; K divides H, and H / K heads share one.
        v: `[B, S, K, D]`, as `k`.
        lengths: `[B]` int32, slots in use; S of them by default.
        q_positions: `[B]` int32, position of the query; given exactly if `kv_positions` is.
        kv_positions: `[B or 1, S]` int32; -1 marks an empty slot.
        k_scale: `[B, S, K]` float32, one a token and key head, of int8 keys: k times it is meant.
        v_scale: `[B, S, K]` float32, of int8 values.
        window: keys that a query sees, itself included, or `None` for all.
        softcap: scores become softcap * tanh(scores / softcap), or `None`.
        scale: multiplies the scores; default D^-1/2.
        implementation: `"reference"`, `"xla"`, `"tpu"`, or `None`: `"tpu"` on a TPU, else `"xla"`.

    Returns:
        `[B, H, D]` in the dtype of `q`, zero where a row sees nothing, and the natural log-sum-exp
        of the scores `[B, H]` float32, -inf there: results over parts of a cache add up by it.

    Raises:
        ValueError: on shapes or dtypes that do not fit, scales without int8 or int8 without
            scales, or a cache that is split along the sequence. The TPU kernel has no gradient.
    """
    _check(q, k, v, lengths, q_positions, kv_positions, k_scale, v_scale, window)
    on_tpu = platform() == "tpu"
    name, run = pick(
        "decode_attention", implementation, IMPLEMENTATIONS, default="tpu" if on_tpu else "xla"
    )
    seen, start, end = _seen(k, lengths, q_positions, kv_positions, window)
    fixed = None
    if lengths is None:
        far = k.shape[1] if window is None or kv_positions is not None else window
        fixed = (max(k.shape[1] - far, 0), k.shape[1])
    run = functools.partial(
        run,
        fixed=fixed,
        holes=kv_positions is not None,
        softcap=softcap,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
    )
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "seen": seen,
        "start": start,
        "end": end,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    if name not in KERNELS:
        return run(**arrays)
    rows, _, kv_heads, _ = whole_rows(name, "k", k)
    heads = spec_of(q)[1]
    if kv_heads != heads and k.shape[2] > 1:
        raise ValueError(
            f"implementation={name!r} needs a query head and its key head on one device, and "
            f"q is split over {heads}, k over {kv_heads}: split both the same way, or use "
            f"implementation='xla'"
        )
    cache, scales = P(rows, None, kv_heads, None), P(rows, None, kv_heads)
    specs = {
        "q": P(rows, heads, None),
        "k": cache,
        "v": cache,
        "seen": P(rows, None),
        "start": P(rows),
        "end": P(rows),
        "k_scale": scales,
        "v_scale": scales,
    }
    return per_shard(run, arrays, specs, (P(rows, heads, None), P(rows, heads)))


def _seen(
    k: jax.Array,
    lengths: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which slots each row sees `[B, S]`, and from which slot `[B]` to which it may see some."""
    batch, slots = k.shape[:2]
    index = jnp.arange(slots, dtype=jnp.int32)
    if lengths is None:
        end = jnp.full((batch,), slots, jnp.int32)
    else:
        end = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, slots)
    if q_positions is not None and kv_positions is not None:
        mask = visible(q_positions[:, None], kv_positions, None, None, causal=True, window=window)
        seen = mask[:, 0]
        return seen if lengths is None else seen & (index < end[:, None]), jnp.zeros_like(end), end
    start = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    return (index >= start[:, None]) & (index < end[:, None]), start, end


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    window: int | None,
) -> None:
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q{q.shape}, k{k.shape}, v{v.shape}: want q[B, H, D], k and v[B, S, K, D]"
        )
    batch, slots, n_kv_heads, head_dim = k.shape
    if q.shape[0] != batch or q.shape[2] != head_dim:
        raise ValueError(f"q{q.shape}, k{k.shape}: batch and head_dim must agree")
    if q.shape[1] % n_kv_heads:
        raise ValueError(f"n_heads={q.shape[1]} is not a multiple of n_kv_heads={n_kv_heads}")
    if k.dtype != v.dtype:
        raise ValueError(f"k is {k.dtype}, v {v.dtype}: convert them to one dtype")
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("q_positions and kv_positions are given together or not at all")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (k.dtype == jnp.int8):
            raise ValueError(
                f"{name} is {'missing' if scale is None else 'given'} and the cache is {k.dtype}: "
                f"int8 has a scale a token and head, nothing else has one"
            )
        if scale is not None and scale.shape != k.shape[:3]:
            raise ValueError(f"{name}{scale.shape}: want {k.shape[:3]} to go with k{k.shape}")
    for name, x in (("lengths", lengths), ("q_positions", q_positions)):
        if x is not None and x.shape != (batch,):
            raise ValueError(f"{name}{x.shape}: want {(batch,)} to go with k{k.shape}")
    if kv_positions is not None and kv_positions.shape not in ((batch, slots), (1, slots)):
        raise ValueError(f"kv_positions{kv_positions.shape}: want {(batch, slots)}, or one row")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for all slots")


__all__ = ["IMPLEMENTATIONS", "decode_attention"]
