"""Grouped-query attention with masks by position and document."""

import functools

import jax
from jax.sharding import PartitionSpec as P

from slm_kernels.attention.cudnn import attention_cudnn
from slm_kernels.attention.gpu import attention_gpu, refusal
from slm_kernels.attention.reference import attention_reference
from slm_kernels.attention.ring import ring_attention
from slm_kernels.attention.tpu import attention_tpu
from slm_kernels.attention.xla import attention_xla
from slm_kernels.dispatch import (
    KERNELS,
    on_hopper,
    per_shard,
    pick,
    platform,
    spec_of,
    whole_rows,
)

IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": attention_xla,
    "tpu": attention_tpu,
    "gpu": attention_gpu,
    "cudnn": attention_cudnn,
}

# Queries from which on a kernel is the default: below, its tiles are mostly padding.
_FEW_QUERIES = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool = True,
    in_order: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of `n_heads` query heads over `n_kv_heads` key/value heads.

    A query sees a key if the key's position is not negative, both are in the same segment, and,
    when causal, the key's position is not larger; with a window w, also if the query is at most
    w - 1 positions ahead. A row that sees nothing returns zeros.

    Args:
        q: `[B, S, n_heads, head_dim]`.
        k: `[B, T, n_kv_heads, head_dim]`.
        v: `[B, T, n_kv_heads, head_dim]`.
        q_positions: `[B or 1, S]` int32, position of each query in its document.
        kv_positions: `[B or 1, T]` int32; -1 marks an empty cache slot.
        q_segments: `[B, S]` int32 document ids, or `None` for one document a row.
        kv_segments: `[B, T]`, given exactly if `q_segments` is.
        causal: hide later positions.
        in_order: promises that query s and key s are the same token, that positions count up by
            one within a segment and that no query sees a key of a higher index, as in training
            on packed rows; what is hidden is then skipped.
        window: width of the sliding window, or `None`.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2), or `None`.
        scale: multiplies the scores; default head_dim^-1/2.
        implementation: `"reference"`, `"xla"`, `"tpu"`, `"gpu"` (Hopper), `"cudnn"` (NVIDIA's,
            without documents and soft-cap), or `None`: for 128 queries or more `"tpu"` on a TPU
            and `"gpu"` on a Hopper GPU where it takes the arguments, else `"xla"`.

    Returns:
        `[B, S, n_heads, head_dim]` in the dtype of `q`; softmax in float32.

    Raises:
        ValueError: on shapes that do not fit, an unknown implementation, or a kernel asked for
            what it does not do, such as to work on rows that are split along the sequence.
    """
    n_heads, n_kv_heads = q.shape[2], k.shape[2]
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads={n_heads} is not a multiple of n_kv_heads={n_kv_heads}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q{q.shape}, k{k.shape}, v{v.shape}: batch and head_dim must agree")
    if in_order and q.shape[1] != k.shape[1]:
        raise ValueError(f"in_order=True needs as many keys as queries: q{q.shape}, k{k.shape}")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments are given together or not at all")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    default = "xla"
    if q.shape[1] >= _FEW_QUERIES:
        if platform() == "tpu":
            default = "tpu"
        elif on_hopper() and refusal(q, k, v, scale) is None:
            default = "gpu"
    name, run = pick("attention", implementation, IMPLEMENTATIONS, default)
    run = functools.partial(
        run, causal=causal, in_order=in_order, window=window, softcap=softcap, scale=scale
    )
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "q_segments": q_segments,
        "kv_segments": kv_segments,
    }
    if name not in KERNELS:
        return run(**arrays)
    rows, _, heads, _ = whole_rows(name, "q", q)
    kv_heads = spec_of(k)[2]
    if kv_heads != heads and n_kv_heads > 1:
        raise ValueError(
            f"implementation={name!r} needs a query head and its key head on one device, and "
            f"{n_heads} query heads are split over {heads}, {n_kv_heads} key heads over "
            f"{kv_heads}: split over fewer devices, or use implementation='xla'"
        )
    by_head, by_row = P(rows, None, heads, None), P(rows, None)
    by_kv_head = P(rows, None, kv_heads, None)
    specs = {"q": by_head, "k": by_kv_head, "v": by_kv_head} | {
        field: by_row if x is not None and x.shape[0] == q.shape[0] else P(None, None)
        for field, x in arrays.items()
        if field not in "qkv"
    }
    return per_shard(run, arrays, specs, by_head)


__all__ = ["IMPLEMENTATIONS", "attention", "ring_attention"]
