"""Uses of the linear recurrence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.recurrence import linear_recurrence

# B rows of L tokens, width D.


def _arguments(s: Shape, packed: bool = False, dtype: Any = jnp.float32) -> Arguments:
    args = {name: array(s["B"], s["L"], s["D"], dtype=dtype) for name in "ab"}
    if packed:
        args["reset"] = array(s["B"], s["L"], dtype=jnp.bool_)
    return args


def _recurrence(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: linear_recurrence(**args, implementation=implementation)[0]


def _work(arguments: Callable[[Shape], Arguments]) -> Callable[[Shape, bool], Work]:
    """Forward 2 operations an element; backward 3: g, da and the next e."""

    def work(s: Shape, backward: bool) -> Work:
        args = arguments(s)
        elements = s["B"] * s["L"] * s["D"]
        h = nbytes({"h": args["b"]})
        moved = nbytes(args) + h
        if not backward:
            return Work(bytes=moved, vector_ops=2 * elements)
        # Read again: a, h and the resets, with the gradient of h; written: those of a and b.
        again = {name: x for name, x in args.items() if name != "b"}
        moved += nbytes(again) + 2 * h + nbytes({"a": args["a"], "b": args["b"]})
        return Work(bytes=moved, vector_ops=5 * elements)

    return work


def _case(arguments: Callable[[Shape], Arguments]) -> Case:
    return Case(
        {"B": 1, "L": 2048, "D": 2048},
        {"L": 256, "D": 256},
        arguments,
        _recurrence,
        _work(arguments),
    )


CASES = {
    "recurrence": _case(_arguments),
    "recurrence-bf16": _case(lambda s: _arguments(s, dtype=jnp.bfloat16)),
    "recurrence-packed": _case(lambda s: _arguments(s, packed=True)),
}
