"""Coordinate check: how far activations move in the first steps, to be compared over widths.

Under muP the change of every activation is of one size at all widths; in the standard
parametrisation it grows with the width (Tensor Programs V, arXiv 2203.03466, appendix D.1).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.models.lm import LM, LMConfig
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.step import StepConfig, init_state, train_step
from slm_jax.train.tasks.lm import LMTask

# The code runs a few times: it takes longer to compile than to run.
_UNOPTIMISED: dict[str, bool | int | str] = {"xla_backend_optimization_level": 0}


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        return x.astype(dtype)


def coordinate_changes(
    model: LMConfig,
    batch: Mapping[str, np.ndarray],
    *,
    optimizer: OptimizerConfig,
    learning_rate: float,
    steps: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Takes some steps on one batch and measures what its activations do.

    Args:
        model: the model, with or without `mup`.
        batch: `tokens`, `targets` `[B, S]` int32 and `weights` `[B, S]` float32.
        optimizer: update rule.
        learning_rate: the same at every step.
        steps: optimiser steps.
        seed: of the initial weights.

    Returns:
        Root mean square of the change since the first step, `[steps]` float64, of the residual
        stream before the last norm (`stream`) and of the logits (`logits`).
    """
    config = StepConfig(LMTask(model), optimizer)
    state = jax.jit(lambda s: init_state(config, s), compiler_options=_UNOPTIMISED)(np.uint32(seed))
    step = jax.jit(
        lambda s, b, rate: train_step(config, s, b, rate)[0], compiler_options=_UNOPTIMISED
    )
    first = _activations(state.model, batch["tokens"])
    changes: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(steps):
        state = step(state, dict(batch), np.float32(learning_rate))
        for name, value in _activations(state.model, batch["tokens"]).items():
            changes[name].append(float(jnp.sqrt(jnp.mean(jnp.square(value - first[name])))))
    return {name: np.array(values) for name, values in changes.items()}


@functools.partial(jax.jit, compiler_options=_UNOPTIMISED)
def _activations(model: LM, tokens: jax.Array) -> dict[str, jax.Array]:
    leaves, tree = jax.tree.flatten(model)
    bare = jax.tree.unflatten(tree, leaves)
    bare.final_norm = _Identity()
    stream, _, _ = bare.hidden(tokens)
    return {
        "stream": stream.astype(jnp.float32),
        "logits": model.logits(model.final_norm(stream, jnp.dtype(model.config.dtype))),
    }


def width_exponent(widths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value against log width, by least squares: 0 if the width does not matter."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
