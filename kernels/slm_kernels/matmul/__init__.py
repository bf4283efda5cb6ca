"""Products with int8 weights: of int8 rows, or of floating-point rows."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_kernels.dispatch import KERNELS, per_shard, pick, spec_of
from slm_kernels.matmul.quantise import quantise_rows
from slm_kernels.matmul.reference import int8_matmul_reference
from slm_kernels.matmul.tpu import int8_matmul_tpu
from slm_kernels.matmul.xla import int8_matmul_xla

IMPLEMENTATIONS = {
    "reference": int8_matmul_reference,
    "xla": int8_matmul_xla,
    "tpu": int8_matmul_tpu,
}

# Longest sum of products of two int8 (2^14 at most) that int32 holds.
_LONGEST = 2**17 - 1


def int8_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    w_scale: jax.Array,
    x_scale: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """(x_scale x) (w w_scale): an int8 x int8 product summed in int32, or x by int8 weights.

    With int8 rows the sum is exact and the scales multiply it once, row scale first (arXiv
    2208.07339, eq. 3); with floating-point rows the weights become that type on the way to the
    matrix unit, are never written so, and the sum is float32.

    Args:
        x: `[..., K]` int8 (see `quantise_rows`), bfloat16 or float32.
        w: `[K, N]` int8.
        w_scale: `[N]` float32, one a column.
        x_scale: `[...]` float32, one a row; given exactly if `x` is int8.
        dtype: of the result; default bfloat16 for int8 rows, else that of `x`.
        implementation: `"reference"`, `"xla"`, `"tpu"`, or `None`: `"xla"`.

    Returns:
        `[..., N]` in `dtype`.

    Raises:
        ValueError: on shapes or dtypes that do not fit, or a kernel asked to sum over devices. The
            TPU kernel has no gradient.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x{x.shape}, w{w.shape}: want x[..., K] and w[K, N]")
    if w.dtype != jnp.int8:
        raise ValueError(f"w is {w.dtype}: want int8 with w_scale, or jnp.matmul")
    if x.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}: want int8, bfloat16 or float32")
    if (x_scale is not None) != (x.dtype == jnp.int8):
        raise ValueError(
            f"x_scale is {'missing' if x_scale is None else 'given'} and x is {x.dtype}: int8 has "
            f"a scale a row, nothing else has one"
        )
    if x.dtype == jnp.int8 and w.shape[0] > _LONGEST:
        raise ValueError(f"x{x.shape}: int32 sums {_LONGEST} products at most: split K")
    for name, scale, shape in (
        ("w_scale", w_scale, w.shape[1:]),
        ("x_scale", x_scale, x.shape[:-1]),
    ):
        if scale is not None and scale.shape != shape:
            raise ValueError(f"{name}{scale.shape}: want {shape} to go with x{x.shape}, w{w.shape}")
    if dtype is None:
        dtype = jnp.dtype(jnp.bfloat16) if x.dtype == jnp.int8 else x.dtype
    # On a TPU too: XLA reads the weights as int8, as fast as the kernel, and may prefetch them.
    name, run = pick("int8_matmul", implementation, IMPLEMENTATIONS, default="xla")
    run = functools.partial(run, dtype=jnp.dtype(dtype))
    arrays = {"x": x, "w": w, "w_scale": w_scale, "x_scale": x_scale}
    if name not in KERNELS:
        return run(**arrays)
    *rows, inner = spec_of(x)
    w_inner, columns = spec_of(w)
    if inner is not None or w_inner is not None:
        raise ValueError(
            f"implementation={name!r} sums on one device, and K is split over {inner or w_inner}: "
            f"gather it, or use implementation='xla'"
        )
    specs = {"x": P(*rows, None), "w": P(None, columns), "w_scale": P(columns), "x_scale": P(*rows)}
    return per_shard(run, arrays, specs, P(*rows, columns))


__all__ = ["IMPLEMENTATIONS", "int8_matmul", "quantise_rows"]
