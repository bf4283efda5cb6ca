"""The grouped product that XLA has."""

import jax
import jax.numpy as jnp


def grouped_matmul_xla(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    w_scale: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Arguments and result as in `slm_kernels.experts.grouped_matmul`.

    int8 weights are written to memory in the type of `x` first.
    """
    y = jax.lax.ragged_dot(x, w.astype(x.dtype), group_sizes, preferred_element_type=out_dtype)
    if w_scale is None:
        return y
    rows = jnp.arange(x.shape[0])[:, None]
    group = jnp.sum(rows >= jnp.cumsum(group_sizes), axis=1)
    # Rows beyond the last group are zero whatever multiplies them.
    return (y * w_scale[jnp.minimum(group, w.shape[0] - 1)]).astype(out_dtype)
