"""Whole units taken out: hidden units, groups of heads, channels of a scan. The rest is dense.

A unit is an index of a named axis of a layer. A parameter says which of its dimensions have that
name, so taking a unit out is the same few lines for every kind of layer.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.compress.calibrate import Inputs, Stream, get_layer, inputs_of, walk, with_layers
from slm_jax.compress.linear import matrix_of
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import Block, LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import is_variable
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig


@dataclass(frozen=True)
class Units:
    """Units of one half of a layer.

    Attributes:
        half: `mixer` or `channel`.
        axes: logical names that a unit is an index of; of the second and later ones it is a run of
            neighbours (the query heads of a key/value head).
        reader: the `Linear` that alone reads what the units compute.
        count: of units.
    """

    half: str
    axes: tuple[str, ...]
    reader: str
    count: int


def units_of(layer: LayerConfig) -> list[Units]:
    """What can be taken out of a layer."""
    out = []
    match layer.mixer:
        case AttentionConfig(n_kv_heads=n, qk_norm=norm) if n > 1 and norm != "full":
            out.append(Units("mixer", ("kv_heads", "heads"), "out", n))
        case MambaConfig(d_inner=n):
            out.append(Units("mixer", ("inner",), "out", n))
    match layer.channel:
        case MLPConfig(d_ff=n) | MoEConfig(d_ff=n):
            out.append(Units("channel", ("mlp",), "down", n))
    return out


def smaller(layer: LayerConfig, share: float) -> LayerConfig:
    """The layer without the share of its units, rounded down to whole ones; one of each remains."""
    for units in units_of(layer):
        config, n = getattr(layer, units.half), remaining(units, share)
        match config:
            case AttentionConfig():
                changes = {"n_kv_heads": n, "n_heads": config.n_heads // config.n_kv_heads * n}
            case MambaConfig():
                changes = {"d_inner": n}
            case _:
                changes = {"d_ff": n}
        layer = replace(layer, **{units.half: replace(config, **changes)})
    return layer


def remaining(units: Units, share: float) -> int:
    """How many units stay."""
    return max(1, units.count - math.floor(share * units.count + 1e-9))  # 0.29 x 100 is 28.999...


def prune_units(
    model: LM, batches: Iterable[Mapping[str, Any]], share: float
) -> tuple[LM, dict[str, float]]:
    """Takes whole units out of every layer: a smaller model of the same kind.

    Of each layer the units stay whose outputs matter most to the reader, by the root of the sum of
    |x|^2 |w|^2 over the unit's inputs of it (Wanda's score, arXiv 2306.11695, added up over the
    unit); in a mixture, of each expert on its own. Layers are done in order, each on what the
    smaller ones before it give. Heads are taken by the group that shares keys and values; of a
    single group, or where queries are normalised over all heads, none is taken.

    Args:
        model: of float weights.
        batches: calibration data, see `calibrate.walk`.
        share: of the units, 0 to below 1.

    Returns:
        The model, and by layer (`3`) the share of the sum of squared scores that went.

    Raises:
        UserError: as `walk`; for a share outside [0, 1); if no layer has units.
    """
    if not 0 <= share < 1:
        raise UserError(f"sparsity={share:g} must be at least 0 and below 1")
    config = model.config
    pattern = tuple(smaller(layer, share) for layer in config.pattern)
    if not any(units_of(layer) for layer in config.pattern):
        raise UserError("method=structured: the layers of this model have no units to take out")
    new_config = replace(config, pattern=pattern)
    shapes = jax.eval_shape(lambda key: LM(new_config, key), jax.random.key(0))
    dtype, lost = jnp.dtype(config.dtype), {}

    def visit(i: int, block: Block, streams: list[Stream]) -> tuple[Block, Block]:
        found = inputs_of(block, streams, dtype, gram=False)
        new, gone, total = block, 0.0, 0.0
        for units in units_of(config.layer(i)):
            scores = _scores(block, units, found)
            n = remaining(units, share)
            stays = jnp.sort(jax.lax.top_k(scores, n)[1], axis=-1)
            kept = jnp.take_along_axis(scores, stays, axis=-1)
            new = _cut(new, units, stays)
            gone, total = gone + float(scores.sum() - kept.sum()), total + float(scores.sum())
        lost[str(i)] = gone / total if total else 0.0
        # The same arrays in a layer that says what sizes it has.
        abstract = jax.eval_shape(partial(get_layer, i=i), shapes)
        new = jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(new))
        return new, new

    whole = with_layers(model, list(walk(model, batches, visit)))
    out: LM = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(whole))
    return out, lost


def _scores(block: Block, units: Units, found: Mapping[str, Inputs]) -> jax.Array:
    """Squared score of each unit: `[*batch, units]`; where no token came, of the weights alone."""
    reader = getattr(getattr(block, units.half), units.reader)
    squares = found[f"{units.half}.{units.reader}"].squares
    seen = jnp.any(squares > 0, axis=-1, keepdims=True)
    norms = jnp.sum(jnp.square(matrix_of(reader)), axis=-2)
    each = jnp.where(seen, squares, 1.0) * norms
    return jnp.sum(each.reshape(*each.shape[:-1], units.count, -1), axis=-1)


def _cut(block: Block, units: Units, stays: jax.Array) -> Block:
    """The layer with the units `stays` `[*batch, n]`, its configuration as it was."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        axes = leaf.get_metadata()["axes"]
        for name in units.axes:
            if name in axes:
                leaf = leaf.replace(_taken(leaf[...], axes.index(name), stays, units.count))
        return leaf

    half = jax.tree.map(one, getattr(block, units.half), is_leaf=is_variable)
    copy = jax.tree.unflatten(jax.tree.structure(block), jax.tree.leaves(block))
    setattr(copy, units.half, half)
    return copy


def _taken(a: jax.Array, axis: int, stays: jax.Array, count: int) -> jax.Array:
    """Runs of equal length along an axis, those of `stays`; batch axes come first in both."""
    width = a.shape[axis] // count
    index = (stays[..., None] * width + jnp.arange(width)).reshape(*stays.shape[:-1], -1)
    n_batch = stays.ndim - 1
    shape = [1] * a.ndim
    shape[:n_batch], shape[axis] = stays.shape[:-1], index.shape[-1]
    return jnp.take_along_axis(a, index.reshape(shape), axis=axis)
