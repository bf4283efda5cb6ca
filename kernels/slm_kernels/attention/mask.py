"""The one definition of who sees whom."""

import jax


def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """Whether query s sees key t: `[B or 1, S, T]` bool. Arguments as in `attention`."""
    q, k = q_positions[:, :, None], kv_positions[:, None, :]
    mask = k >= 0
    if causal:
        mask = mask & (k <= q)
    if window is not None:
        mask = mask & (q - k < window)
        if not causal:
            mask = mask & (k - q < window)
    if q_segments is not None and kv_segments is not None:
        mask = mask & (q_segments[:, :, None] == kv_segments[:, None, :])
    return mask
