"""GPTQ (arXiv 2210.17323): codes that keep a layer's outputs, not its weights, nearly as they were.

Weights are rounded one input at a time; what each rounding does to the outputs on the calibration
data is taken back as far as possible by the inputs not rounded yet (section 3.3, algorithm 1).
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.compress.calibrate import Stream, inputs_of, matrices, walk
from slm_jax.compress.codes import Coded, find_scales, group_size, nearest, pack, values_of
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.quantise import KEEP, is_wanted, quantise
from slm_jax.compress.spec import QuantSpec
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.block import Block


@partial(jax.jit, static_argnames=("spec", "act_order", "block"))
def gptq_codes(
    w: jax.Array,
    gram: jax.Array,
    spec: QuantSpec,
    *,
    damping: float,
    act_order: bool,
    block: int = 128,
) -> tuple[Coded, jax.Array]:
    """Codes for one matrix.

    Args:
        w: `[N, K]` float32.
        gram: sum of x xᵀ over the calibration rows, `[K, K]` float32. An input that was always zero
            is rounded to nearest.
        spec: the format. Scales are those of round-to-nearest, found before anything is rounded, so
            that a group keeps its scale in whatever order its inputs come.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: round the inputs of the largest second moment first (the authors' `act_order`).
        block: columns whose effect on all later ones is added up before it is applied; any number
            gives the same codes (section 3.3, step 2).

    Returns:
        The codes, and the diagonal of the inverse's factor `[K]`: not finite, and the codes of no
        use, if the damped `gram` is not positive definite.
    """
    n, k = w.shape
    block = min(block, k)
    n_blocks = -(-k // block)
    missing = n_blocks * block - k
    scales = find_scales(w, spec)
    each = jnp.repeat(scales.astype(jnp.float32), group_size(k, spec), axis=1)[:, :k]

    diagonal = jnp.diag(gram)
    gram = gram + jnp.diag(jnp.where(diagonal == 0, jnp.maximum(jnp.mean(diagonal), 1.0), 0.0))
    gram = gram + damping * jnp.mean(jnp.diag(gram)) * jnp.eye(k)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(k)
    gram = gram[order][:, order]
    # The upper factor of the inverse; its row i is what column i's error does to later columns.
    lower = jnp.linalg.cholesky(gram)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(k))
    upper = jnp.linalg.cholesky(inverse, upper=True)

    # Columns that fill up the last block are zeros with an effect on none.
    w = jnp.pad(w[:, order], ((0, 0), (0, missing)))
    each = jnp.pad(each[:, order], ((0, 0), (0, missing)))
    upper = jnp.pad(upper, ((0, missing), (0, missing)))
    upper = upper + jnp.diag(jnp.where(jnp.arange(k + missing) < k, 0.0, 1.0))

    def one_block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = jax.lax.dynamic_slice_in_dim(w, start, block, axis=1)
        part_scales = jax.lax.dynamic_slice_in_dim(each, start, block, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=0)
        square = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)

        def one_column(part: jax.Array, j: jax.Array) -> tuple[jax.Array, Any]:
            column, s = part[:, j], part_scales[:, j]
            codes = nearest(column, s, spec)
            error = (column - values_of(codes, spec) * s) / square[j, j]
            later = jnp.where(jnp.arange(block) > j, square[j], 0.0)
            return part - error[:, None] * later, (codes, error)

        _, (codes, errors) = jax.lax.scan(one_column, part, jnp.arange(block))
        later = jnp.where(jnp.arange(w.shape[1]) >= start + block, rows, 0.0)
        return w - errors.T @ later, codes

    _, codes = jax.lax.scan(one_block, w, jnp.arange(n_blocks) * block)
    codes = codes.reshape(-1, n)[:k].T[:, jnp.argsort(order)]
    return Coded(pack(codes, spec), scales), jnp.diag(upper)[:k]


def quantise_gptq(
    model: LM,
    batches: Iterable[Mapping[str, Any]],
    spec: QuantSpec,
    *,
    vocab: QuantSpec | None = None,
    keep: tuple[str, ...] = KEEP,
    damping: float = 0.01,
    act_order: bool = True,
) -> LM:
    """Quantises a language model layer by layer, each on what the rounded ones before it give.

    Embedding and head are rounded to nearest.

    Args:
        model: of float weights.
        batches: calibration data, see `calibrate.walk`.
        spec: format of the layers.
        vocab: see `quantise`.
        keep: see `quantise`.
        damping: see `gptq_codes`.
        act_order: see `gptq_codes`.

    Raises:
        UserError: as `walk`; or if a matrix of second moments cannot be inverted.
    """
    dtype = jnp.dtype(model.config.dtype)
    one_matrix = partial(gptq_codes, spec=spec, damping=damping, act_order=act_order)

    def solve(path: str, w: jax.Array, gram: jax.Array) -> Coded:
        k, n_matrices = w.shape[-1], math.prod(gram.shape[:-2])  # one an expert
        pairs = zip(w.reshape(n_matrices, -1, k), gram.reshape(-1, k, k), strict=True)
        parts = [one_matrix(a, g) for a, g in pairs]
        if not all(bool(jnp.isfinite(healthy).all()) for _, healthy in parts):
            raise UserError(
                f"damping={damping}: the second moments of the inputs of {path} cannot be "
                "inverted: raise it, or give more calibration data"
            )
        shape = w.shape[:-1]
        stored = zip(*(coded for coded, _ in parts), strict=True)
        return Coded(*(jnp.stack(a).reshape(*shape, -1) for a in stored))

    def visit(_: int, block: Block, streams: list[Stream]) -> tuple[Block, dict[str, Coded]]:
        found = inputs_of(block, streams, dtype, gram=True)
        coded = {
            path: solve(path, matrix_of(linear), found[path].gram)
            for path, linear in matrices(block).items()
            if is_wanted(path, keep)
        }
        return quantise(block, spec, keep=keep, coded=coded), coded

    layers = list(walk(model, batches, visit))
    period = len(model.config.pattern)
    stacked = model.config.n_layers // period * period
    coded: dict[str, Coded] = {}
    for p in range(period if stacked else 0):
        same = layers[p:stacked:period]
        for path in same[0]:
            parts = [one[path] for one in same]
            coded[f"blocks.{p}.{path}"] = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    for t, one in enumerate(layers[stacked:]):
        coded |= {f"tail.{t}.{path}": value for path, value in one.items()}
    return quantise(model, spec, vocab=vocab, keep=keep, coded=coded)
