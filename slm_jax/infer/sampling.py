"""From logits to tokens: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k likeliest tokens; `None` keeps all."""
    top_p: float | None = None
    """Keeps the fewest tokens that together have at least this probability (arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is negative: choose 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1, or None to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p={self.top_p} is not in (0, 1]: choose a probability, or None to keep all"
            )


def candidates(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """What may be drawn, and how likely it is.

    Args:
        logits: `[B, V]` float32.
        sampling: the filters; `temperature` must be positive.

    Returns:
        Scores `[B, C]`, whose softmax is the distribution to draw from (-inf: filtered out), and
        the tokens they belong to, `[B, C]` int32. C is V, or `top_k` if that is less.
    """
    scores = logits / sampling.temperature
    vocab = scores.shape[-1]
    k = min(sampling.top_k or vocab, vocab)
    if k == vocab and sampling.top_p is None:
        return scores, jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scores.shape)
    scores, tokens = jax.lax.top_k(scores, k)  # likeliest first
    if sampling.top_p is not None:
        probs = jax.nn.softmax(scores, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    return scores, tokens


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array, step: jax.Array) -> jax.Array:
    """Draws one token a row.

    Row b uses `key` folded with `step` and b, so what it draws does not depend on the other rows.

    Args:
        logits: `[B, V]` float32.
        sampling: how to draw.
        key: PRNG key of the whole generation.
        step: `[]` int32, tokens drawn so far.

    Returns:
        `[B]` int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores, tokens = candidates(logits, sampling)
    step_key = jax.random.fold_in(key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(logits.shape[0]))
    choice = jax.vmap(jax.random.categorical)(keys, scores)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
