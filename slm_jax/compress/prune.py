"""Weights that become zero: by magnitude, by Wanda, by SparseGPT.

The matrices stay as large as they were; `io.py` stores where the rest stands and what it is.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from slm_jax.compress.calibrate import Inputs, Stream, inputs_of, walk, with_layers
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.obs import inverse_factor, solved, sweep
from slm_jax.compress.quantise import KEEP, has_vocab, is_matrix, is_wanted, path_name
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.block import Block
from slm_jax.nn.linear import Linear
from slm_jax.nn.module import changed

Method = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Sparsity:
    """How many weights become zero, and how freely they are chosen."""

    share: float
    """Of the weights of a matrix, 0 to below 1."""
    pattern: tuple[int, int] | None = None
    """(n, m): exactly n of every m neighbouring inputs remain, which fixes the share."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"sparsity={self.share:g} must be at least 0 and below 1")

    @property
    def name(self) -> str:
        """What `parse_sparsity` reads."""
        return f"{self.share:g}" if self.pattern is None else "{}:{}".format(*self.pattern)


def parse_sparsity(name: str) -> Sparsity:
    """The sparsity called `0.5` or, for 2 of every 4 weights, `2:4`.

    Raises:
        UserError: if there is no such sparsity.
    """
    if match := re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", name):
        n, m = (int(part) for part in match.groups())
        if not 1 <= n < m:
            raise UserError(f"sparsity={name}: n of m remain, so n must be from 1 to m - 1")
        return Sparsity(1 - n / m, (n, m))
    try:
        return Sparsity(float(name))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"sparsity={name!r}: give a share as in 0.5, or n:m as in 2:4") from error


def lowest(scores: jax.Array, share: jax.Array | float) -> jax.Array:
    """Which entries of the last axis are the `share` with the lowest scores, rounded down.

    More, if scores are equal to the largest of these. Same shape, bool.
    """
    n = scores.shape[-1]
    # Of 0.3 x 10, float32 makes a little less than 3.
    count = jnp.floor(jnp.asarray(share, jnp.float32) * n + 1e-3).astype(jnp.int32)
    last = jnp.take(jnp.sort(scores, axis=-1), jnp.maximum(count - 1, 0), axis=-1)
    return (scores <= last[..., None]) & (count > 0)


def lowest_of_group(scores: jax.Array, pattern: tuple[int, int]) -> jax.Array:
    """Which entries are not the n highest of their group of m neighbours; of equals the first."""
    n, m = pattern
    s = scores.reshape(*scores.shape[:-1], -1, m)
    later = jnp.arange(m)[:, None] < jnp.arange(m)
    below = (s[..., None, :] < s[..., :, None]) | ((s[..., None, :] == s[..., :, None]) & later)
    return (jnp.sum(below, axis=-1) < m - n).reshape(scores.shape)


@partial(jax.jit, static_argnames="pattern")
def _zeroed(
    w: jax.Array, scores: jax.Array, share: jax.Array, pattern: tuple[int, int] | None
) -> jax.Array:
    drop = lowest(scores, share) if pattern is None else lowest_of_group(scores, pattern)
    return jnp.where(drop, 0.0, w)


def magnitude_weights(w: jax.Array, sparsity: Sparsity) -> jax.Array:
    """Without the smallest weights of the matrix `[N, K]` (arXiv 1506.02626, a layer at a time)."""
    if sparsity.pattern is not None:
        return _zeroed(w, jnp.abs(w), sparsity.share, sparsity.pattern)
    return _zeroed(w.reshape(-1), jnp.abs(w).reshape(-1), sparsity.share, None).reshape(w.shape)


def wanda_weights(w: jax.Array, squares: jax.Array, sparsity: Sparsity) -> jax.Array:
    """Without the weights of the smallest |w| |x| of each output (arXiv 2306.11695, equation 1).

    Args:
        w: `[N, K]`.
        squares: sum of the squares of each input, `[K]`; where all are zero (an expert that no
            token came to) magnitudes decide.
        sparsity: of every row.
    """
    norms = jnp.where(jnp.any(squares > 0), jnp.sqrt(squares), 1.0)
    return _zeroed(w, jnp.abs(w) * norms, sparsity.share, sparsity.pattern)


@partial(jax.jit, static_argnames=("pattern", "block"))
def sparsegpt_weights(
    w: jax.Array,
    gram: jax.Array,
    share: jax.Array | float,
    pattern: tuple[int, int] | None = None,
    *,
    damping: float,
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Zeros chosen block by block, and the other weights changed to make up for them.

    arXiv 2301.00774, algorithm 1: of each block of columns the weights of the smallest w^2 / d^2
    become zero, d being the diagonal of the factor, chosen after the blocks before are done. With
    a pattern a block is one of its groups.

    Args:
        w: `[N, K]` float32.
        gram: see `inverse_factor`.
        share: of the weights of each block.
        pattern: see `Sparsity`.
        damping: see `inverse_factor`.
        block: columns of a block, the paper's B_s; its lazy updates are as wide here.

    Returns:
        The weights, and the diagonal of the factor as `gptq_codes` gives it.
    """
    upper = inverse_factor(gram, damping)

    def begin(part: jax.Array, diagonal: jax.Array, real: jax.Array) -> jax.Array:
        scores = jnp.square(part / diagonal)
        if pattern is not None:
            return ~lowest_of_group(scores, pattern)
        scores = jnp.where(real, scores, jnp.inf).reshape(-1)
        in_block = share * jnp.sum(real) / real.size
        return ~lowest(scores, in_block).reshape(part.shape)

    def fix(column: jax.Array, stays: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = jnp.where(stays, column, 0.0)
        return value, value

    size = block if pattern is None else pattern[1]
    real = jnp.ones(w.shape, bool)
    return sweep(w, upper, real, fix, block=size, begin=begin), jnp.diag(upper)


def prune(
    model: LM,
    batches: Iterable[Mapping[str, Any]],
    sparsity: Sparsity,
    *,
    method: Method,
    keep: tuple[str, ...] = KEEP,
    damping: float = 0.01,
) -> LM:
    """Sets weights of the layers of a language model to zero; embedding and head stay.

    With wanda and sparsegpt layer by layer, each on what the pruned ones before it give.

    Args:
        model: of float weights.
        batches: calibration data, see `calibrate.walk`; magnitude reads none.
        sparsity: of every matrix.
        method: how the weights are chosen.
        keep: names of modules that stay as they are.
        damping: see `inverse_factor`.

    Raises:
        UserError: as `walk`; if a pattern does not divide the inputs of a matrix; if a matrix of
            second moments cannot be inverted.
    """

    def one(path: str, linear: Linear, found: Inputs | None) -> Linear:
        w, pattern = matrix_of(linear), sparsity.pattern
        k = w.shape[-1]
        if pattern is not None and k % pattern[1]:
            raise UserError(
                f"sparsity={sparsity.name}: the {k} inputs of {path} are not a multiple of "
                f"{pattern[1]}: choose another pattern or a share"
            )
        if found is not None and method == "sparsegpt":
            step = partial(sparsegpt_weights, share=sparsity.share, pattern=pattern)
            return with_matrix(linear, solved(path, w, found.gram, step, damping=damping))
        n_matrices = math.prod(w.shape[: w.ndim - 1 - len(linear.out_axes)])
        flat = w.reshape(n_matrices, -1, k)
        if found is None:
            parts = [magnitude_weights(a, sparsity) for a in flat]
        else:
            squares = found.squares.reshape(n_matrices, k)
            parts = [wanda_weights(a, s, sparsity) for a, s in zip(flat, squares, strict=True)]
        return with_matrix(linear, jnp.stack(parts).reshape(w.shape))

    def pruned(module: Any, found: Mapping[str, Inputs] | None) -> Any:
        def replaced(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            if not isinstance(leaf, Linear) or not is_wanted(name, keep) or has_vocab(leaf):
                return leaf
            return one(name, leaf, None if found is None else found[name])

        return jax.tree_util.tree_map_with_path(replaced, module, is_leaf=is_matrix)

    if method == "magnitude":
        whole: LM = pruned(model, None)
        return whole
    dtype = jnp.dtype(model.config.dtype)

    def visit(_: int, block: Block, streams: list[Stream]) -> tuple[Block, Block]:
        new = pruned(block, inputs_of(block, streams, dtype, gram=method == "sparsegpt"))
        return new, new

    return with_layers(model, list(walk(model, batches, visit)))


def with_matrix(linear: Linear, w: jax.Array) -> Linear:
    """The `Linear` with another weight, given as `matrix_of` gives it."""
    n_in, n_out = len(linear.in_axes), len(linear.out_axes)
    shape = linear.w.shape
    first = len(shape) - n_in - n_out
    w = w.reshape(*w.shape[:-1], *shape[first : first + n_in])
    last = tuple(range(w.ndim - n_in, w.ndim))
    out: Linear = changed(
        linear, w=linear.w.replace(jnp.moveaxis(w, last, tuple(range(first, first + n_in))))
    )
    return out
