"""One step of the state-space recurrence, for decoding and for the reference."""

import jax
import jax.numpy as jnp


def ssd_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t;  y_t = h_t c_t + d x_t.

    Args:
        state: `[B, H, P, N]` float32.
        x: `[B, H, P]` inputs of each head.
        dt: `[B, H]` step sizes, after softplus.
        a: `[H]` negative decay rates.
        b: `[B, G, N]` input projections; head h uses group h G // H.
        c: `[B, G, N]` output projections.
        d: `[H]` skip, or `None`.
        keep: `[B]`, 0 where a document begins, or `None` for 1 everywhere.

    Returns:
        The new state, and `y` `[B, H, P]` in the dtype of `x`.
    """
    f32 = jnp.float32
    dtype, heads = x.dtype, x.shape[1] // b.shape[1]
    x, dt, b, c = (v.astype(f32) for v in (x, dt, b, c))
    b, c = (jnp.repeat(v, heads, axis=1) for v in (b, c))
    decay = jnp.exp(dt * a.astype(f32))
    if keep is not None:
        decay = decay * keep.astype(f32)[:, None]
    new = (dt[..., None] * x)[..., None] * b[:, :, None]
    state = decay[..., None, None] * state.astype(f32) + new
    y = jnp.sum(state * c[:, :, None], axis=-1)
    if d is not None:
        y = y + d.astype(f32)[:, None] * x
    return state, y.astype(dtype)
