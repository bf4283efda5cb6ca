"""Grouped matrix product: rows sorted by expert, one matrix an expert."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_kernels.dispatch import KERNELS, per_shard, pick, platform, spec_of
from slm_kernels.experts.blocked import grouped_matmul_blocked
from slm_kernels.experts.reference import grouped_matmul_reference
from slm_kernels.experts.tpu import grouped_matmul_tpu
from slm_kernels.experts.xla import grouped_matmul_xla

IMPLEMENTATIONS = {
    "reference": grouped_matmul_reference,
    "xla": grouped_matmul_xla,
    "blocked": grouped_matmul_blocked,
    "tpu": grouped_matmul_tpu,
}


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    w_scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies each group of rows by its own matrix.

    Args:
        x: `[rows, K]`, rows of group 0 first.
        w: `[groups, K, N]`, of the dtype of `x`, or int8 with `w_scale`.
        group_sizes: `[groups]` int32; rows beyond their sum give zeros and get no gradient.
        w_scale: `[groups, N]` float32, one a column of int8 weights under floating-point rows.
        out_dtype: dtype of sums and result, int32 for int8 factors; default that of `x`.
        implementation: `"reference"`, `"xla"` (`jax.lax.ragged_dot`), `"blocked"` (padded
            blocks, for CPUs, where XLA multiplies every row by every matrix), `"tpu"`, or `None`:
            blocked on CPU, tpu there for int8 weights, else xla.

    Returns:
        `[rows, N]` in `out_dtype`.

    Raises:
        ValueError: on shapes that do not fit, an unknown implementation, or a kernel asked to
            work on split rows.
    """
    x, w, group_sizes = (jnp.asarray(a) for a in (x, w, group_sizes))
    w_scale = None if w_scale is None else jnp.asarray(w_scale)
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x{x.shape}, w{w.shape}: want x[rows, K] and w[groups, K, N]")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"group_sizes{group_sizes.shape}: want one size for {w.shape[0]} groups")
    if (w_scale is not None) != (w.dtype == jnp.int8 != x.dtype):
        raise ValueError(
            f"w_scale is {'missing' if w_scale is None else 'given'}, x is {x.dtype}, w {w.dtype}: "
            f"int8 weights of floating-point rows have a scale a column, nothing else has one"
        )
    if w_scale is not None and w_scale.shape != (w.shape[0], w.shape[2]):
        raise ValueError(f"w_scale{w_scale.shape}: want {(w.shape[0], w.shape[2])} with w{w.shape}")
    default = "blocked" if platform() == "cpu" else "xla"
    if platform() == "tpu" and w_scale is not None:
        default = "tpu"
    name, run = pick("grouped_matmul", implementation, IMPLEMENTATIONS, default)
    run = functools.partial(run, out_dtype=x.dtype if out_dtype is None else out_dtype)
    arrays = {"x": x, "w": w, "group_sizes": group_sizes, "w_scale": w_scale}
    if name not in KERNELS:
        return run(**arrays)
    *fixed, columns = spec_of(w)
    if any((*spec_of(x), *fixed)):
        raise ValueError(
            f"implementation={name!r} works on whole rows of one device, and x is split over "
            f"{spec_of(x)}, w over {spec_of(w)}: call it in a shard_map, or split only N"
        )
    specs = {
        "x": P(None, None),
        "w": P(None, None, columns),
        "group_sizes": P(None),
        "w_scale": P(None, columns),
    }
    return per_shard(run, arrays, specs, P(None, columns))


__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
