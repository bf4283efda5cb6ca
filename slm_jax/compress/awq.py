"""AWQ (arXiv 2306.00978): scales up the channels that matter, so that rounding hurts them less."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.compress.calibrate import Inputs, Stream, inputs_of, matrices, walk, with_layers
from slm_jax.compress.codes import decode, encode
from slm_jax.compress.fold import Link, fold, links, shared_scale
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.quantise import KEEP, is_wanted
from slm_jax.compress.spec import QuantSpec
from slm_jax.models.lm import LM
from slm_jax.nn.block import Block

_GRID = 20  # exponents tried between 0 and 1, as in the authors' code


def activation_aware(
    model: LM,
    batches: Iterable[Mapping[str, Any]],
    spec: QuantSpec,
    *,
    keep: tuple[str, ...] = KEEP,
) -> LM:
    """A float model of the same function that loses less when it is rounded to `spec`.

    Every channel of `fold.links` is multiplied by s = size of its activations ^ alpha (equation
    5), with the alpha of 0, 1/20, ... 19/20 that leaves the smallest squared error of the readers'
    outputs on the calibration data: alpha = 0 is plain rounding, so no link gets worse. The size is
    the root mean square. The authors also search for clipping ranges; that is not done here.

    Args:
        model: of float weights.
        batches: calibration data, see `calibrate.walk`.
        spec: the format that the layers will be rounded to.
        keep: see `quantise`.

    Raises:
        UserError: as `walk`.
    """
    dtype = jnp.dtype(model.config.dtype)

    def visit(_: int, block: Block, streams: list[Stream]) -> tuple[Block, Block]:
        found = inputs_of(block, streams, dtype, gram=True)
        new = block
        for link in links(block):
            new = fold(new, link, _best_scale(new, link, found, spec, keep))
        return block, new

    return with_layers(model, list(walk(model, batches, visit)))


def _best_scale(
    block: Block, link: Link, found: dict[str, Inputs], spec: QuantSpec, keep: tuple[str, ...]
) -> jax.Array:
    """`[K]`, or `[experts, K]` where the source has experts too."""
    linears = matrices(block)
    batched = link.source in linears and bool(linears[link.source].batch_axes)
    squares, rows = [], []
    for path in link.readers:
        one, count = found[path].squares, found[path].rows
        squares.append(one if batched else one.reshape(-1, one.shape[-1]).sum(0))
        rows.append(count if batched else count.sum())
    rms = jnp.sqrt(sum(squares) / jnp.maximum(sum(rows), 1.0)[..., None])
    rms = shared_scale(link, jnp.where(rms > 0, rms, 1.0))
    tried = [path for path in link.readers if is_wanted(path, keep)]
    weights = tuple(matrix_of(linears[path]) for path in tried)
    return _search(rms, weights, tuple(found[path].gram for path in tried), spec)


@partial(jax.jit, static_argnames="spec")
def _search(
    rms: jax.Array, weights: tuple[jax.Array, ...], grams: tuple[jax.Array, ...], spec: QuantSpec
) -> jax.Array:
    """The best of the grid, one exponent for the whole link."""

    def scale(alpha: jax.Array) -> jax.Array:
        s = rms**alpha
        middle = jnp.sqrt(s.max(-1, keepdims=True) * s.min(-1, keepdims=True))
        return s / middle

    def loss(alpha: jax.Array) -> jax.Array:
        s, total = scale(alpha), jnp.zeros(())
        for w, gram in zip(weights, grams, strict=True):
            n_out = w.ndim - gram.ndim + 1
            along = s.reshape(*s.shape[:-1], *(1,) * n_out, s.shape[-1]) if s.ndim > 1 else s
            k = w.shape[-1]
            error = decode(encode(w * along, spec), spec, k) / along - w
            error = error.reshape(*gram.shape[:-2], -1, k)
            total += jnp.sum(jnp.einsum("...nk,...kl->...nl", error, gram) * error)
        return total

    alphas = jnp.arange(_GRID) / _GRID
    return scale(alphas[jnp.argmin(jax.lax.map(loss, alphas))])
