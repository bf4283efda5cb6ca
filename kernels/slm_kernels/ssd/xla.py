"""Chunk after chunk, matrix products inside, each chunk recomputed in the backward pass.

Equations (1) to (5) of `tpu.py`. What is kept for the backward pass is one state a chunk.
"""

import jax
import jax.numpy as jnp

from slm_kernels.ssd.decay import coarse, log2_decay

_CHUNK = 64


def ssd_xla(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    d: jax.Array | None,
    h0: jax.Array | None,
    reset: jax.Array | None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.ssd.ssd`."""
    f32 = jnp.float32
    length, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    chunk = min(chunk, length)
    precision = jax.lax.Precision.HIGHEST if x.dtype == f32 else None
    if h0 is None:
        # Made from x, so that it is split over devices as x is.
        h0 = jnp.zeros_like(x[:, 0], f32)[..., None] * jnp.zeros((b.shape[3],))

    def chunks(v: jax.Array) -> jax.Array:
        """`[B, L, ...]` to `[L / chunk, B, chunk, ...]`; the padding has dt = 0, a pass-through."""
        v = jnp.pad(v, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (v.ndim - 2))
        v = v.reshape(v.shape[0], -1, chunk, *v.shape[2:])
        return jnp.moveaxis(v, 1, 0)

    def by_group(v: jax.Array, axis: int) -> jax.Array:
        return v.reshape(*v.shape[:axis], groups, heads // groups, *v.shape[axis + 1 :])

    def product(equation: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=f32)

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None, None]

    @jax.checkpoint
    def body(state: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, log, b, c = xs
        x, dt, log = (by_group(v.astype(f32), 2) for v in (x, dt, log))
        b, c = b.astype(f32), c.astype(f32)
        decay = jnp.exp2(jnp.where(causal, _between(log), -jnp.inf))
        scores = product("bign,bjgn->bijg", c, b)[..., None]
        y = product("bijgh,bjghp->bighp", scores * decay * dt[:, None], x)  # (2)
        passed = jnp.exp2(jnp.cumsum(log, axis=1))
        y += passed[..., None] * product("bign,bghpn->bighp", c, state)  # (3)
        weight = dt * decay[:, -1]
        state = passed[:, -1, ..., None, None] * state
        state += product("bjghp,bjgn->bghpn", weight[..., None] * x, b)  # (4)
        return state, y

    xs = tuple(chunks(v) for v in (x, dt, log2_decay(dt, a, reset), b, c))
    state, ys = jax.lax.scan(body, by_group(h0.astype(f32), 1), xs)
    y = jnp.moveaxis(ys, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])[:, :length]
    if d is not None:
        y = y + d.astype(f32)[:, None] * x.astype(f32)
    return y.astype(x.dtype), state.reshape(h0.shape)


@jax.custom_vjp
def _between(log: jax.Array) -> jax.Array:
    """Sums over j < k <= i of `log` `[B, k, ...]`, to `[B, i, j, ...]`."""
    rough = coarse(log)
    high, low = jnp.cumsum(rough, axis=1), jnp.cumsum(log - rough, axis=1)
    return (high[:, :, None] - high[:, None]) + (low[:, :, None] - low[:, None])


def _between_fwd(log: jax.Array) -> tuple[jax.Array, None]:
    return _between(log), None


def _between_bwd(_: None, g: jax.Array) -> tuple[jax.Array]:
    """Sums over i >= k > j: differences of larger sums would leave rounding errors where 0 is."""
    at = jnp.arange(g.shape[1])
    since = (at[:, None] >= at).astype(g.dtype)
    sums = jnp.einsum("bij...,ik->bjk...", g, since, precision=jax.lax.Precision.HIGHEST)
    across = (at[:, None] < at).reshape(*since.shape, *(1,) * (g.ndim - 3))
    return (jnp.sum(jnp.where(across, sums, 0.0), axis=1),)


_between.defvjp(_between_fwd, _between_bwd)
