"""Uses of the scans."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.scan import selective_scan

# Selective scan: B rows of L tokens, width D, N states a channel.


def _scan_arguments(s: Shape, packed: bool = False, dtype: Any = jnp.bfloat16) -> Arguments:
    batch, length, width, n = s["B"], s["L"], s["D"], s["N"]
    args = {
        "u": array(batch, length, width, dtype=dtype),
        "dt": array(batch, length, width, dtype=jnp.float32),
        "a": array(width, n, dtype=jnp.float32),
        "b": array(batch, length, n, dtype=dtype),
        "c": array(batch, length, n, dtype=dtype),
        "d": array(width, dtype=jnp.float32),
    }
    if packed:
        args["reset"] = array(batch, length, dtype=jnp.bool_)
    return args


def _scan(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: selective_scan(**args, implementation=implementation)[0]


def _parts(u: Any, dt: Any, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Decays and what is added to the states, `[B, L, D, N]` float32."""
    u, dt, b = (x.astype(jnp.float32) for x in (u, dt, b))
    return jnp.exp(dt[..., None] * a), (dt * u)[..., None] * b[:, :, None]


def _associative(u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> jax.Array:
    """The scan as `jax.lax.associative_scan` over all states."""

    def combine(x: Any, y: Any) -> Any:
        return x[0] * y[0], y[0] * x[1] + y[1]

    _, h = jax.lax.associative_scan(combine, _parts(u, dt, a, b), axis=1)
    y = jnp.sum(h * c.astype(jnp.float32)[:, :, None], axis=-1) + d * u.astype(jnp.float32)
    return y.astype(u.dtype)


def _sequential(u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> jax.Array:
    """The scan as `jax.lax.scan`, a token a turn."""

    def step(h: Any, at: Any) -> Any:
        u, dt, b, c = (x.astype(jnp.float32)[:, None] for x in at)
        decay, add = _parts(u, dt, a, b)
        h = decay[:, 0] * h + add[:, 0]
        return h, jnp.sum(h * c, axis=-1)

    h = jnp.zeros((u.shape[0], *a.shape), jnp.float32)
    y = jax.lax.scan(step, h, tuple(x.swapaxes(0, 1) for x in (u, dt, b, c)))[1].swapaxes(0, 1)
    return (y + d * u.astype(jnp.float32)).astype(u.dtype)


def _scan_work(arguments: Callable[[Shape], Arguments]) -> Callable[[Shape, bool], Work]:
    """Operations a state and token, of h = exp(dt a) h + (dt u) b; y = c h summed over the states.

    Forward 6: dt a, decay h, (dt u) b, their sum, c h, the sum over states. Backward: 4 and the
    exponential to have h again; g = decay' g' + c dy (3); and for each gradient a product and a
    sum over channels, states or tokens: dc, db, d(dt u) (6), d(dt) and da of g h decay (6).
    """

    def work(s: Shape, backward: bool) -> Work:
        args = arguments(s)
        states = s["B"] * s["L"] * s["D"] * s["N"]
        y = nbytes({"y": args["u"]})
        moved = nbytes(args) + y
        if not backward:
            return Work(bytes=moved, vector_ops=6 * states, transcendentals=states)
        moved += nbytes(args) + y  # read again, with the gradient of y
        moved += nbytes({n: a for n, a in args.items() if n != "reset"})
        return Work(bytes=moved, vector_ops=25 * states, transcendentals=2 * states)

    return work


def _case(arguments: Callable[[Shape], Arguments]) -> Case:
    return Case(
        {"B": 1, "L": 2048, "D": 1024, "N": 16},
        {"L": 256, "D": 256},
        arguments,
        _scan,
        _scan_work(arguments),
        {"associative_scan": _associative, "lax.scan": _sequential},
        blocks={
            "selective_scan_forward": [
                {"chunk": chunk, "unroll": unroll}
                for chunk, unroll in ((128, 32), (128, 64), (64, 32))
            ],
            "selective_scan_backward": [{"unroll": 8}, {"unroll": 16}],
        },
    )


CASES = {
    "scan": _case(_scan_arguments),
    "scan-f32": _case(lambda s: _scan_arguments(s, dtype=jnp.float32)),
    "scan-packed": _case(lambda s: _scan_arguments(s, packed=True)),
}
