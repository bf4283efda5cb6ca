"""GPTQ (arXiv 2210.17323): codes that keep a layer's outputs, not its weights, nearly as they were.

Weights are rounded one input at a time; what each rounding does to the outputs on the calibration
data is taken back as far as possible by the inputs not rounded yet (section 3.3, algorithm 1).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.compress.calibrate import Stream, inputs_of, matrices, walk
from slm_jax.compress.codes import (
    Coded,
    find_scales,
    group_size,
    nearest,
    pack,
    values_of,
    zero_code,
)
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.obs import inverse_factor, solved, sweep
from slm_jax.compress.quantise import KEEP, is_wanted, quantise
from slm_jax.compress.spec import QuantSpec
from slm_jax.models.lm import LM
from slm_jax.nn.block import Block


@partial(jax.jit, static_argnames=("spec", "act_order", "block", "keep_zeros"))
def gptq_codes(
    w: jax.Array,
    gram: jax.Array,
    spec: QuantSpec,
    *,
    damping: float,
    act_order: bool,
    block: int = 128,
    keep_zeros: bool = False,
) -> tuple[Coded, jax.Array]:
    """Codes for one matrix.

    Args:
        w: `[N, K]` float32.
        gram: see `inverse_factor`. An input that was always zero is rounded to nearest.
        spec: the format. Scales are those of round-to-nearest, found before anything is rounded, so
            that a group keeps its scale in whatever order its inputs come.
        damping: see `inverse_factor`.
        act_order: round the inputs of the largest second moment first (the authors' `act_order`).
        block: see `sweep`; any number gives the same codes (section 3.3, step 2).
        keep_zeros: weights of exactly zero stay zero: they were pruned.

    Returns:
        The codes, and the diagonal of the inverse's factor `[K]`: not finite, and the codes of no
        use, if the damped `gram` is not positive definite.
    """
    k = w.shape[1]
    scales = find_scales(w, spec)
    each = jnp.repeat(scales.astype(jnp.float32), group_size(k, spec), axis=1)[:, :k]
    order = jnp.argsort(-jnp.diag(gram)) if act_order else jnp.arange(k)
    upper = inverse_factor(gram[order][:, order], damping)

    def fix(column: jax.Array, known: Any) -> tuple[jax.Array, jax.Array]:
        s, free = known
        codes = jnp.where(free, nearest(column, s, spec), jnp.int8(zero_code(spec)))
        return values_of(codes, spec) * s, codes

    free = w != 0 if keep_zeros else jnp.ones(w.shape, bool)
    given = (each[:, order], free[:, order])
    codes = sweep(w[:, order], upper, given, fix, block=block)[:, jnp.argsort(order)]
    return Coded(pack(codes, spec), scales), jnp.diag(upper)


def quantise_gptq(
    model: LM,
    batches: Iterable[Mapping[str, Any]],
    spec: QuantSpec,
    *,
    vocab: QuantSpec | None = None,
    keep: tuple[str, ...] = KEEP,
    damping: float = 0.01,
    act_order: bool = True,
    keep_zeros: bool = False,
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
        keep_zeros: see `gptq_codes`.

    Raises:
        UserError: as `walk`; or if a matrix of second moments cannot be inverted.
    """
    dtype = jnp.dtype(model.config.dtype)
    one_matrix = partial(gptq_codes, spec=spec, act_order=act_order, keep_zeros=keep_zeros)

    def visit(_: int, block: Block, streams: list[Stream]) -> tuple[Block, dict[str, Coded]]:
        found = inputs_of(block, streams, dtype, gram=True)
        coded = {
            path: solved(path, matrix_of(linear), found[path].gram, one_matrix, damping=damping)
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
