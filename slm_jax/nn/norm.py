"""RMSNorm and LayerNorm, always computed in float32."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.nn.module import parameter


@dataclass(frozen=True)
class NormConfig:
    """Which normalisation the blocks use."""

    kind: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450)."""
    eps: float = 1e-5
    """Added to the variance."""
    scale: Literal["plain", "unit_offset", "none"] = "plain"
    """Multiply by w, by 1 + w (Gemma), or by nothing."""
    bias: bool = False
    """Adds a learned shift."""


class Norm(nnx.Module):
    """Normalises the last axis, or the last two (`[heads, head_dim]`) for full-width QK-norm.

    Attributes:
        scale: `shape`, or `None`.
        bias: `shape`, or `None`.
    """

    def __init__(self, config: NormConfig, shape: int | tuple[int, ...]) -> None:
        shape = (shape,) if isinstance(shape, int) else shape
        axes = (None,) * len(shape)
        init = jnp.zeros if config.scale == "unit_offset" else jnp.ones
        self.config = config
        self.n_axes = len(shape)
        has_scale = config.scale != "none"
        self.scale = parameter(init(shape), axes, decay=False) if has_scale else None
        self.bias = parameter(jnp.zeros(shape), axes, decay=False) if config.bias else None

    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Normalises `x`; returns its shape in `dtype` (default that of `x`)."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return _normalise(x, scale, bias, self.config, self.n_axes, dtype or x.dtype)


# Recomputed in the backward pass: otherwise every norm keeps a float32 copy of its input.
@partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _normalise(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    config: NormConfig,
    n_axes: int,
    dtype: jnp.dtype,
) -> jax.Array:
    axis = tuple(range(-n_axes, 0))
    h = x.astype(jnp.float32)
    if config.kind == "layer":
        h = h - jnp.mean(h, axis, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis, keepdims=True) + config.eps)
    if scale is not None:
        h = h * (scale + 1.0 if config.scale == "unit_offset" else scale)
    if bias is not None:
        h = h + bias
    return h.astype(dtype)
