"""Linear recurrence with a diagonal decay: RG-LRU, minGRU and their like."""

import jax
from jax.sharding import PartitionSpec as P

from slm_kernels.dispatch import KERNELS, check_shapes, per_shard, pick, platform, whole_rows
from slm_kernels.recurrence.reference import linear_recurrence_reference
from slm_kernels.recurrence.step import recurrence_step
from slm_kernels.recurrence.tpu import linear_recurrence_tpu
from slm_kernels.recurrence.xla import linear_recurrence_xla

IMPLEMENTATIONS = {
    "reference": linear_recurrence_reference,
    "xla": linear_recurrence_xla,
    "tpu": linear_recurrence_tpu,
}


def linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    h0: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t h_{t-1} + b_t, channel by channel.

    The recurrence of RG-LRU (arXiv 2402.19427, eq. 4), minGRU and minLSTM (arXiv 2410.01201) and
    other mixers with a diagonal transition. The state is float32 whatever the inputs are.

    Args:
        a: `[B, L, D]` decays, of any sign and size.
        b: `[B, L, D]` inputs.
        h0: `[B, D]` initial state, zeros by default; kept only if the first token does not reset.
        reset: `[B, L]` bool, true where a document begins: the state before it is dropped.
        implementation: `"reference"`, `"xla"`, `"tpu"`, or `None`: on a TPU `"tpu"` for more
            than one token, everywhere else `"xla"`.

    Returns:
        `h` `[B, L, D]` in the dtype of `b`, and the last state `[B, D]` float32. Gradients flow to
        `a`, `b` and `h0`, and from both results.

    Raises:
        ValueError: on shapes that do not fit, an unknown implementation, or a kernel asked to
            work on rows that are split along the sequence.
    """
    batch, length, width = b.shape
    want = {
        "a": (a, (batch, length, width)),
        "h0": (h0, (batch, width)),
        "reset": (reset, (batch, length)),
    }
    check_shapes(("b", b), want)
    on_tpu = platform() == "tpu" and length > 1
    default = "tpu" if on_tpu else "xla"
    name, run = pick("linear_recurrence", implementation, IMPLEMENTATIONS, default)
    arrays = {"a": a, "b": b, "h0": h0, "reset": reset}
    if name not in KERNELS:
        return run(**arrays)
    rows, _, channels = whole_rows(name, "b", b)
    by_token, state = P(rows, None, channels), P(rows, channels)
    specs = {"a": by_token, "b": by_token, "h0": state, "reset": P(rows, None)}
    return per_shard(run, arrays, specs, (by_token, state))


__all__ = ["IMPLEMENTATIONS", "linear_recurrence", "recurrence_step"]
