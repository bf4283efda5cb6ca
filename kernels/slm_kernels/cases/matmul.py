"""Uses of products with int8 weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes
from slm_kernels.matmul import int8_matmul

# M rows by w [K, N]. An int8 product may run at twice the bf16 peak that shares refer to.


def _arguments(s: Shape, int8: bool) -> Arguments:
    args = {
        "x": array(s["M"], s["K"], dtype=jnp.int8 if int8 else jnp.bfloat16),
        "w": array(s["K"], s["N"], dtype=jnp.int8),
        "w_scale": array(s["N"], dtype=jnp.float32),
    }
    return args | ({"x_scale": array(s["M"], dtype=jnp.float32)} if int8 else {})


def _matmul(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: int8_matmul(**args, implementation=implementation)


def _case(int8: bool) -> Case:
    def work(s: Shape, backward: bool) -> Work:
        moved = nbytes(_arguments(s, int8)) + nbytes({"y": array(s["M"], s["N"])})
        return Work(flops=2 * s["M"] * s["K"] * s["N"], bytes=moved)

    return Case(
        {"M": 16, "K": 4096, "N": 4096},
        {"K": 1024, "N": 512},
        lambda s: _arguments(s, int8),
        _matmul,
        work,
        gradients=False,
    )


CASES = {"int8-matmul": _case(int8=True), "int8-weights": _case(int8=False)}
