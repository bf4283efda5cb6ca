"""The specification: one token after another."""

import jax
import jax.numpy as jnp

from slm_kernels.ssd.step import ssd_step


def ssd_reference(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    d: jax.Array | None,
    h0: jax.Array | None,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.ssd.ssd`."""
    if h0 is None:
        h0 = jnp.zeros((*x[:, 0].shape, b.shape[3]))
    state, ys = h0.astype(jnp.float32), []
    for t in range(x.shape[1]):
        keep = None if reset is None else 1.0 - reset[:, t].astype(jnp.float32)
        state, y = ssd_step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t], d, keep)
        ys.append(y)
    return jnp.stack(ys, axis=1), state
