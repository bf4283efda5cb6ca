"""How one array of ours and one tensor of a Hugging Face file hold the same numbers.

Every layout only moves numbers, so it maps gradients as well as weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A pair of inverse functions.

    Attributes:
        to_hf: (array of ours, number of its input axes) to the tensor of the file. Also traceable,
            so that shapes can be had without arrays.
        from_hf: (tensor of the file, shape of ours) to the array of ours.
    """

    to_hf: Callable[[np.ndarray, int], np.ndarray]
    from_hf: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


MATRIX = Layout(
    lambda a, n_in: a.reshape(math.prod(a.shape[:n_in]), -1).T,
    lambda h, shape: h.T.reshape(shape),
)
"""`[*in, *out]` here, `[out, in]` there: torch's Linear."""

VECTOR = Layout(lambda a, n_in: a.reshape(-1), lambda h, shape: h.reshape(shape))
"""`[heads, head_dim]` or `[n]` here, `[n]` there: biases and norms."""

SAME = Layout(lambda a, n_in: a, lambda h, shape: h)
"""Embeddings, A_log, D."""

CONV = Layout(lambda a, n_in: a.T[:, None, :], lambda h, shape: h[:, 0, :].T)
"""`[taps, channels]` here, `[channels, 1, taps]` there: a depthwise Conv1d."""
