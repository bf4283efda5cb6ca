"""Grouped product as a batch of equal blocks: each group padded to whole blocks (MegaBlocks)."""

import math

import jax
import jax.numpy as jnp


def grouped_matmul_blocked(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    w_scale: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Arguments and result as in `slm_kernels.experts.grouped_matmul`.

    Every group is padded to whole blocks, so at most groups - 1 blocks are wasted and each block
    meets one matrix (the block-sparse idea of arXiv 2211.15841, section 5). Costs a copy of one
    matrix a block.
    """
    rows, groups = x.shape[0], w.shape[0]
    # About two blocks a group when balanced: less padding with small blocks, fewer copies of w
    # with large ones.
    block = 8 * math.ceil(max(rows // (2 * groups), 1) / 8)
    n_blocks = rows // block + groups
    blocks_of = (group_sizes + block - 1) // block
    first_block = jnp.cumsum(blocks_of) - blocks_of
    first_row = jnp.cumsum(group_sizes) - group_sizes

    block_group = jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(n_blocks), side="right")
    block_group = jnp.minimum(block_group, groups - 1)
    offset = (jnp.arange(n_blocks) - first_block[block_group]) * block
    within = offset[:, None] + jnp.arange(block)
    used = within < group_sizes[block_group][:, None]
    source = jnp.where(used, first_row[block_group][:, None] + within, rows)

    padded = x.at[source].get(mode="fill", fill_value=0)
    w = w[block_group].astype(x.dtype)
    y = jnp.einsum("brk,bkn->brn", padded, w, preferred_element_type=out_dtype)
    if w_scale is not None:
        y = (y * w_scale[block_group][:, None]).astype(out_dtype)
    # Back to the caller's rows; rows that no group owns keep their zeros.
    return jnp.zeros((rows, w.shape[2]), out_dtype).at[source].set(y, mode="drop")
