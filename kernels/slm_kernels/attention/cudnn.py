"""Attention by cuDNN's fused kernels, forward and backward, on NVIDIA GPUs since Ampere."""

import jax


def attention_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    causal: bool,
    in_order: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Causal attention of tokens in order; arguments and result as in `attention`.

    Raises:
        ValueError: if positions are not in order, or with documents or a soft-cap.
    """
    del q_positions, kv_positions  # positions are indices
    instead = "use implementation='xla', on Hopper 'gpu'"
    if not (causal and in_order):
        raise ValueError(
            f"implementation='cudnn' wants causal=True and in_order=True, got {causal} and "
            f"{in_order}: {instead}"
        )
    if q_segments is not None or kv_segments is not None:
        raise ValueError(f"q_segments: implementation='cudnn' knows no documents: {instead}")
    if softcap is not None:
        raise ValueError(f"softcap={softcap}: implementation='cudnn' has no soft-cap: {instead}")
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
