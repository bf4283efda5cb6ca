"""One step of the recurrence, for decoding and for the reference."""

import jax
import jax.numpy as jnp


def recurrence_step(
    state: jax.Array, a: jax.Array, b: jax.Array, keep: jax.Array | None = None
) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t.

    Args:
        state: `[B, D]` float32.
        a: `[B, D]` decays.
        b: `[B, D]` inputs.
        keep: `[B]`, 0 where a document begins, or `None` for 1 everywhere.

    Returns:
        The new state `[B, D]` float32, which is also the output.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if keep is not None:
        a = a * keep.astype(jnp.float32)[:, None]
    return a * state.astype(jnp.float32) + b
