"""The specification: one head at a time over the whole cache, in float32."""

import jax
import jax.numpy as jnp


def decode_attention_reference(
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
    """Plain attention; `seen` decides, and with it `start`, `end` and `holes` are known already.

    Args:
        q: `[B, H, D]`.
        k: `[B, S, K, D]`.
        v: `[B, S, K, D]`.
        seen: `[B, S]` bool, slots that the query of a row sees.
        start: `[B]` int32, no slot before it is seen.
        end: `[B]` int32, no slot from it on is seen.
        k_scale: `[B, S, K]` or `None`.
        v_scale: `[B, S, K]` or `None`.
        fixed: `start` and `end` if they are known before and those of every row.
        holes: whether a slot from `start` to `end` may be unseen.
        softcap: bound of the scores, or `None`.
        scale: multiplies the scores.

    Returns:
        `[B, H, D]` in the dtype of `q` and the log-sum-exp `[B, H]` float32.
    """
    del start, end, fixed, holes
    f32 = jnp.float32
    group = q.shape[1] // k.shape[2]
    heads, sums = [], []
    for h in range(q.shape[1]):
        of = h // group
        qh, kh, vh = (a.astype(f32) for a in (q[:, h], k[:, :, of], v[:, :, of]))
        if k_scale is not None:
            kh = kh * k_scale[:, :, of, None].astype(f32)
        if v_scale is not None:
            vh = vh * v_scale[:, :, of, None].astype(f32)
        # What an unseen slot holds does not matter, be it NaN.
        kh, vh = (jnp.where(seen[:, :, None], a, 0) for a in (kh, vh))
        scores = jnp.einsum("bd,bsd->bs", qh, kh, precision="highest") * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.max(scores, axis=1, keepdims=True)
        p = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
        total = jnp.sum(p, axis=1, keepdims=True)
        p = p / jnp.where(total == 0, 1.0, total)
        heads.append(jnp.einsum("bs,bsd->bd", p, vh, precision="highest"))
        sums.append((jnp.where(total == 0, 0.0, top) + jnp.log(total))[:, 0])
    return jnp.stack(heads, axis=1).astype(q.dtype), jnp.stack(sums, axis=1)
