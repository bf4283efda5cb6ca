"""Grouped matrix product: rows sorted by expert, one matrix an expert."""

import jax

from slm_kernels.dispatch import pick, platform
from slm_kernels.experts.blocked import grouped_matmul_blocked
from slm_kernels.experts.reference import grouped_matmul_reference


def _ragged(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, group_sizes)


IMPLEMENTATIONS = {
    "reference": grouped_matmul_reference,
    "xla": _ragged,
    "blocked": grouped_matmul_blocked,
}


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies each group of rows by its own matrix.

    Args:
        x: `[rows, K]`, rows of group 0 first.
        w: `[groups, K, N]`.
        group_sizes: `[groups]` int32; rows beyond their sum give zeros and get no gradient.
        implementation: `"reference"`, `"xla"` (`jax.lax.ragged_dot`), `"blocked"` (padded
            blocks, for CPUs, where XLA multiplies every row by every matrix), or `None`: blocked
            on CPU, else xla.

    Returns:
        `[rows, N]` in the dtype of `x`.

    Raises:
        ValueError: on shapes that do not fit or an unknown implementation.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x{x.shape}, w{w.shape}: want x[rows, K] and w[groups, K, N]")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"group_sizes{group_sizes.shape}: want one size for {w.shape[0]} groups")
    default = "blocked" if platform() == "cpu" else "xla"
    _, run = pick("grouped_matmul", implementation, IMPLEMENTATIONS, default)
    return run(x, w, group_sizes)


__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
