"""A byte-bigram model: the loss that a language model has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slm_jax.data.cache import Stream
from slm_jax.data.corpus import Corpus
from slm_jax.data.tokenizer import ByteTokenizer, Tokenizer

_SYMBOLS = 257  # bytes and the end of text
_END = 256
_CHUNK = 1 << 24  # tokens counted at a time


def bigram_loss(corpus: Corpus, k: float = 0.1) -> float:
    """Loss of a smoothed byte-bigram model on the held-out text, in nats a byte.

    p(b | a) = (count(a, b) + k) / (count(a) + 257 k) with counts of all training text, source
    shares aside. As everywhere here the first byte of a document is not predicted and its end is,
    so a document of n bytes has n predictions, and the figure compares with mean loss a target /
    `Corpus.bytes_per_token`. A tokenizer other than bytes has to be lossless.

    Args:
      corpus: of any tokenizer; text is decoded from its tokens.
      k: what to add to every count.
    """
    train = sum(_counts(stream, corpus.tokenizer) for stream in corpus.train)
    valid = sum(_counts(stream, corpus.tokenizer) for stream in corpus.valid)
    smoothed = np.asarray(train, np.float64) + k
    log_p = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
    return float(-(valid * log_p).sum() / sum(stream.text_bytes for stream in corpus.valid))


def _counts(stream: Stream, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [257, 257]: how often the second symbol follows the first inside a document."""
    total = np.zeros(_SYMBOLS**2, np.int64)
    for symbols in _byte_chunks(stream, tokenizer):
        pairs = symbols[:-1].astype(np.int64) * _SYMBOLS + symbols[1:]
        inside = symbols[:-1] != _END  # what follows an end of text is another document
        total += np.bincount(pairs[inside], minlength=_SYMBOLS**2)
    return total.reshape(_SYMBOLS, _SYMBOLS)


def _byte_chunks(stream: Stream, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The stream as bytes and ends of text in chunks; every pair is in one of them."""
    if isinstance(tokenizer, ByteTokenizer):
        for i in range(0, len(stream.tokens) - 1, _CHUNK):  # neighbours share a symbol
            yield stream.tokens[i : i + _CHUNK + 1]
        return
    encode = ByteTokenizer().encode
    parts: list[np.ndarray] = []
    for i, start in enumerate(stream.starts):
        end = stream.starts[i + 1] if i + 1 < len(stream.starts) else len(stream.tokens)
        parts.append(np.append(encode(tokenizer.decode(stream.tokens[start : end - 1])), _END))
        if sum(map(len, parts)) >= _CHUNK or len(parts) == 1000 or end == len(stream.tokens):
            yield np.concatenate(parts)
            parts = []
