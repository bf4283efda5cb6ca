"""Stablemax cross-entropy (arXiv 2501.04697, equation 5): softmax with a tail that is not exp."""

import jax
import jax.numpy as jnp


def log_stablemax_scores(logits: jax.Array) -> jax.Array:
    """Log of s(v) = v + 1 for v >= 0, 1 / (1 - v) below: `[...]` to the same shape and dtype.

    Both branches are log1p of |v|. Each reads 0 where the other holds: a gradient through the
    branch not taken, infinite at v = 1 in the plain form, would otherwise become 0 x inf = NaN.
    """
    above = jnp.log1p(jnp.where(logits >= 0, logits, 0.0))
    below = -jnp.log1p(jnp.where(logits < 0, -logits, 0.0))
    return above + below


def stablemax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log(s(v_label) / sum of s) in nats: `[..., V]` float32, `[...]` int32 to `[...]` float32.

    In logarithms throughout, so that float32 does: the reference needs float64.
    """
    scores = log_stablemax_scores(logits)
    # A masked sum instead of a gather: gathers of split arrays need their result's place.
    hit = labels[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(scores, axis=-1) - jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
