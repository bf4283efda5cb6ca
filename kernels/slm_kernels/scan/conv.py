"""Causal depthwise convolution over time, a few taps wide."""

import jax
import jax.numpy as jnp


def causal_conv1d(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    segments: jax.Array | None = None,
    history: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = sum_k w[K-1-k] x_{t-k} + bias, one filter a channel.

    Args:
        x: `[B, L, D]`.
        w: `[K, D]`, the last tap meets the current token.
        bias: `[D]` or `None`.
        segments: `[B, L]` document ids: a tap never reaches into another document.
        history: `[B, K - 1, D]`, the inputs before `x` (zeros by default); with `segments` they
            belong to the first token's document.

    Returns:
        `[B, L, D]` and the last K - 1 inputs, history included.
    """
    taps, length = w.shape[0], x.shape[1]
    if history is None:
        extended = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    else:
        extended = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    if segments is not None:
        ids = jnp.concatenate([segments[:, :1]] * (taps - 1) + [segments], axis=1)
    y = x * w[-1].astype(x.dtype)
    for k in range(1, taps):
        start = taps - 1 - k
        term = extended[:, start : start + length] * w[-1 - k].astype(x.dtype)
        if segments is not None:
            term = jnp.where((ids[:, start : start + length] == segments)[..., None], term, 0)
        y = y + term
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y, extended[:, length:]
