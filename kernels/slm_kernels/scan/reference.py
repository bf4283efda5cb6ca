"""The specification: one token after another."""

import jax
import jax.numpy as jnp

from slm_kernels.scan.step import scan_step


def selective_scan_reference(
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    reset: jax.Array | None,
    initial_state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.scan.selective_scan`."""
    f32 = jnp.float32
    state = (
        jnp.zeros((u.shape[0], *a.shape), f32)
        if initial_state is None
        else initial_state.astype(f32)
    )
    a = a.astype(f32)
    ys = []
    for t in range(u.shape[1]):
        keep = None if reset is None else 1.0 - reset[:, t].astype(f32)
        u_t, dt_t, b_t, c_t = (x[:, t].astype(f32) for x in (u, dt, b, c))
        state, y = scan_step(state, u_t, dt_t, a, b_t, c_t, keep)
        ys.append(y)
    y = jnp.stack(ys, axis=1) + d.astype(f32) * u.astype(f32)
    return y.astype(u.dtype), state
