"""Decays between any two steps of a chunk, exact however strong those before them are."""

import jax
import jax.numpy as jnp

from slm_kernels.base2 import LOG2E

# What passes a reset, in powers of two: 2^-256 is 0 in float32, and so is any smaller number.
NOTHING = -256.0
FINE = 256.0  # steps of a power of two that sums of `coarse` keep exactly


def log2_decay(dt: jax.Array, a: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Of each step, not below `NOTHING`, which is that of a reset.

    Args:
        dt: `[B, L, H]` step sizes.
        a: `[H]` rates.
        reset: `[B, L]` bool or `None`.

    Returns:
        `[B, L, H]` float32.
    """
    log = jnp.maximum(dt.astype(jnp.float32) * (a.astype(jnp.float32) * LOG2E), NOTHING)
    return log if reset is None else jnp.where(reset[:, :, None], NOTHING, log)


def coarse(log: jax.Array) -> jax.Array:
    """`log` in multiples of 1/256.

    The sum of up to 256 of them is exact in float32, and what is left sums to at most 1/2. A
    difference of two sums of `log` itself is not: behind a sum of -1,000, float32 knows the next
    decay to 6e-5.
    """
    return jnp.round(log * FINE) / FINE
