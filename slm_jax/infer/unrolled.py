"""A model whose layers are not stacked, for decoding on a CPU."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.module import changed


def unrolled(model: LM) -> LM:
    """The same model with each layer in arrays of its own.

    XLA:CPU copies the weights of a layer out of the stack before it multiplies by them, and the
    caches out and in again: decoding moves several times the memory that it must. Here it reads
    weights where they are and writes caches in place. The weights are copied once, and programs
    take longer to compile, by the number of layers.

    Args:
        model: any language model but one with recursion, whose layers share weights.

    Raises:
        UserError: if layers repeat.
    """
    config = model.config
    if config.recursion is not None:
        raise UserError("unrolled() of a model with recursion: its layers repeat: use it as it is")

    def layer(stacked: Any, i: int) -> Any:
        return jax.tree.map(lambda a: a[i], stacked)

    periods = config.n_layers // len(config.pattern)
    layers = [layer(block, i) for i in range(periods) for block in model.blocks]
    # A pattern longer than the model: all of it is a last incomplete period, which is not stacked.
    pattern = tuple(config.layer(i) for i in range(config.n_layers + 1))
    out: LM = changed(
        model,
        config=replace(config, pattern=pattern),
        blocks=nnx.List([]),
        tail=nnx.List([*layers, *model.tail]),
    )
    return out
