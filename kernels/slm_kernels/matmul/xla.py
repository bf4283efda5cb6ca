"""The product as XLA has it: int8 operands go to the matrix unit as they are."""

import jax
import jax.numpy as jnp


def int8_matmul_xla(
    x: jax.Array, w: jax.Array, *, w_scale: jax.Array, x_scale: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Arguments and result as in `slm_kernels.matmul.int8_matmul`."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    if x_scale is None:
        y = jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)
    else:
        # Asked for float32, XLA would convert the operands first.
        whole = jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.int32)
        y = whole.astype(jnp.float32) * x_scale[..., None]
    return (y * w_scale).astype(dtype)
