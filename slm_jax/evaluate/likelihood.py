"""Log-likelihoods of token sequences, batched by length."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.models.loss import cross_entropy

# Tokens whose logits exist at one time, in each row.
_CHUNK = 32


class Span(NamedTuple):
    """Tokens, the last of which are scored.

    Attributes:
        tokens: `[n]` integers.
        first: index of the first one that is scored, at least 1.
    """

    tokens: np.ndarray
    first: int


class Likelihood(NamedTuple):
    """Score of a span.

    Attributes:
        nats: sum of -log p over the scored tokens.
        greedy: whether each of them was the likeliest.
        tokens: how many.
    """

    nats: float
    greedy: bool
    tokens: int


def likelihoods(model: LM, spans: Iterable[Span], *, batch_tokens: int = 4096) -> list[Likelihood]:
    """Scores every span, a document of its own each.

    Args:
        model: the language model.
        spans: in any order and of any lengths.
        batch_tokens: most tokens at a time, padding included; one row at least.

    Returns:
        One score a span, in their order.

    Raises:
        UserError: if a span has no token before the first that is scored, or an id that the model
            does not have.
    """
    spans = list(spans)
    for span in spans:
        _check(span, model.config.vocab_size)
    by_length: dict[int, list[int]] = {}
    for i, span in enumerate(spans):
        by_length.setdefault(_rounded(len(span.tokens) - 1), []).append(i)
    out: dict[int, Likelihood] = {}
    for length in sorted(by_length, reverse=True):
        of_length = by_length[length]
        rows = min(max(1, batch_tokens // length), len(of_length))
        for at in range(0, len(of_length), rows):
            chosen = of_length[at : at + rows]
            out.update(
                zip(chosen, _scored(model, [spans[i] for i in chosen], rows, length), strict=True)
            )
    return [out[i] for i in range(len(spans))]


def _check(span: Span, vocab: int) -> None:
    if not 1 <= span.first < len(span.tokens):
        raise UserError(
            f"first={span.first} of {len(span.tokens)} tokens: something must stand before what is "
            "scored, and something be scored"
        )
    if span.tokens.min() < 0 or span.tokens.max() >= vocab:
        raise UserError(
            f"token id {span.tokens.max()} is outside vocab_size={vocab}: "
            "was the text encoded with this model's tokenizer?"
        )


def _rounded(n: int) -> int:
    """Few lengths, so that few programs are compiled."""
    step = _CHUNK if n <= 128 else 128
    return -(-n // step) * step


def _scored(model: LM, spans: list[Span], rows: int, length: int) -> list[Likelihood]:
    tokens, targets, segments = np.zeros((3, rows, length), np.int32)
    for i, span in enumerate(spans):
        n = len(span.tokens) - 1
        tokens[i, :n], targets[i, :n], segments[i, :n] = span.tokens[:-1], span.tokens[1:], 1
    nats, hits = jax.device_get(_score(model, tokens, targets, segments))
    parts = [slice(span.first - 1, len(span.tokens) - 1) for span in spans]
    return [
        Likelihood(
            float(np.sum(nats[i, part], dtype=np.float64)),
            bool(hits[i, part].all()),
            part.stop - part.start,
        )
        for i, part in enumerate(parts)
    ]


@jax.jit
def _score(
    model: LM, tokens: jax.Array, targets: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p of every target `[B, S]`, and whether it is the likeliest; S is cut into chunks."""
    x, _, _ = model.hidden(tokens, segments=segments)

    def chunks(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(a.shape[0], -1, _CHUNK, *a.shape[2:]), 1, 0)

    def one(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = xs
        logits = model.logits(x)
        return cross_entropy(logits, targets), jnp.argmax(logits, -1) == targets

    out = jax.lax.map(one, (chunks(x), chunks(targets)))
    nats, hits = (jnp.moveaxis(a, 0, 1).reshape(tokens.shape) for a in out)
    return nats, hits
