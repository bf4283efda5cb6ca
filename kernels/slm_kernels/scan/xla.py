"""Sequential scan over short unrolled chunks, recomputed in the backward pass.

On CPUs about twice as fast as an `associative_scan` in training, with a fraction of its memory:
only the state at each chunk's start is kept. Chunks of 4 run as fast as chunks of 8 and compile in
a third of the time; from 16 on XLA's fusions repeat work and the backward pass slows down.
"""

import jax
import jax.numpy as jnp

from slm_kernels.scan.step import scan_step

_CHUNK = 4


def selective_scan_xla(
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
    length = u.shape[1]
    chunk = min(_CHUNK, length)
    a = a.astype(f32)
    if initial_state is None:
        # Made from u, so that it is split over devices as u is.
        initial_state = jnp.zeros_like(u[:, 0], f32)[:, :, None] * jnp.zeros_like(a)

    def chunks(x: jax.Array) -> jax.Array:
        """`[B, L, ...]` to `[L / chunk, chunk, B, ...]`; the padding has dt = 0, a pass-through."""
        x = jnp.moveaxis(x.astype(f32), 1, 0)
        x = jnp.pad(x, [(0, -length % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    xs = [chunks(x) for x in (u, dt, b, c)]
    if reset is not None:
        xs.append(chunks(reset))

    @jax.checkpoint
    def body(state: jax.Array, xs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        u, dt, b, c = xs[:4]
        ys = []
        for t in range(chunk):
            keep = 1.0 - xs[4][t] if len(xs) > 4 else None
            state, y = scan_step(state, u[t], dt[t], a, b[t], c[t], keep)
            ys.append(y)
        return state, jnp.stack(ys)

    state, ys = jax.lax.scan(body, initial_state.astype(f32), xs)
    y = jnp.moveaxis(ys.reshape(-1, *ys.shape[2:])[:length], 0, 1)
    return (y + d.astype(f32) * u.astype(f32)).astype(u.dtype), state
