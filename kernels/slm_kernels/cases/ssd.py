"""Uses of state-space duality."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.ssd import ssd

# B rows of L tokens, H heads of P channels, G groups of projections, N states.


def _arguments(s: Shape, packed: bool = False) -> Arguments:
    batch, length, heads = s["B"], s["L"], s["H"]
    projection = array(batch, length, s["G"] * s["N"])
    args = {
        "x": array(batch, length, heads * s["P"]),
        "dt": array(batch, length, heads, dtype=jnp.float32),
        "a": array(heads, dtype=jnp.float32),
        "b": projection,
        "c": projection,
        "d": array(heads, dtype=jnp.float32),
    }
    if packed:
        args["reset"] = array(batch, length, dtype=jnp.bool_)
    return args


def _ssd(n: int) -> Callable[[str], Callable[..., jax.Array]]:
    """Of arrays whose heads and groups lie side by side, as the layer's projections leave them."""

    def form(implementation: str) -> Callable[..., jax.Array]:
        def run(x: jax.Array, b: jax.Array, c: jax.Array, **rest: jax.Array) -> jax.Array:
            batch, length, width = x.shape
            heads = rest["dt"].shape[2]
            b, c = (v.reshape(batch, length, -1, n) for v in (b, c))
            x = x.reshape(batch, length, heads, width // heads)
            y, _ = ssd(x, b=b, c=c, **rest, implementation=implementation)
            return y.reshape(batch, length, width)

        return run

    return form


def _work(packed: bool = False) -> Callable[[Shape, bool], Work]:
    """Products with the state, of which no form has fewer: 4 flops a state and token forward.

    Backward 2 to have the state again and 10: its adjoint, and the gradients of x, b, c and dt.
    """

    def work(s: Shape, backward: bool) -> Work:
        args = _arguments(s, packed)
        states = s["B"] * s["L"] * s["H"] * s["P"] * s["N"]
        y = nbytes({"y": args["x"]})
        moved, steps = nbytes(args) + y, s["B"] * s["L"] * s["H"]
        if not backward:
            return Work(flops=4 * states, bytes=moved, transcendentals=steps)
        moved += nbytes(args) + y  # read again, with the gradient of y
        moved += nbytes({n: a for n, a in args.items() if n != "reset"})
        return Work(flops=16 * states, bytes=moved, transcendentals=2 * steps)

    return work


def _case(packed: bool = False, groups: int = 1) -> Case:
    shape = {"B": 1, "L": 2048, "H": 24, "P": 64, "G": groups, "N": 128}
    return Case(
        shape,
        {"L": 256, "H": 4 * groups},
        lambda s: _arguments(s, packed),
        _ssd(shape["N"]),
        _work(packed),
    )


CASES = {
    "ssd": _case(),
    "ssd-packed": _case(packed=True, groups=2),
}
