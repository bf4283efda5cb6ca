"""The specification: the integer product, then the scales."""

import jax
import jax.numpy as jnp


def int8_matmul_reference(
    x: jax.Array, w: jax.Array, *, w_scale: jax.Array, x_scale: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Arguments and result as in `slm_kernels.matmul.int8_matmul`."""
    f32 = jnp.float32
    if x_scale is None:
        y = jnp.matmul(x.astype(f32), w.astype(f32), precision="highest")
    else:
        whole = jnp.einsum("...k,kn->...n", x.astype(jnp.int32), w.astype(jnp.int32))
        y = whole.astype(f32) * x_scale[..., None]
    return (y * w_scale).astype(dtype)
