"""Uses of decode attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.decode import decode_attention

# One query a row, B rows, H query and K key heads of D, S slots.


def _arguments(s: Shape, int8: bool = False, positions: bool = False) -> Arguments:
    cache = array(s["B"], s["S"], s["K"], s["D"], dtype=jnp.int8 if int8 else jnp.bfloat16)
    args = {"q": array(s["B"], s["H"], s["D"]), "k": cache, "v": cache}
    if int8:
        scale = array(s["B"], s["S"], s["K"], dtype=jnp.float32)
        args |= {"k_scale": scale, "v_scale": scale}
    if positions:
        args["q_positions"] = array(s["B"], dtype=jnp.int32)
        args["kv_positions"] = array(s["B"], s["S"], dtype=jnp.int32)
    return args


def _decode(**options: Any) -> Callable[[str], Callable[..., jax.Array]]:
    return lambda implementation: (
        lambda **args: decode_attention(**args, **options, implementation=implementation)[0]
    )


def _work(int8: bool = False, positions: bool = False) -> Callable[[Shape, bool], Work]:
    """Two products and an exponential a slot; every slot is in use."""

    def work(s: Shape, backward: bool) -> Work:
        args = _arguments(s, int8, positions)
        scores = s["B"] * s["H"] * s["S"]
        moved = nbytes(args) + nbytes({"out": args["q"]})
        return Work(flops=4 * s["D"] * scores, bytes=moved, transcendentals=scores)

    return work


_SHAPE = {"B": 8, "S": 4096, "H": 32, "K": 8, "D": 128}
_SMALL = {"B": 2, "S": 1024}

CASES = {
    "decode": Case(_SHAPE, _SMALL, _arguments, _decode(), _work(), gradients=False),
    "decode-int8": Case(
        _SHAPE,
        _SMALL,
        lambda s: _arguments(s, int8=True),
        _decode(),
        _work(int8=True),
        gradients=False,
    ),
    # Heads of 64, as in small models; a ring with its positions, as a sliding window keeps.
    "decode-ring": Case(
        {**_SHAPE, "D": 64},
        _SMALL,
        lambda s: _arguments(s, positions=True),
        _decode(window=1000, softcap=50.0),
        _work(positions=True),
        gradients=False,
    ),
}
