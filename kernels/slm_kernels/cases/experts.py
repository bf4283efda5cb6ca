"""Uses of the grouped product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.experts import grouped_matmul

# M rows in G groups, each by its own w [K, N].


def _arguments(s: Shape, int8: bool) -> Arguments:
    args = {
        "x": array(s["M"], s["K"]),
        "w": array(s["G"], s["K"], s["N"], dtype=jnp.int8 if int8 else jnp.bfloat16),
        "group_sizes": array(s["G"], dtype=jnp.int32),
    }
    return args | ({"w_scale": array(s["G"], s["N"], dtype=jnp.float32)} if int8 else {})


def _grouped(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: grouped_matmul(**args, implementation=implementation)


def _case(int8: bool) -> Case:
    def work(s: Shape, backward: bool) -> Work:
        moved = nbytes(_arguments(s, int8)) + nbytes({"y": array(s["M"], s["N"])})
        return Work(flops=2 * s["M"] * s["K"] * s["N"], bytes=moved)

    # The gradients are XLA's.
    return Case(
        {"M": 1024, "G": 8, "K": 1024, "N": 4096},
        {"M": 256, "G": 4, "N": 512},
        lambda s: _arguments(s, int8),
        _grouped,
        work,
        gradients=False,
    )


CASES = {"experts": _case(int8=False), "experts-int8": _case(int8=True)}
