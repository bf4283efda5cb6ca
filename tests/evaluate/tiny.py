"""A tiny model of bytes, and what a plain forward pass in float64 says of it."""

import functools

import numpy as np

from slm_jax.data import ByteTokenizer
from slm_jax.evaluate import Subject
from tests.export.cases import CASES, filled, logits

EOS, LENGTH = 256, 192


@functools.cache
def subject() -> Subject:
    return Subject(filled(CASES["dense"], seed=3), ByteTokenizer())


def table(tokens: list[int]) -> np.ndarray:
    """log p of every token of the vocabulary after every one of `tokens`: `[n, vocab]`."""
    padded = np.zeros(LENGTH, np.int32)  # one program for all lengths; no token sees a later one
    padded[: len(tokens)] = tokens
    scores = logits(subject().model, padded)[: len(tokens)].astype(np.float64)
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def log_p(tokens: list[int]) -> np.ndarray:
    """log p of every token but the first, given those before it: `[n - 1]`."""
    return table(tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def of_pair(context: list[int], continuation: list[int]) -> float:
    """log p of a continuation."""
    return float(log_p(context + continuation)[len(context) - 1 :].sum())
