"""Rows of floating-point numbers as int8 with one scale each."""

import jax
import jax.numpy as jnp


def quantise_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantisation a row (a token), as in LLM.int8() (arXiv 2208.07339, eq. 1).

    The largest magnitude becomes 127; halves round to even; a row of zeros has the scale 0.

    Args:
        x: `[..., K]`, floating point and finite.

    Returns:
        int8 `[..., K]` in -127..127 and the scales `[...]` float32: x is about their product.

    Raises:
        ValueError: if `x` is not of a floating type.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: want floating point, or the int8 that there is already")
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    # A row of zeros is divided by 1; one of subnormal numbers has a coarse scale, hence the clip.
    steps = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return jnp.clip(steps, -127, 127).astype(jnp.int8), scale
