"""Text made worse by a known amount, to see what a law says of it."""

import dataclasses
import hashlib

import numpy as np

from slm_jax.data.cache import Stream
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError


def corrupt(corpus: Corpus, probability: float, *, seed: int = 0) -> Corpus:
    """Replaces training tokens by random ones; the held-out text stays as it is.

    Each token is replaced with this probability by a draw from the stream's own token frequencies
    (which may give the same token). Ends of text stay. The best a model can do on clean text then
    rises by about -log(1 - probability) nats a token: it learns to expect noise.

    Args:
        corpus: what to make worse.
        probability: in [0, 1]; 0 gives `corpus` itself.
        seed: of the noise.

    Raises:
        UserError: if `probability` is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise UserError(f"probability={probability} must be in [0, 1]")
    if probability == 0:
        return corpus
    train = tuple(_noisy(stream, probability, seed) for stream in corpus.train)
    return dataclasses.replace(
        corpus, name=f"{corpus.name}, {100 * probability:g} % noise", train=train
    )


def _noisy(stream: Stream, probability: float, seed: int) -> Stream:
    rng = np.random.default_rng([seed, int.from_bytes(bytes.fromhex(stream.fingerprint)[:8])])
    tokens = np.array(stream.tokens)
    inner = np.ones(len(tokens), bool)
    inner[np.append(stream.starts[1:], len(tokens)) - 1] = False  # ends of text
    hit = np.flatnonzero(inner & (rng.random(len(tokens)) < probability))
    tokens[hit] = rng.choice(stream.tokens[inner], len(hit))
    content = hashlib.sha256(tokens.tobytes() + stream.starts.tobytes()).hexdigest()
    return dataclasses.replace(
        stream,
        name=f"{stream.name}, {100 * probability:g} % noise",
        tokens=tokens,
        fingerprint=content,
    )
