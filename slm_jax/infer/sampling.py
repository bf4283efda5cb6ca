"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the penalty first, then temperature and filters in this order.

    Each means what it means in `transformers`.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k likeliest tokens; `None` keeps all."""
    top_p: float | None = None
    """Keeps the fewest tokens that together have at least this probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Keeps tokens at least this times as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the row has, prompt included, and multiplies negative
    ones (arXiv 1909.05858); 1 is off."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} is negative: choose 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1, or None to keep all tokens")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"{name}={value} is not in (0, 1]: choose a probability, or None to keep all"
                )
        if not self.repetition_penalty > 0:
            raise UserError(
                f"repetition_penalty={self.repetition_penalty} must be above 0: 1 is no penalty"
            )

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens a row has."""
        return self.repetition_penalty != 1.0


def penalised(logits: jax.Array, seen: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Logits with the repetition penalty.

    Args:
        logits: `[..., V]` float32.
        seen: `[..., V]` bool, the tokens that the row has; may be `None` without a penalty.
        sampling: the penalty.
    """
    if not sampling.penalises:
        return logits
    assert seen is not None
    penalty = sampling.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """What may be drawn, and how likely it is.

    Args:
        logits: `[..., V]` float32, penalised.
        sampling: the filters; `temperature` must be positive.

    Returns:
        Scores `[..., C]`, whose softmax is the distribution to draw from (-inf: filtered out), and
        the tokens they belong to, `[..., C]` int32. C is V, or `top_k` if that is less.
    """
    scores = logits / sampling.temperature
    vocab = scores.shape[-1]
    k = min(sampling.top_k or vocab, vocab)
    if k == vocab and sampling.top_p is None:
        tokens = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scores.shape)
    else:
        scores, tokens = jax.lax.top_k(scores, k)  # likeliest first
    if sampling.top_p is not None:
        probs = jax.nn.softmax(scores, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        scores = jnp.where(before < sampling.top_p, scores, -jnp.inf)
    if sampling.min_p is not None:
        least = jnp.max(scores, axis=-1, keepdims=True) + np.log(sampling.min_p)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return scores, tokens


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `sample` draws from: `[..., V]`, penalised logits to float32."""
    vocab = logits.shape[-1]
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocab)
    scores, tokens = candidates(logits, sampling)
    probs = jax.nn.softmax(scores, axis=-1)
    if sampling.top_k is None and sampling.top_p is None:
        return probs
    return jnp.put_along_axis(jnp.zeros_like(logits), tokens, probs, axis=-1, inplace=False)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array, drawn: jax.Array) -> jax.Array:
    """Draws one token a row.

    Row b uses `keys[b]` folded with `drawn[b]`: what it draws does not depend on the other rows.

    Args:
        logits: `[B, V]` float32, penalised.
        sampling: how to draw.
        keys: `[B]` PRNG keys, one a row for all of its tokens.
        drawn: `[B]` int32, tokens that the row has drawn so far.

    Returns:
        `[B]` int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores, tokens = candidates(logits, sampling)
    choice = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(keys, drawn), scores)
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
