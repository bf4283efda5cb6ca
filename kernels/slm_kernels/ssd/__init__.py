"""State-space duality: the recurrence of Mamba-2, computed by matrix products."""

import jax
from jax.sharding import PartitionSpec as P

from slm_kernels.dispatch import (
    KERNELS,
    check_shapes,
    per_shard,
    pick,
    platform,
    spec_of,
    whole_rows,
)
from slm_kernels.ssd.reference import ssd_reference
from slm_kernels.ssd.step import ssd_step
from slm_kernels.ssd.tpu import ssd_tpu
from slm_kernels.ssd.xla import ssd_xla

IMPLEMENTATIONS = {
    "reference": ssd_reference,
    "xla": ssd_xla,
    "tpu": ssd_tpu,
}


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    h0: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t;  y_t = h_t c_t + d x_t, one decay a head.

    Mamba-2 (arXiv 2405.21060, sections 3 and 6). State, decays and their sums are float32
    whatever the inputs are; with bfloat16 inputs the operands of matrix products are bfloat16.

    Args:
        x: `[B, L, H, P]` inputs of each head.
        dt: `[B, L, H]` step sizes, after softplus.
        a: `[H]` negative decay rates.
        b: `[B, L, G, N]` input projections; head h uses group h G // H.
        c: `[B, L, G, N]` output projections.
        d: `[H]` skip, or `None`.
        h0: `[B, H, P, N]` initial state, zeros by default; kept only if the first token does not
            reset.
        reset: `[B, L]` bool, true where a document begins: the state before it is dropped.
        implementation: `"reference"`, `"xla"`, `"tpu"`, or `None`: on a TPU `"tpu"` for more
            than one token, everywhere else `"xla"`.

    Returns:
        `y` `[B, L, H, P]` in the dtype of `x`, and the last state `[B, H, P, N]` float32.
        Gradients flow to every argument but `reset`, and from both results.

    Raises:
        ValueError: on shapes that do not fit, an unknown implementation, or a kernel asked to
            work on rows that are split along the sequence.
    """
    batch, length, heads, p = x.shape
    groups, n = b.shape[2:]
    if heads % groups:
        raise ValueError(f"x{x.shape}: {heads} heads are no multiple of the {groups} groups of b")
    want = {
        "dt": (dt, (batch, length, heads)),
        "a": (a, (heads,)),
        "b": (b, (batch, length, groups, n)),
        "c": (c, (batch, length, groups, n)),
        "d": (d, (heads,)),
        "h0": (h0, (batch, heads, p, n)),
        "reset": (reset, (batch, length)),
    }
    check_shapes(("x", x), want)
    on_tpu = platform() == "tpu" and length > 1
    name, run = pick("ssd", implementation, IMPLEMENTATIONS, "tpu" if on_tpu else "xla")
    arrays = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d, "h0": h0, "reset": reset}
    if name not in KERNELS:
        return run(**arrays)
    rows, _, split, _ = whole_rows(name, "x", x)
    split_groups = spec_of(b)[2]
    if split_groups != split and groups > 1:
        raise ValueError(
            f"implementation={name!r} needs a head and its group on one device, and {heads} heads "
            f"are split over {split}, {groups} groups over {split_groups}: split them alike, or "
            "use implementation='xla'"
        )
    by_head, by_group = P(rows, None, split, None), P(rows, None, split_groups, None)
    state, whole = P(rows, split, None, None), P(split)
    specs = {
        "x": by_head,
        "dt": P(rows, None, split),
        "a": whole,
        "b": by_group,
        "c": by_group,
        "d": whole,
        "h0": state,
        "reset": P(rows, None),
    }
    return per_shard(run, arrays, specs, (by_head, state))


__all__ = ["IMPLEMENTATIONS", "ssd", "ssd_step"]
