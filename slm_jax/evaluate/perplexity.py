"""Perplexity and bits a byte of texts, by a window that slides over them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slm_jax.errors import UserError
from slm_jax.evaluate.likelihood import Likelihood, Span, likelihoods
from slm_jax.evaluate.subject import Subject


@dataclass(frozen=True)
class TextScore:
    """What a model makes of texts.

    Attributes:
        nats: mean of -log p a token.
        perplexity: exp of it.
        bits_per_byte: bits a byte of UTF-8, comparable between tokenizers.
        tokens: that were scored.
        bytes: of the texts.
        window: most tokens that a prediction sees.
        stride: tokens that a window scores: each but the first has seen `window - stride` or more.
    """

    nats: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int
    stride: int


def perplexity(
    subject: Subject,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    score: Callable[[Sequence[Span]], list[Likelihood]] | None = None,
) -> TextScore:
    """Scores texts, each a document of its own.

    A text's first token is scored only where the model has a prefix to see before it; it is one
    token a text, whose bytes are counted all the same.

    Args:
        subject: the model.
        texts: in order.
        window: tokens that a prediction sees at most; default the model's `max_seq_len`.
        stride: how far the window moves; default `window`, which is cheapest. Less gives every
            token more of the text before it and costs window / stride times as much.
        max_tokens: ends after so many tokens (of the last text a part is scored then).
        score: what scores the windows; default the model, by `likelihoods`.

    Raises:
        UserError: on an empty text or numbers that make no sense.
    """
    window = subject.model.config.max_seq_len if window is None else window
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride}, window={window}: choose a stride from 1 to the window")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1")
    spans: list[Span] = []
    left, n_bytes = math.inf if max_tokens is None else max_tokens, 0
    for text in texts:
        ids = subject.tokenizer.encode(text)
        tokens = np.concatenate([subject.prefix, ids])
        if len(tokens) < 2:
            continue
        if len(tokens) - 1 > left:
            tokens = tokens[: int(left) + 1]
            text = subject.tokenizer.decode(tokens[len(subject.prefix) :])
        n_bytes += len(text.encode("utf-8"))
        spans.extend(windows(tokens, window, stride))
        left -= len(tokens) - 1
        if left <= 0:
            break
    if not spans:
        raise UserError("text: there is nothing to score: give at least two tokens")
    scores = likelihoods(subject.model, spans) if score is None else score(spans)
    nats, count = sum(s.nats for s in scores), sum(s.tokens for s in scores)
    return TextScore(
        nats / count,
        math.exp(min(nats / count, 700.0)),
        nats / n_bytes / math.log(2),
        count,
        n_bytes,
        window,
        stride,
    )


def windows(tokens: np.ndarray, window: int, stride: int) -> Iterator[Span]:
    """Spans that score every token of `[n]` but the first, once each.

    The first scores up to `window` tokens, every later one the next `stride`, seeing as much before
    them as a window holds.
    """
    end = min(window, len(tokens) - 1)
    yield Span(tokens[: end + 1], 1)
    while end < len(tokens) - 1:
        before, end = end, min(end + stride, len(tokens) - 1)
        start = max(0, end - window)
        yield Span(tokens[start : end + 1], before + 1 - start)
