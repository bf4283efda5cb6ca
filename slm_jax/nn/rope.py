"""Rotary position embeddings (arXiv 2104.09864) and their context extensions.

The scaled forms follow the definitions of `transformers.modeling_rope_utils`, which are the ones
published checkpoints were trained with.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class NTKScaling:
    """Dynamic NTK: theta grows with the sequence once it is longer than `original_length`."""

    factor: float
    original_length: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): per-frequency blend of interpolation and extrapolation."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 (arXiv 2407.21783): low frequencies interpolated, high ones kept."""

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): searched per-frequency factors, one set beyond the old length.

    `short_factor` and `long_factor` have one number a frequency (rotary dimensions / 2).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float


RopeScaling = LinearScaling | NTKScaling | YarnScaling | Llama3Scaling | LongRopeScaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotation of queries and keys by position."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    layout: Literal["half", "adjacent"] = "half"
    """Which coordinates form a pair: (i, i + d/2) as in HF checkpoints, or (2i, 2i + 1)."""
    fraction: float = 1.0
    """Share of each head that is rotated; the rest passes unchanged."""
    scaling: RopeScaling | None = None
    """Context extension."""


def _yarn(scaling: YarnScaling, theta: float, dim: int) -> tuple[np.ndarray, float]:
    def correction_dim(rotations: float) -> float:
        return (
            dim
            * math.log(scaling.original_length / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = correction_dim(scaling.beta_fast), correction_dim(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    freq = theta ** (-np.arange(0, dim, 2) / dim)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return freq / scaling.factor * ramp + freq * (1 - ramp), factor


def llama3_frequencies(scaling: Llama3Scaling, freq: np.ndarray) -> np.ndarray:
    """The rotation's frequencies `[rotated / 2]` after the scaling."""
    wavelength = 2 * math.pi / freq
    turns = scaling.original_length / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def rope_tables(
    config: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the rotated part of a head.

    Args:
        config: the rotation.
        head_dim: width of one head.
        positions: `[B, S]` int32. Forms that depend on the sequence length (dynamic NTK,
            LongRoPE) take the largest position plus one.

    Returns:
        Two `[B, S, rotated / 2]` float32 arrays, attention factor included.
    """
    dim = int(head_dim * config.fraction)
    exponent = np.arange(0, dim, 2) / dim
    freq = config.theta**-exponent
    scale = 1.0
    inv_freq: jax.Array | np.ndarray
    match config.scaling:
        case None:
            inv_freq = freq
        case LinearScaling(factor):
            inv_freq = freq / factor
        case NTKScaling(factor, original):
            length = jnp.maximum(jnp.max(positions) + 1, original).astype(jnp.float32)
            grow = factor * length / original - (factor - 1)
            inv_freq = (config.theta * grow ** (dim / (dim - 2))) ** -exponent
        case YarnScaling() as yarn:
            inv_freq, scale = _yarn(yarn, config.theta, dim)
        case Llama3Scaling() as llama3:
            inv_freq = llama3_frequencies(llama3, freq)
        case LongRopeScaling(short, long, original, scale):
            inv_freq = jnp.where(
                jnp.max(positions) + 1 > original, freq / np.array(long), freq / np.array(short)
            )
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def apply_rope(
    x: jax.Array, cos: jax.Array, sin: jax.Array, layout: Literal["half", "adjacent"]
) -> jax.Array:
    """Rotates the first coordinates of every head.

    Args:
        x: `[B, S, heads, head_dim]`.
        cos: `[B, S, rotated / 2]` float32, from `rope_tables`.
        sin: the same.
        layout: which coordinates form a pair.

    Returns:
        The shape and dtype of `x`; computed in float32.
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    # Pairs along an axis of their own, so that the rotation is one elementwise pass:
    # (a, b) cos + (b, a) (-sin, sin).
    axis, shape = (-2, (2, half)) if layout == "half" else (-1, (half, 2))
    pairs = rotated.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    cos = jnp.expand_dims(cos[:, :, None], axis)
    sin = jnp.stack([-sin, sin], axis)[:, :, None]
    out = (pairs * cos + jnp.flip(pairs, axis) * sin).astype(x.dtype).reshape(rotated.shape)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
