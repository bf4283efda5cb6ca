"""Flash attention on Hopper GPUs (H100, H200): wgmma, TMA and specialised warpgroups.

Forward (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Shah et al. 2024, arXiv:2407.08608), for a
tile of keys after another, with the running maximum m, sum l and output o of a query:

    s  = scale log2(e) q . k                         hidden scores are -infinity                (1)
    m' = max(m, max_t s_t),   p_t = 2^(s_t - m')                                                (2)
    l' = 2^(m - m') l + sum_t p_t                                                               (3)
    o' = 2^(m - m') o + sum_t p_t v_t                at the end o / l and lse = m + log2(l)     (4)

Backward, with the output's gradient do and delta = sum_d do_d o_d:

    p  = 2^(s - lse)                                 hidden: 0                                  (5)
    dv = sum_s p do                                                                             (6)
    ds = p (do . v - delta)                          with a softcap, times 1 - tanh^2           (7)
    dk = scale sum_s ds q                                                                       (8)
    dq = scale sum_t ds k                                                                       (9)

Products are of the inputs' dtype with float32 sums; p and ds are rounded to it. Arrays stay as the
caller has them: TMA reads the rows of a head out of `[B, S, n_heads, head_dim]`.
"""

import functools

import jax
import jax.numpy as jnp

from slm_kernels.attention.gpu_backward import gradient_kv, gradient_q
from slm_kernels.attention.gpu_forward import forward
from slm_kernels.attention.gpu_tiles import BLOCK, Ids, Tiling
from slm_kernels.attention.tpu_tiles import varying
from slm_kernels.dispatch import on_hopper, platform

_HEAD_DIMS = (64, 128)
_DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> str | None:
    """Why the kernel cannot take these arguments, and what to do, or `None` if it can."""
    instead = "or use implementation='xla'"
    if not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: convert them to one dtype"
    if q.dtype not in _DTYPES:
        return f"dtype={q.dtype} is not for wgmma: convert to bfloat16, {instead}"
    if q.shape[3] not in _HEAD_DIMS:
        return f"head_dim={q.shape[3]} has no Hopper kernel: choose 64 or 128, {instead}"
    if not scale > 0:
        return f"scale={scale} is not positive: fold its sign into q, {instead}"
    return None


def attention_gpu(
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
    """Attention in O(S + T) memory; arguments and result as in `slm_kernels.attention.attention`.

    With `causal` and `in_order` positions are not read: within a segment they must differ as the
    indices do, and none may be negative.

    Args:
        q: `[B, S, n_heads, head_dim]`, bfloat16 or float16, head_dim 64 or 128.
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
        scale: multiplies the scores; positive.

    Raises:
        ValueError: on another GPU than Hopper, and on dtypes, a head_dim or a scale that the
            kernel does not take.
    """
    if platform() == "gpu" and not on_hopper():
        raise ValueError(
            "implementation='gpu' is for Hopper GPUs (H100, H200) and this is another: use "
            "implementation='cudnn' or 'xla'"
        )
    if reason := refusal(q, k, v, scale):
        raise ValueError(reason)
    batch, n_queries = q.shape[:2]
    n_q, n_kv = (-(-x.shape[1] // BLOCK) for x in (q, k))
    in_order = in_order and causal
    if in_order:
        q_positions = kv_positions = jnp.arange(n_q * BLOCK, dtype=jnp.int32)[None]
    t = Tiling(
        causal=causal,
        in_order=in_order,
        window=window,
        softcap=softcap,
        scale=float(scale),
        segmented=q_segments is not None,
        n_q=n_q,
        n_kv=n_kv,
    )

    def ids(positions: jax.Array, segments: jax.Array | None, blocks: int) -> Ids:
        """A padded key is at position -1, where nobody sees it; in order, after all queries."""
        given = {"positions": positions, "segments": segments}
        return {
            name: _pad(jnp.asarray(x, jnp.int32), blocks, -1).repeat(batch // x.shape[0], axis=0)
            for name, x in given.items()
            if x is not None
        }

    q, k, v = _pad(q, n_q), _pad(k, n_kv), _pad(v, n_kv)
    q_ids, kv_ids = ids(q_positions, q_segments, n_q), ids(kv_positions, kv_segments, n_kv)
    arrays, structure = jax.tree.flatten((q, k, v, q_ids, kv_ids))
    return _attend(t, *jax.tree.unflatten(structure, varying(*arrays)))[:, :n_queries]


def _pad(x: jax.Array, blocks: int, value: int = 0) -> jax.Array:
    """`[B, n, ...]` padded to whole blocks."""
    missing = blocks * BLOCK - x.shape[1]
    if not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    t: Tiling, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids
) -> jax.Array:
    """Attention on rows of whole blocks."""
    return _attend_forward(t, q, k, v, q_ids, kv_ids)[0]


def _attend_forward(
    t: Tiling, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids
) -> tuple[jax.Array, tuple]:
    # What a kernel writes does not say over which mesh axes it varies: as the queries do.
    out, lse, _ = varying(*forward(t, q, k, v, q_ids, kv_ids), q)
    return out, (q, k, v, q_ids, kv_ids, out, lse)


def _attend_backward(
    t: Tiling, saved: tuple, do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, q_ids, kv_ids, out, lse = saved
    # Products of bfloat16 are exact in float32.
    delta = jnp.einsum("bshd,bshd->bhs", do, out, preferred_element_type=jnp.float32)
    arrays = q, k, v, do, lse, delta, q_ids, kv_ids
    dq, dk, dv, _ = varying(gradient_q(t, *arrays), *gradient_kv(t, *arrays), q)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
