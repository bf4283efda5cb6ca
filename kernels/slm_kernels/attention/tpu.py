"""Flash attention on TPU: softmax row by row, no matrix of scores in memory.

Forward (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691), for a tile of
keys after another, with the running maximum m, sum l and output o of a query:

    s  = scale log2(e) q . k                         hidden scores are -1e30                    (1)
    m' = max(m, max_t s_t),   p_t = 2^(s_t - m')                                                (2)
    l' = 2^(m - m') l + sum_t p_t                                                               (3)
    o' = 2^(m - m') o + sum_t p_t v_t                at the end o / l and lse = m + log2(l)     (4)

Backward, with the output's gradient do and delta = sum_d do_d o_d:

    p  = 2^(s - lse)                                                                            (5)
    dv = sum_s p do                                                                             (6)
    ds = p (do . v - delta)                          with a softcap, times 1 - tanh^2           (7)
    dk = scale sum_s ds q                                                                       (8)
    dq = scale sum_t ds k                                                                       (9)

A key's head is read once for the whole group of query heads that share it.
"""

import functools

import jax
import jax.numpy as jnp

from slm_kernels import block_sizes
from slm_kernels.attention.parts import Ids, Mask
from slm_kernels.attention.tpu_backward import backward
from slm_kernels.attention.tpu_forward import forward
from slm_kernels.attention.tpu_tiles import HIDDEN, LANES, Blocks, Tiling, fit, pad, varying

# Query rows of one program: more would not leave room for the keys.
_ROWS = 4096

_Padded = tuple[jax.Array, jax.Array, jax.Array, Ids]


def attention_tpu(
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
    blocks: Blocks | None = None,
    backward_blocks: Blocks | None = None,
) -> jax.Array:
    """Attention in O(S + T) memory; arguments and result as in `slm_kernels.attention.attention`.

    With `causal` and `in_order` positions are not read: within a segment they must differ as the
    indices do, and none may be negative.

    Args:
        q: `[B, S, n_heads, head_dim]`, bfloat16 or float32.
        k: `[B, T, n_kv_heads, head_dim]`, as `q`.
        v: `[B, T, n_kv_heads, head_dim]`, as `q`.
        q_positions: `[B or 1, S]` int32.
        kv_positions: `[B or 1, T]` int32.
        q_segments: `[B, S]` int32 or `None`.
        kv_segments: `[B, T]` int32 or `None`.
        causal: hide later positions.
        in_order: query s and key s are the same token.
        window: width of the sliding window, or `None`.
        softcap: bound of the scores, or `None`.
        scale: multiplies the scores.
        blocks: of the forward kernel; `None` chooses, by `slm_kernels.block_sizes`.
        backward_blocks: of the backward kernel; `None` takes `blocks`, or chooses.

    Raises:
        ValueError: if q, k and v differ in dtype.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: convert them to one dtype")
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads, group = k.shape[2], n_heads // k.shape[2]
    in_order = in_order and causal and length >= LANES
    # Heads first: a head's rows are then contiguous for the copies of the kernel.
    heads = q.reshape(batch, length, n_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    folded = length < LANES
    if folded:  # A few queries, as in decoding: the group's heads are rows of one short block.
        heads = heads.reshape(batch, n_kv_heads, 1, group * length, head_dim)
        q_positions = jnp.tile(q_positions, (1, group))
        if q_segments is not None:
            q_segments = jnp.tile(q_segments, (1, group))
    read = (None, None) if in_order else (q_positions, kv_positions)
    ids: list[jax.Array | None] = [
        None if x is None else jnp.asarray(x, jnp.int32)[:, None]
        for x in (*read, q_segments, kv_segments)
    ]
    heads, k, v, *ids = varying(heads, k, v, *ids)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    mask = Mask(causal, in_order, window, softcap, scale)
    tilings = _tilings(mask, heads, k, q_segments is not None, blocks, backward_blocks or blocks)
    out = _attend(tilings, heads, k, v, tuple(ids))
    out = out.reshape(batch, n_kv_heads, group, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def part_forward(
    mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids
) -> tuple[jax.Array, jax.Array]:
    """Attention over a part of the keys: as `slm_kernels.attention.parts.part_forward`."""
    tilings = _tilings(mask, q, k, ids[2] is not None)
    ids = _read(mask, ids)
    q, k, v = varying(q, k, v)
    out, (*_, lse) = _attend_forward(tilings, q, k, v, ids)
    return out, jnp.where(lse > -HIDDEN / 2, HIDDEN, lse)


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
    """Gradients over a part of the keys: as `slm_kernels.attention.parts.part_backward`."""
    tilings = _tilings(mask, q, k, ids[2] is not None)
    ids = _read(mask, ids)
    lse = jnp.where(lse < HIDDEN / 2, -HIDDEN, lse)
    q, k, v, out, lse, do = varying(q, k, v, out, lse, do)
    return _attend_backward(tilings, (q, k, v, ids, out, lse), do)[:3]


def _read(mask: Mask, ids: Ids) -> Ids:
    """Without the positions where the kernels do not read them."""
    return (None, None, *ids[2:]) if mask.in_order else ids


def _tilings(
    mask: Mask,
    q: jax.Array,
    k: jax.Array,
    segmented: bool,
    blocks: Blocks | None = None,
    backward_blocks: Blocks | None = None,
) -> tuple[Tiling, Tiling]:
    """Forward and backward. The table knows causal rows in order, whose masked tiles are left out.

    Where it knows nothing, or the mask is another, blocks are those of `Blocks`.
    """

    def best(kernel: str) -> Blocks:
        if not mask.in_order or mask.window is not None:
            return Blocks()
        return Blocks(**block_sizes.lookup(kernel, q.dtype, S=q.shape[3], D=q.shape[4]))

    there = blocks or best("attention_forward")
    back = backward_blocks or best("attention_backward")
    return _tiling(there, mask, q, k, segmented), _tiling(back, mask, q, k, segmented)


def _tiling(blocks: Blocks, mask: Mask, q: jax.Array, k: jax.Array, segmented: bool) -> Tiling:
    """Blocks that fit the lengths and the group of `[B, n_kv_heads, group, S, head_dim]`."""
    group, n_queries, n_keys = q.shape[2], q.shape[3], k.shape[2]
    most = max(LANES, _ROWS >> (group - 1).bit_length())
    q_block, kv_block = fit(n_queries, min(blocks.q, most)), fit(n_keys, blocks.kv)
    return Tiling(
        causal=mask.causal,
        in_order=mask.in_order,
        window=mask.window,
        softcap=mask.softcap,
        scale=float(mask.scale),
        segmented=segmented,
        q=q_block,
        kv=kv_block,
        q_tile=min(q_block, blocks.q_tile),
        kv_tile=min(kv_block, blocks.kv_tile),
        n_q=-(-n_queries // q_block),
        n_kv=-(-n_keys // kv_block),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tilings: tuple[Tiling, Tiling], q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids
) -> jax.Array:
    """Attention on `[B, n_kv_heads, group, S, head_dim]` and `[B, n_kv_heads, T, head_dim]`."""
    return _attend_forward(tilings, q, k, v, ids)[0]


def _padded(t: Tiling, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids) -> _Padded:
    """Everything at lengths that are whole blocks; no query of the caller sees a padded key."""
    n_q, n_kv = t.n_q * t.q, t.n_kv * t.kv
    ids = tuple(
        None if x is None else pad(x, 2, n, value)
        for x, n, value in zip(ids, (n_q, n_kv) * 2, (-1, -1, 0, 0), strict=True)
    )
    return pad(q, 3, n_q), pad(k, 2, n_kv), pad(v, 2, n_kv), ids


def _attend_forward(
    tilings: tuple[Tiling, Tiling], q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids
) -> tuple[jax.Array, tuple]:
    lengths = q.shape[3], k.shape[2]
    out, lse = forward(tilings[0], *_padded(tilings[0], q, k, v, ids), lengths)
    out, lse = out[:, :, :, : lengths[0]], lse[:, :, :, : lengths[0]]
    return out, (q, k, v, ids, out, lse)


def _attend_backward(
    tilings: tuple[Tiling, Tiling], saved: tuple, do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    t = tilings[1]
    q, k, v, ids, out, lse = saved
    n_q = t.n_q * t.q
    # Products of bfloat16 are exact in float32.
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    do, lse, delta = (pad(x, 3, n_q) for x in (do, lse, delta))
    lengths = q.shape[3], k.shape[2]
    dq, dk, dv = backward(t, *_padded(t, q, k, v, ids), do, lse, delta, lengths)
    dq = (dq[:, :, :, : q.shape[3]] * t.scale).astype(q.dtype)
    dk = (dk[:, :, : k.shape[2]] * t.scale).astype(k.dtype)
    return dq, dk, dv[:, :, : v.shape[2]].astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
