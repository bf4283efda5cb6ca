"""Products with int8 weights on TPU: weights are read once a block of rows, as int8.

    y[m, n] = xscale[m] wscale[n] sum_k x[m, k] w[k, n]                                         (1)

    grid (rows / bm, columns / bn, K / bk)      the last axis in order, summed in VMEM
    x [bm, bk]      w [bk, bn] int8      y, sum [bm, bn]      scales, rows: [1, bm], [1, bn]

int8 rows: the sum is int32, exact. Floating-point rows: w becomes their type in VMEM. Both scales
multiply the finished sum. A block of K divides K, so that no sum meets numbers beyond the array;
blocks of rows and columns may stand out, and what they compute there is not written.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.attention.tpu_tiles import LANES, shape_like, varying, vmem_limit
from slm_kernels.pallas import interpret

_ROWS = 512
_INNER = 2048  # of K
_WEIGHTS = 2**21  # of a block of w, bytes

Blocks = tuple[int, int, int]


def blocks_of(rows: int, inner: int, columns: int) -> Blocks:
    """bm, bn and bk: w in blocks of about 2 MiB, K whole where no multiple of 128 divides it."""
    bm = rows if rows <= _ROWS else _ROWS
    bk = inner
    if inner > _INNER and inner % LANES == 0:
        bk = max(k for k in range(LANES, _INNER + 1, LANES) if inner % k == 0)
    widest = max(LANES, _WEIGHTS // bk // LANES * LANES)
    return bm, columns if columns <= widest else widest, bk


def int8_matmul_tpu(
    x: jax.Array,
    w: jax.Array,
    *,
    w_scale: jax.Array,
    x_scale: jax.Array | None,
    dtype: jnp.dtype,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Arguments and result as in `slm_kernels.matmul.int8_matmul`.

    Args:
        x: `[..., K]`.
        w: `[K, N]` int8.
        w_scale: `[N]`.
        x_scale: `[...]` or `None`.
        dtype: of the result.
        blocks: bm, bn and bk; `None` chooses.

    Raises:
        ValueError: if bk does not divide K, or on differentiation.
    """
    inner, columns = w.shape
    rows = x.size // inner
    blocks = blocks_of(rows, inner, columns) if blocks is None else blocks
    if inner % blocks[2]:
        raise ValueError(f"bk={blocks[2]} does not divide K={inner}: choose a divisor")
    f32 = jnp.float32
    row_scale = None if x_scale is None else x_scale.astype(f32).reshape(1, rows)
    arrays = varying(x.reshape(rows, inner), w, w_scale.astype(f32)[None], row_scale)
    return _product(blocks, dtype, *arrays).reshape(*x.shape[:-1], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    blocks: Blocks, dtype: jnp.dtype, x: Any, w: Any, w_scale: Any, x_scale: Any
) -> jax.Array:
    """(1) for `x` `[M, K]`, `w_scale` `[1, N]` and `x_scale` `[1, M]` or `None`."""
    (rows, inner), columns = x.shape, w.shape[1]
    bm, bn, bk = blocks
    moved = [x, w, w_scale, *([] if x_scale is None else [x_scale])]
    written = rows * columns * dtype.itemsize
    return pl.pallas_call(
        _kernel,
        out_shape=shape_like((rows, columns), dtype, x),
        grid=(-(-rows // bm), -(-columns // bn), inner // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda m, n, k: (m, k)),
            pl.BlockSpec((bk, bn), lambda m, n, k: (k, n)),
            pl.BlockSpec((1, bn), lambda m, n, k: (0, n)),
            None if x_scale is None else pl.BlockSpec((1, bm), lambda m, n, k: (0, m)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=[
            pltpu.VMEM((bm, bn), jnp.float32 if x_scale is None else jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved) + written,
        ),
        interpret=interpret(),
        name="int8_matmul",
    )(x, w, w_scale, x_scale)


def _no_gradient(*_: Any) -> Any:
    raise ValueError(
        "implementation='tpu' of int8_matmul has no gradient: use implementation='xla', which has "
        "one to floating-point x and to the scales"
    )


_product.defvjp(_no_gradient, _no_gradient)


def _kernel(
    x_ref: Any, w_ref: Any, w_scale_ref: Any, x_scale_ref: Any, y_ref: Any, sum_ref: Any
) -> None:
    k, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(k == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = x_ref[...]
    w = w_ref[...].astype(x.dtype)
    sum_ref[...] += jax.lax.dot_general(
        x,
        w,
        (((1,), (0,)), ((), ())),
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=sum_ref.dtype,
    )

    @pl.when(k == last)
    def _end() -> None:
        y = sum_ref[...].astype(jnp.float32)
        if x_scale_ref is not None:
            # The row of scales as a column: each row of the diagonal has one number to sum.
            shape = (y.shape[0], y.shape[0])
            own = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(
                jnp.int32, shape, 1
            )
            y = y * jnp.sum(jnp.where(own, x_scale_ref[...], 0), axis=1, keepdims=True)
        y_ref[...] = (y * w_scale_ref[...]).astype(y_ref.dtype)
