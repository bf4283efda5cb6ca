"""SmoothQuant (arXiv 2211.10438): moves outliers of the activations into the weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.compress.calibrate import Inputs, Stream, inputs_of, matrices, walk, with_layers
from slm_jax.compress.fold import Link, fold, links, shared_scale
from slm_jax.compress.linear import matrix_of
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.block import Block


def smoothed(model: LM, batches: Iterable[Mapping[str, Any]], *, strength: float = 0.5) -> LM:
    """A float model of the same function whose activations have smaller outliers.

    Every channel of `fold.links` is divided by s = max|x|^strength / max|w|^(1 - strength)
    (equation 4). Here s is rounded to a power of two, at most sqrt(2) away: then the model is the
    same to the last bit before anything is quantised, in any float dtype.

    Args:
        model: of float weights.
        batches: calibration data, see `calibrate.walk`.
        strength: the paper's alpha: 0 leaves the activations, 1 makes them all alike.

    Raises:
        UserError: as `walk`, or for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength} must be between 0 and 1: 0.5 is usual")
    dtype = jnp.dtype(model.config.dtype)

    def visit(_: int, block: Block, streams: list[Stream]) -> tuple[Block, Block]:
        found = inputs_of(block, streams, dtype, gram=False)
        new = block
        for link in links(block):
            new = fold(new, link, _scale(new, link, found, strength))
        return block, new

    return with_layers(model, list(walk(model, batches, visit)))


def _scale(block: Block, link: Link, found: dict[str, Inputs], strength: float) -> jax.Array:
    """`[K]`, or `[experts, K]` where the source has experts too."""
    linears = matrices(block)
    keep = len(linears[link.source].batch_axes) if link.source in linears else 0

    def most(a: jax.Array) -> jax.Array:
        return jnp.max(a.reshape(*a.shape[:keep], -1, a.shape[-1]), axis=-2)

    x = jnp.max(jnp.stack([most(found[path].largest) for path in link.readers]), axis=0)
    weights = [most(jnp.abs(matrix_of(linears[path]))) for path in link.readers]
    w = jnp.max(jnp.stack(weights), axis=0)
    s = jnp.exp2(jnp.round(strength * jnp.log2(x) - (1 - strength) * jnp.log2(w)))
    return shared_scale(link, jnp.where((x > 0) & (w > 0), s, 1.0))
