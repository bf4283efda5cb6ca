"""Selective scan (Mamba-1) and the causal depthwise convolution before it."""

import jax
from jax.sharding import PartitionSpec as P

from slm_kernels.dispatch import (
    KERNELS,
    check_shapes,
    on_hopper,
    per_shard,
    pick,
    platform,
    whole_rows,
)
from slm_kernels.scan.conv import causal_conv1d
from slm_kernels.scan.gpu import refusal, selective_scan_gpu
from slm_kernels.scan.reference import selective_scan_reference
from slm_kernels.scan.tpu import selective_scan_tpu
from slm_kernels.scan.xla import selective_scan_xla

IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
    "tpu": selective_scan_tpu,
    "gpu": selective_scan_gpu,
}


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    reset: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t;  y_t = c_t h_t + d u_t  (arXiv 2312.00752, eq. 2).

    Zero-order hold for a, Euler for b, as the reference implementation does. State and decays are
    float32 whatever the inputs are.

    Args:
        u: `[B, L, D]` inputs.
        dt: `[B, L, D]` step sizes, after softplus.
        a: `[D, N]` negative decay rates.
        b: `[B, L, N]` input projections.
        c: `[B, L, N]` output projections.
        d: `[D]` skip.
        reset: `[B, L]` bool, true where a document begins: the state before it is dropped.
        initial_state: `[B, D, N]` float32, zeros by default; kept only if the first token does
            not reset.
        implementation: `"reference"`, `"xla"`, `"tpu"`, `"gpu"` (Hopper), or `None`: for more than
            one token `"tpu"` on a TPU and `"gpu"` on a Hopper GPU where it takes the arguments,
            else `"xla"`.

    Returns:
        `y` `[B, L, D]` in the dtype of `u`, and the last state `[B, D, N]` float32. Gradients
        flow to every argument and from the last state.

    Raises:
        ValueError: on shapes that do not fit or an unknown implementation.
    """
    batch, length, width = u.shape
    n = a.shape[1]
    want = {
        "dt": (dt, (batch, length, width)),
        "a": (a, (width, n)),
        "b": (b, (batch, length, n)),
        "c": (c, (batch, length, n)),
        "d": (d, (width,)),
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, width, n)),
    }
    check_shapes(("u", u), want)
    default = "xla"
    if length > 1:
        if platform() == "tpu":
            default = "tpu"
        elif on_hopper() and refusal(u, dt, a) is None:
            default = "gpu"
    name, run = pick("selective_scan", implementation, IMPLEMENTATIONS, default)
    arrays = {
        "u": u,
        "dt": dt,
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "reset": reset,
        "initial_state": initial_state,
    }
    if name not in KERNELS:
        return run(**arrays)
    rows, _, channels = whole_rows(name, "u", u)
    by_token, by_channel = P(rows, None, channels), P(channels)
    state = P(rows, channels, None)
    specs = {
        "u": by_token,
        "dt": by_token,
        "a": P(channels, None),
        "b": P(rows, None, None),
        "c": P(rows, None, None),
        "d": by_channel,
        "reset": P(rows, None),
        "initial_state": state,
    }
    return per_shard(run, arrays, specs, (by_token, state))


__all__ = ["IMPLEMENTATIONS", "causal_conv1d", "selective_scan"]
