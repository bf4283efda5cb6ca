"""The specification: every matrix times every row, then the right one kept."""

import jax
import jax.numpy as jnp


def grouped_matmul_reference(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    w_scale: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Arguments and result as in `slm_kernels.experts.grouped_matmul`."""
    if w_scale is not None:
        w = w.astype(jnp.float32) * w_scale[:, None]
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    member = (rows < ends) & (rows >= ends - group_sizes)
    every = jnp.einsum("rk,gkn->rgn", x, w, precision="highest", preferred_element_type=out_dtype)
    return jnp.sum(jnp.where(member[:, :, None], every, 0), axis=1).astype(out_dtype)
