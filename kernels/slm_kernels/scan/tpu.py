"""Selective scan on TPU: one Pallas Mosaic kernel forward, one backward (arXiv 2312.00752).

    a_t  = exp(dt_t A), 0 where a document begins                              (1)
    h_t  = a_t h_{t-1} + dt_t u_t b_t                                          (2)
    y_t  = sum_n c_t[n] h_t[n] + d u_t                                         (3)

and backwards in time, with g_t the adjoint of h_t and e_t that of h_t through later steps alone:

    g_t  = e_t + c_t dy_t,   e_{t-1} = a_t g_t,   e_L = gradient of the last state   (4)
    q_t  = a_t g_t h_{t-1}                  the adjoint of dt_t A                    (5)
    s_t  = sum_n b_t[n] g_t[n]              the adjoint of dt_t u_t                  (6)
    du_t = dt_t s_t + d dy_t,   ddt_t = u_t s_t + sum_n A[n] q_t[n]                  (7)
    db_t = sum_D dt_t u_t g_t,  dc_t  = sum_D dy_t h_t                               (8)
    dA   = sum_t dt_t q_t,      dd    = sum_t dy_t u_t                               (9)

Layout: a vector register holds one state of S <= 8 groups of 128 channels at one step, so that
(2) and (3) are elementwise and no sum crosses a register. Nothing moves for it in HBM: an
`[L, D]` array lies there in tiles of 8 steps x 128 channels, bfloat16 too, and read as
`[L / tile, blocks, S * tile, 128]` it is the same bytes,

             row 0 .. tile-1          tile .. 2 tile-1             (S-1) tile ..
    tile 0   steps of channels 0..    steps of channels 128..  ..  of channels (S-1) 128..
    tile 1   ...

of which one step is a load of S rows, `tile` rows apart. b_t[n] and c_t[n] must fill a register:
a product with a 0/1 matrix on the MXU spreads them over the lanes, exactly (three bfloat16 parts
make up a float32), once a time chunk for all channels. (8) sums over sublanes by storing
registers and loading them back with a stride, over lanes by rotations.

Grid: batch x time chunks. A grid step holds all channels, so that its copies are contiguous, and
walks along their blocks of 1,024. The state stays in VMEM from chunk to chunk. The backward pass
walks the chunks in reverse and recomputes a chunk's states in VMEM from the one saved at its
start; nothing of size L x N x D reaches HBM.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels import block_sizes
from slm_kernels.scan.tpu_backward import backward
from slm_kernels.scan.tpu_forward import F32, LANES, TILE, Layout, forward

CHUNK = 128  # steps a grid step: HBM reads are long enough, the states of a chunk fit in VMEM
STEP = 16  # of which a chunk is a multiple
FORWARD_UNROLL = 32  # steps in a loop's body: the more, the better the chip's units are filled
BACKWARD_UNROLL = 8  # twice as many would spill registers
ELEMENTS = 2**19  # of an array in a grid step: more would not leave room in VMEM for the others


def selective_scan_tpu(
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    reset: jax.Array | None,
    initial_state: jax.Array | None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.scan.selective_scan`; N is at most 256.

    With `reset`, a positive rate in `a` (outside the contract) gives inf or NaN there.

    Args:
        u: `[B, L, D]` float32 or bfloat16.
        dt: `[B, L, D]` float32 or bfloat16.
        a: `[D, N]`.
        b: `[B, L, N]`.
        c: `[B, L, N]`.
        d: `[D]`.
        reset: `[B, L]` bool or `None`.
        initial_state: `[B, D, N]` float32 or `None`.
        chunk: steps between saved states: a multiple of 16, or 8.

    Returns:
        `y` `[B, L, D]` in the dtype of `u`, and the last state `[B, D, N]` float32.

    Raises:
        ValueError: if N, the chunk or a dtype is not as above.
    """
    batch, length, width = u.shape
    n = a.shape[1]
    if n > 256:
        raise ValueError(f"a{a.shape}: {n} states a channel, at most 256: use the 'xla' scan")
    for name, x in (("u", u), ("dt", dt)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {x.dtype}: cast it to float32 or bfloat16")
    known = block_sizes.lookup("selective_scan_forward", u.dtype, L=length, D=width, N=n)
    if chunk is None and known:
        chunk = min(known["chunk"], length + -length % STEP)
    elif chunk is None:
        chunk = CHUNK if n <= 64 else CHUNK // 2
        while chunk > STEP and chunk * width > ELEMENTS:
            chunk //= 2
        chunk = min(chunk, length + -length % STEP)
    if chunk != TILE and (chunk <= 0 or chunk % STEP):
        raise ValueError(f"chunk={chunk}: want {TILE} or a positive multiple of {STEP}")
    groups = -(-width // LANES)
    blocks = -(-groups // 8)
    rows = -(-groups // blocks)
    lay = Layout(chunk, blocks, rows, n + -n % 8, known.get("unroll", FORWARD_UNROLL))
    back = block_sizes.lookup("selective_scan_backward", u.dtype, L=length, D=width, N=n)
    both = lay, dataclasses.replace(lay, most=back.get("unroll", BACKWARD_UNROLL))
    if initial_state is None:
        # Made from u, so that it is split over devices as u is.
        initial_state = jnp.zeros_like(u[:, 0], F32)[:, :, None] * jnp.zeros_like(a, F32)
    steps = None
    if reset is not None:
        flags = jnp.pad(reset.astype(jnp.bfloat16), ((0, 0), (0, -length % chunk)))
        steps = jnp.pad(flags.reshape(batch, -1, 1, chunk), ((0, 0), (0, 0), (0, 15), (0, 0)))
    y, last = _scan(
        both,
        lay.tiles(u),
        lay.tiles(dt),
        lay.states(a.astype(F32)),
        lay.projection(b),
        lay.projection(c),
        lay.states(d.astype(F32)[:, None], 1)[..., 0, :, :],
        steps,
        lay.states(initial_state.astype(F32)),
    )
    return lay.untile(y)[:, :length, :width], lay.unstates(last)[:, :width, :n]


# --- the differentiable function, on arrays in the layout of the kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(both: tuple[Layout, Layout], *args: Any) -> tuple[jax.Array, jax.Array]:
    out = forward(both[0], False, *args)
    return out["y"], out["last"]


def _scan_fwd(both: tuple[Layout, Layout], *args: Any) -> Any:
    out = forward(both[0], True, *args)
    return (out["y"], out["last"]), (args[:-1], out["starts"])


def _scan_bwd(both: tuple[Layout, Layout], saved: Any, grads: Any) -> Any:
    args, starts = saved
    _, _, _, b, c, _, reset = args
    g = backward(both[1], args, starts, *grads)
    return (
        g["du"],
        g["ddt"],
        g["da"].sum(0),
        g["db"].astype(b.dtype),
        g["dc"].astype(c.dtype),
        g["dd"].sum(0),
        None if reset is None else jnp.zeros_like(reset),
        g["dinitial"],
    )


_scan.defvjp(_scan_fwd, _scan_bwd)
