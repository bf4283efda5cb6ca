"""Random numbers that are a pure function of where they are used: SplitMix64 as a counter hash.

A puzzle's variant must not depend on which process draws it, nor on the rows beside it, and NumPy's
generators are too slow to be started once a row. So word j of row r of step s is a hash of
(seed, s, r, j), for all rows at once. It needs no state and no NumPy version promises its stream.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Steele, Lea, Flood 2014, SplitMix)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def mix(words: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 whose output bits look independent."""
    x = np.atleast_1d(np.asarray(words, np.uint64))
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def words(seed: int, *counters: np.ndarray | int, n_words: int) -> np.ndarray:
    """Random words of every row.

    Args:
      seed: any integer.
      counters: integers or int64 [B] arrays, e.g. step and row; each changes every word.
      n_words: how many words a row.

    Returns:
      uint64 [B, n_words] (B = 1 when no counter is an array); word j does not depend on n_words.
    """
    key = mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    for counter in counters:
        key = mix(key + _GAMMA + np.asarray(counter).astype(np.uint64))
    steps = np.arange(1, n_words + 1, dtype=np.uint64) * _GAMMA
    return mix(key[:, None] + steps)


def below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Uniform integers int64 in [0, n) from uint64 words, n < 2^31 (bias below n / 2^32)."""
    wide = (words >> np.uint64(32)) * np.asarray(n).astype(np.uint64)
    return (wide >> np.uint64(32)).astype(np.int64)


def permutations(words: np.ndarray) -> np.ndarray:
    """Uniform permutations int64 [..., n] of [0, n) from uint64 words [..., n]."""
    return np.argsort(words, axis=-1, kind="stable")
