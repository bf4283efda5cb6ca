"""Uses of the scans."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.scan import selective_scan

# Selective scan: B rows of L tokens, width D, N states a channel.


def _scan_arguments(s: Shape, packed: bool = False) -> Arguments:
    batch, length, width, n = s["B"], s["L"], s["D"], s["N"]
    args = {
        "u": array(batch, length, width),
        "dt": array(batch, length, width, dtype=jnp.float32),
        "a": array(width, n, dtype=jnp.float32),
        "b": array(batch, length, n),
        "c": array(batch, length, n),
        "d": array(width, dtype=jnp.float32),
    }
    if packed:
        args["reset"] = array(batch, length, dtype=jnp.bool_)
    return args


def _scan(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: selective_scan(**args, implementation=implementation)[0]


def _scan_work(packed: bool = False) -> Callable[[Shape, bool], Work]:
    """Operations a state and token, of h = exp(dt a) h + (dt u) b; y = c h summed over the states.

    Forward 6: dt a, decay h, (dt u) b, their sum, c h, the sum over states. Backward: 4 and the
    exponential to have h again; g = decay' g' + c dy (3); and for each gradient a product and a
    sum over channels, states or tokens: dc, db, d(dt u) (6), d(dt) and da of g h decay (6).
    """

    def work(s: Shape, backward: bool) -> Work:
        args = _scan_arguments(s, packed)
        states = s["B"] * s["L"] * s["D"] * s["N"]
        y = nbytes({"y": args["u"]})
        moved = nbytes(args) + y
        if not backward:
            return Work(bytes=moved, vector_ops=6 * states, transcendentals=states)
        moved += nbytes(args) + y  # read again, with the gradient of y
        moved += nbytes({n: a for n, a in args.items() if n != "reset"})
        return Work(bytes=moved, vector_ops=25 * states, transcendentals=2 * states)

    return work


_SCAN = {"B": 1, "L": 2048, "D": 1024, "N": 16}
_SCAN_SMALL = {"L": 256, "D": 256}

CASES = {
    "scan": Case(_SCAN, _SCAN_SMALL, _scan_arguments, _scan, _scan_work()),
    "scan-packed": Case(
        _SCAN,
        _SCAN_SMALL,
        lambda s: _scan_arguments(s, packed=True),
        _scan,
        _scan_work(packed=True),
    ),
}
