"""The specification: one token after another."""

import jax
import jax.numpy as jnp

from slm_kernels.recurrence.step import recurrence_step


def linear_recurrence_reference(
    a: jax.Array, b: jax.Array, *, h0: jax.Array | None, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.recurrence.linear_recurrence`."""
    state = jnp.zeros_like(b[:, 0], jnp.float32) if h0 is None else h0.astype(jnp.float32)
    hs = []
    for t in range(b.shape[1]):
        keep = None if reset is None else 1.0 - reset[:, t].astype(jnp.float32)
        state = recurrence_step(state, a[:, t], b[:, t], keep)
        hs.append(state)
    return jnp.stack(hs, axis=1).astype(b.dtype), state
