"""Sequential scan over unrolled steps, forwards and, for the gradients, backwards.

The adjoint is the same recurrence in reverse, so that nothing is kept for it but a and h.
"""

from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.recurrence.step import recurrence_step

_UNROLL = 8


def linear_recurrence_xla(
    a: jax.Array, b: jax.Array, *, h0: jax.Array | None, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.recurrence.linear_recurrence`."""
    if h0 is None:
        # Made from b, so that it is split over devices as b is.
        h0 = jnp.zeros_like(b[:, 0], jnp.float32)
    keep = None if reset is None else 1.0 - reset.astype(jnp.float32)
    return _recurrence(a, b, h0.astype(jnp.float32), keep)


def _by_time(*xs: jax.Array | None) -> list[jax.Array | None]:
    return [None if x is None else jnp.moveaxis(x, 1, 0) for x in xs]


@jax.custom_vjp
def _recurrence(
    a: jax.Array, b: jax.Array, h0: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, jax.Array]:

    def step(state: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        a, b, keep = xs
        state = recurrence_step(state, a, b, keep)
        return state, state.astype(b.dtype)

    last, h = jax.lax.scan(step, h0, _by_time(a, b, keep), unroll=_UNROLL)
    return jnp.moveaxis(h, 0, 1), last


def _forward(a: jax.Array, b: jax.Array, h0: jax.Array, keep: jax.Array | None) -> tuple:
    out = _recurrence(a, b, h0, keep)
    return out, (a, out[0], h0, keep)


def _backward(saved: tuple, grads: tuple[jax.Array, jax.Array]) -> tuple:
    a, h, h0, keep = saved
    dh, dlast = grads
    before = jnp.concatenate([h0[:, None].astype(h.dtype), h[:, :-1]], axis=1)

    def step(e: jax.Array, xs: Any) -> tuple[jax.Array, tuple]:
        """Equations (3) and (4) of `tpu.py`."""
        a, before, dh, keep = xs
        g = e + dh.astype(jnp.float32)
        kept = g if keep is None else g * keep[:, None]
        da = kept * before.astype(jnp.float32)
        return kept * a.astype(jnp.float32), (da.astype(a.dtype), g.astype(dh.dtype))

    dh0, (da, db) = jax.lax.scan(
        step, dlast, _by_time(a, before, dh, keep), reverse=True, unroll=_UNROLL
    )
    no_grad = None if keep is None else jnp.zeros_like(keep)
    return jnp.moveaxis(da, 0, 1), jnp.moveaxis(db, 0, 1), dh0, no_grad


_recurrence.defvjp(_forward, _backward)
