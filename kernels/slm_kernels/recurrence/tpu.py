"""Linear recurrence on TPU: one Pallas Mosaic kernel forward, one backward.

    h_t  = k_t a_t h_{t-1} + b_t,   k_t = 0 where a document begins, else 1       (1)

(RG-LRU, arXiv 2402.19427 eq. 4; minGRU, arXiv 2410.01201), and backwards in time, with g_t the
adjoint of h_t and e_t that of h_t through later steps alone:

    e_L  = gradient of the last state                                             (2)
    g_t  = e_t + dh_t,              e_{t-1} = k_t a_t g_t,   dh_0 = e_0           (3)
    da_t = k_t g_t h_{t-1},         db_t = g_t                                    (4)

Two operations an element forward and four backward against 12 and 20 bytes: the memory is the
bound, so every array passes through HBM once, and h_{t-1} in (4) is the saved output.

Layout: an `[L, D]` array lies in HBM in tiles of 8 steps x 128 channels (of bfloat16 too, in pairs
of steps), and read as `[L / 8, groups * 8, 128]` it is the same bytes,

             row 0 .. 7               8 .. 15                      8 (S-1) ..
    tile 0   steps of channels 0..    steps of channels 128..  ..  of channels 128 (S-1) ..
    tile 1   ...

of which one step of S <= 8 groups is a load of S rows, 8 rows apart: a full register.

Grid: batch x channel blocks x time chunks, the last in order. Up to 8,192 channels make one block,
so that its reads are contiguous; its parts of 8 groups are independent chains of operations. The
state stays in VMEM from chunk to chunk. Groups and tiles of a block that lie beyond the array are
not moved, and touch no others. The backward pass walks the chunks in reverse; for h_{t-1} at a
chunk's first step, the forward pass saves the state there.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.recurrence.tpu_kernels import F32, LANES, TILE, Layout, backward, forward

BLOCK = 64  # groups of channels in a grid step
ELEMENTS = 2**18  # of an array in a grid step: reads of 1 MB, long enough to hide what starts them


def linear_recurrence_tpu(
    a: jax.Array,
    b: jax.Array,
    *,
    h0: jax.Array | None,
    reset: jax.Array | None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.recurrence.linear_recurrence`.

    Arrays whose L is no multiple of 8 or whose D is none of 128 are copied to be padded.

    Args:
        a: `[B, L, D]` float32 or bfloat16.
        b: `[B, L, D]` float32 or bfloat16.
        h0: `[B, D]` float32 or `None`.
        reset: `[B, L]` bool or `None`.
        chunk: steps between saved states, a multiple of 8.

    Returns:
        `h` `[B, L, D]` in the dtype of `b`, and the last state `[B, D]` float32.

    Raises:
        ValueError: if a dtype or the chunk is not as above.
    """
    batch, length, width = b.shape
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {x.dtype}: cast it to float32 or bfloat16")
    groups = -(-width // LANES)
    blocks = -(-groups // BLOCK)
    per_block = -(-groups // blocks)
    if chunk is None:
        chunk = 2 ** min(10, int(math.log2(ELEMENTS // (per_block * LANES))))
    if chunk <= 0 or chunk & 7:
        raise ValueError(f"chunk={chunk}: want a positive multiple of 8")
    steps = length + -length % TILE
    lay = Layout(steps, min(chunk, steps), groups, per_block)
    if h0 is None:
        # Made from b, so that it is split over devices as b is.
        h0 = jnp.zeros_like(b[:, 0], F32)
    flags = None
    if reset is not None:
        flags = jnp.pad(reset.astype(jnp.bfloat16), ((0, 0), (0, lay.chunks * lay.chunk - length)))
        flags = jnp.pad(flags.reshape(batch, -1, 1, lay.chunk), ((0, 0), (0, 0), (0, 15), (0, 0)))
    h, last = _recurrence(lay, lay.tiles(a, 1), lay.tiles(b, 0), lay.state(h0.astype(F32)), flags)
    return lay.untile(h)[:, :length, :width], last.reshape(batch, -1)[:, :width]


# --- the differentiable function, on arrays in the layout of the kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(lay: Layout, a: Any, b: Any, h0: Any, flags: Any) -> tuple[jax.Array, jax.Array]:
    out = forward(lay, False, a, b, h0, flags)
    return out["h"], out["last"]


def _recurrence_fwd(lay: Layout, a: Any, b: Any, h0: Any, flags: Any) -> Any:
    out = forward(lay, True, a, b, h0, flags)
    return (out["h"], out["last"]), (a, out["h"], out["starts"], flags)


def _recurrence_bwd(lay: Layout, saved: Any, grads: Any) -> Any:
    g = backward(lay, *saved, *grads)
    flags = saved[3]
    return g["da"], g["db"], g["dh0"], None if flags is None else jnp.zeros_like(flags)


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)
