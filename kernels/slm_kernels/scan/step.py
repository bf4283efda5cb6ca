"""One step of the recurrence, shared by every form of the scan."""

import jax
import jax.numpy as jnp


def scan_step(
    state: jax.Array,
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    keep: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Advances one token.

    Args:
        state: `[B, D, N]` float32.
        u: `[B, D]` float32.
        dt: `[B, D]` float32.
        a: `[D, N]` float32.
        b: `[B, N]` float32.
        c: `[B, N]` float32.
        keep: `[B]` float32, 0 where a document begins, or `None` for 1 everywhere.

    Returns:
        The new state and `[B, D]`, the readout without the skip.
    """
    decay = jnp.exp(dt[:, :, None] * a)
    if keep is not None:
        decay = decay * keep[:, None, None]
    state = decay * state + (dt * u)[:, :, None] * b[:, None, :]
    return state, jnp.sum(state * c[:, None, :], axis=-1)
