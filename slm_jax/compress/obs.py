"""The optimal brain surgeon for one matrix: what fixing a column costs, later columns take back.

GPTQ fixes columns at codes, SparseGPT at zeros; this is what both have in common (arXiv 2210.17323,
sections 3.2 and 3.3; arXiv 2301.00774, section 3).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError


def inverse_factor(gram: jax.Array, damping: float) -> jax.Array:
    """The upper triangular U with Uᵀ U = (damped `gram`)⁻¹.

    Row i of it is what an error of column i does to later columns once those before i are fixed.

    Args:
        gram: sum of x xᵀ over the calibration rows, `[K, K]` float32. An input that was always zero
            counts as one that is independent of the others.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        `[K, K]`; not finite if the damped `gram` is not positive definite.
    """
    k = len(gram)
    diagonal = jnp.diag(gram)
    gram = gram + jnp.diag(jnp.where(diagonal == 0, jnp.maximum(jnp.mean(diagonal), 1.0), 0.0))
    gram = gram + damping * jnp.mean(jnp.diag(gram)) * jnp.eye(k)
    lower = jnp.linalg.cholesky(gram)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(k))
    return jnp.linalg.cholesky(inverse, upper=True)


def sweep(
    w: jax.Array,
    upper: jax.Array,
    given: Any,
    fix: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    *,
    block: int,
    begin: Callable[[jax.Array, jax.Array, Any], Any] = lambda part, diagonal, given: given,
) -> Any:
    """Fixes the columns of a matrix from left to right.

    Args:
        w: `[N, K]` float32.
        upper: `[K, K]`, of `inverse_factor`.
        given: pytree of `[N, K]`: what is known of every weight before anything is fixed.
        fix: a column as it has become `[N]`, and its part of `begin`'s result `[N]`, to what it is
            to be `[N]` and what is wanted of it, a pytree of `[N]`.
        block: columns whose effect on all later ones is added up before it is applied; it changes
            no result but through `begin`.
        begin: before a block, its weights as they have become `[N, block]`, the diagonal of `upper`
            there `[block]`, and its part of `given`, to a pytree of `[N, block]`. Columns that fill
            up the last block are zeros, in `given` too.

    Returns:
        What `fix` said of each column, a pytree of `[N, K]`.
    """
    n, k = w.shape
    block = min(block, k)
    n_blocks = -(-k // block)
    missing = n_blocks * block - k

    def padded(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, 0), (0, missing)))

    w, given = padded(w), jax.tree.map(padded, given)
    # Columns that fill up the last block have an effect on none.
    upper = jnp.pad(upper, ((0, missing), (0, missing)))
    upper = upper + jnp.diag(jnp.where(jnp.arange(k + missing) < k, 0.0, 1.0))

    def one_block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        def columns(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, start, block, axis=1)

        part, rows = columns(w), jax.lax.dynamic_slice_in_dim(upper, start, block, axis=0)
        square = columns(rows)
        known = begin(part, jnp.diag(square), jax.tree.map(columns, given))

        def one_column(part: jax.Array, j: jax.Array) -> tuple[jax.Array, Any]:
            column = part[:, j]
            value, wanted = fix(column, jax.tree.map(lambda a: a[:, j], known))
            error = (column - value) / square[j, j]
            later = jnp.where(jnp.arange(block) > j, square[j], 0.0)
            return part - error[:, None] * later, (wanted, error)

        _, (wanted, errors) = jax.lax.scan(one_column, part, jnp.arange(block))
        later = jnp.where(jnp.arange(w.shape[1]) >= start + block, rows, 0.0)
        return w - errors.T @ later, wanted

    _, wanted = jax.lax.scan(one_block, w, jnp.arange(n_blocks) * block)
    return jax.tree.map(lambda a: a.reshape(-1, n)[:k].T, wanted)


def solved[T](
    path: str,
    w: jax.Array,
    gram: jax.Array,
    one: Callable[..., tuple[T, jax.Array]],
    *,
    damping: float,
) -> T:
    """Every matrix of one `Linear`, one an expert.

    Args:
        path: of the `Linear`, for the message.
        w: `[*batch, *out, K]`.
        gram: `[*batch, K, K]`.
        one: a matrix `[N, K]`, its `gram` and `damping=` to a pytree of `[N, ...]` and the diagonal
            of the factor.
        damping: see `inverse_factor`.

    Raises:
        UserError: if a `gram` cannot be inverted.
    """
    k, n_matrices = w.shape[-1], math.prod(gram.shape[:-2])
    pairs = zip(w.reshape(n_matrices, -1, k), gram.reshape(-1, k, k), strict=True)
    results, diagonals = zip(*(one(a, g, damping=damping) for a, g in pairs), strict=True)
    if not all(bool(jnp.isfinite(diagonal).all()) for diagonal in diagonals):
        raise UserError(
            f"damping={damping}: the second moments of the inputs of {path} cannot be inverted: "
            "raise it, or give more calibration data"
        )
    whole: T = jax.tree.map(lambda *a: jnp.stack(a).reshape(*w.shape[:-1], -1), *results)
    return whole
