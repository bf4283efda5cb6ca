"""State-space duality on TPU: one Pallas Mosaic kernel forward, one backward (arXiv 2405.21060).

Inside a chunk of Q steps, of one head and its group's B and C, with H the state `[N, P]` before it:

    s_i  = sum of dt_k a for k <= i                                                  (1)
    y_i  = sum over j <= i of (C_i . B_j) exp(s_i - s_j) dt_j x_j                    (2)
           + exp(s_i) C_i H  + d x_i                                                 (3)
    H'   = exp(s_Q) H + sum_j exp(s_Q - s_j) dt_j B_j x_j^T                          (4)

A reset is a step whose decay underflows to 0. s is split as high + low, high in multiples of 1/256,
whose sums are exact, and |low| < 1/2, so that

    exp(s_i - s_j) dt_j = p_i exp(high_i - high_j) q_j,  p = exp(low), q = dt exp(-low)   (5)

is right to float32 however strong the decays before j are; p scales rows of y, q columns of (2).
Backwards, with G the adjoint of H', T_ji = (B_j . C_i) exp(high_i - high_j), j <= i, dy' = p dy,
x' = q x, v = exp(s_Q - s_j) without dt, and e = exp(high):

    Z_ji  = x'_j . dy'_i                                                             (6)
    dx'_j = sum_i T_ji dy'_i + v_j B_j G,     dx = q dx' + d dy                      (7)
    dS_ji = sum over heads of Z_ji exp(high_i - high_j)                              (8)
    dB_j  = sum_i dS_ji C_i + sum over heads of v_j G x'_j                           (9)
    dC_i  = sum_j dS_ji B_j + sum over heads of e_i H dy'_i                          (10)
    dH    = exp(s_Q) G + sum_i e_i C_i dy'_i^T                                       (11)
    d(dt_k a) = sum of Z_ji T_ji over j < k <= i                                     (12)
                + sum over i >= k of e_i dy'_i . C_i H  + sum over j < k of v_j x'_j . B_j G
                + exp(s_Q) <G, H>
    ddt_j = x_j . dx'_j exp(-low_j),  without the part of (12)                       (13)

The first sum of (12) is a product of Z T with a triangle of ones, masked and summed: differences of
sums of rows and columns would be shorter, and leave rounding errors where a strong decay leaves 0.

Layout: heads lie side by side on lanes, as in `[L, H P]`; 128 lanes are a tile of 128 / P heads,
which share every product with B or C; the state is `[N, H P]`.

           lanes   0 .. P-1   P .. 2P-1  |  ..        one tile: 2 heads of P = 64
    step 0         head 0     head 1     |  head 2 ..
    step 1         ..

s and its kin are rows `[H, Q]`; spread over a tile's lanes by broadcasting a head's row to P
sublanes and transposing.

Grid: batch x blocks of up to 4 chunks; all heads of a block, so that B and C pass through HBM once
and reads are contiguous. The state stays in VMEM. The backward pass walks the blocks in reverse and
recomputes the states of a block's chunks in VMEM from the one that the forward pass saved.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.ssd.decay import log2_decay
from slm_kernels.ssd.layout import LANES, Layout
from slm_kernels.ssd.tpu_backward import backward
from slm_kernels.ssd.tpu_forward import F32, forward

CHUNK = 128  # steps, Q: what the MXU of most TPUs is wide


def ssd_tpu(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    d: jax.Array | None,
    h0: jax.Array | None,
    reset: jax.Array | None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.ssd.ssd`; P is at most 128.

    Arrays are copied to be padded where L is no multiple of the chunk, P no power of two, or the
    heads of a group do not fill 128 lanes. `b` and `c` are cast to the dtype of `x`.

    Args:
        x: `[B, L, H, P]` float32 or bfloat16.
        dt: `[B, L, H]`.
        a: `[H]`.
        b: `[B, L, G, N]`.
        c: `[B, L, G, N]`.
        d: `[H]` or `None`.
        h0: `[B, H, P, N]` or `None`.
        reset: `[B, L]` bool or `None`.
        chunk: steps whose states are computed at once, a multiple of 8 up to 256.

    Returns:
        `y` `[B, L, H, P]` in the dtype of `x`, and the last state `[B, H, P, N]` float32.

    Raises:
        ValueError: if P, the chunk or a dtype is not as above.
    """
    _, length, heads, p = x.shape
    groups, n = b.shape[2:]
    if p > LANES:
        raise ValueError(f"x{x.shape}: heads of {p} channels, at most 128: use the 'xla' form")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}: cast it to float32 or bfloat16")
    if chunk <= 0 or chunk & 7 or chunk > 256:
        raise ValueError(f"chunk={chunk}: want a multiple of 8 from 8 to 256")
    lay = Layout.of(x, groups, n, chunk)
    if h0 is None:
        # Made from x, so that it is split over devices as x is.
        h0 = jnp.zeros_like(x[:, 0], F32)[..., None] * jnp.zeros((n,))
    if d is None:
        d = jnp.zeros((heads,), F32)
    skip = jnp.broadcast_to(d.astype(F32)[:, None], (heads, p))
    y, last = _ssd(
        lay,
        lay.lanes(x),
        lay.rows(dt.astype(F32)),
        lay.rows(log2_decay(dt, a, reset)),
        lay.projection(b.astype(x.dtype)),
        lay.projection(c.astype(x.dtype)),
        lay.heads(skip).reshape(1, lay.width),
        lay.state(h0.astype(F32)),
    )
    return lay.unlanes(y)[:, :length], lay.unstate(last)


# --- the differentiable function, on arrays in the layout of the kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(lay: Layout, *args: Any) -> tuple[jax.Array, jax.Array]:
    out = forward(lay, False, *args)
    return out["y"], out["last"]


def _ssd_fwd(lay: Layout, *args: Any) -> Any:
    out = forward(lay, True, *args)
    return (out["y"], out["last"]), (args[:-1], out["starts"])


def _ssd_bwd(lay: Layout, saved: Any, grads: Any) -> Any:
    args, starts = saved
    g = backward(lay, args, starts, *grads)
    return g["dx"], g["ddt"], g["dlog"], g["db"], g["dc"], g["dd"].sum(0), g["dh0"]


_ssd.defvjp(_ssd_fwd, _ssd_bwd)
