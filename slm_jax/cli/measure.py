"""Loss of a model on a text, for the commands that change how it is stored."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from slm_jax.data.sources import open_source
from slm_jax.errors import UserError
from slm_jax.evaluate import Likelihood, Span, Subject, TextScore, perplexity
from slm_jax.export.stablehlo.run import Model
from slm_jax.models.loss import cross_entropy

_WINDOW = 512


def read_texts(source: str) -> list[str]:
    """The documents of a source, as `slm train --data.source` names it."""
    texts = [d.text for d in open_source(source, "text").documents() if d.text]
    if not texts:
        raise UserError(f"text={source!r} is empty: give a text")
    return texts


def score_text(subject: Subject, texts: list[str], max_tokens: int) -> TextScore:
    """Loss on the first `max_tokens` tokens, in windows of 512 or of the model's length."""
    window = min(subject.model.config.max_seq_len, _WINDOW)
    return perplexity(subject, texts, window=window, max_tokens=max_tokens)


def score_programs(folder: Path, subject: Subject, texts: list[str], max_tokens: int) -> TextScore:
    """The same by the programs that were exported into a folder, which decode token by token."""
    programs = Model(folder)
    window = min(subject.model.config.max_seq_len, _WINDOW)
    return perplexity(
        subject, texts, window=window, max_tokens=max_tokens, score=partial(_decoded, programs)
    )


def _decoded(programs: Model, spans: Sequence[Span]) -> list[Likelihood]:
    """Scores spans by the program `decode`, all rows at once; `Likelihood.greedy` too."""
    length = max(len(span.tokens) for span in spans)
    tokens = np.zeros((len(spans), length), np.int32)
    for row, span in zip(tokens, spans, strict=True):
        row[: len(span.tokens)] = span.tokens
    nats, hits = np.zeros((2, len(spans), length))
    state = programs.start(
        np.zeros((len(spans), max(length, programs.manifest["least_room"])), bool)
    )
    for t in range(length - 1):
        at = np.full((len(spans), 1), t, np.int32)
        logits, state = programs.decode(programs.weights, tokens[:, t : t + 1], at, state)
        nats[:, t + 1] = cross_entropy(logits, jnp.asarray(tokens[:, t + 1]))
        hits[:, t + 1] = np.asarray(logits).argmax(-1) == tokens[:, t + 1]
    parts = [slice(span.first, len(span.tokens)) for span in spans]
    return [
        Likelihood(float(nats[i, p].sum()), bool(hits[i, p].all()), p.stop - p.start)
        for i, p in enumerate(parts)
    ]


def loss_rows(before: TextScore, after: TextScore) -> dict[str, str]:
    """Rows of a report: what storing the model otherwise has cost."""
    change = 100 * (after.perplexity / before.perplexity - 1)
    return {
        "loss": f"{before.nats:.4f} -> {after.nats:.4f} nats a token on {after.tokens:,} tokens "
        f"(perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}, {change:+.2f} %)",
        "bits a byte": f"{before.bits_per_byte:.4f} -> {after.bits_per_byte:.4f}",
    }
