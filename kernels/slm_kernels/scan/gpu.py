"""Selective scan on Hopper GPUs: spans of a row side by side (arXiv 2312.00752).

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

Both recurrences are linear, so a row is cut into spans that run side by side: as many as give every
multiprocessor two blocks of threads. A first kernel scans each span from zero, and leaves what it
adds, H_k or E_k, and the sum of its steps, D_k; then a block of threads carries what comes into the
row through the spans before its own, or after it,

    h = exp(D_k A) h + H_k,   e = exp(D_k A) e + E_k                           (10), (11)

and scans its span again, with everything else. Where rows and channels are enough there is one span
and no first kernel.

                 span 0                span 1                span 2
              +------+------+------+------+------+------+------+------+
    128       | piece: 32  |      | ...  |      |      |      |      |      a block of threads
    channels  | steps      |      |      |      |      |      |      |      for each span
              +------+------+------+------+------+------+------+------+
              ^ starts: saved for the way back, at each piece

A thread has a channel: its N states stay in registers, and no sum of (3), (6), (7) or (9) crosses
a thread. Pieces come by TMA while the one before is worked on. On the way back a piece is replayed
from its start, the states of every fourth step (group) are kept in shared memory, and those of a
group in registers. (8) sums over threads: 64 rows of products go to shared memory and come back
as the tile of a matrix, whose columns are added.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.dispatch import on_hopper, platform
from slm_kernels.scan.decay import FOREVER, log2_rates
from slm_kernels.scan.gpu_backward import backward
from slm_kernels.scan.gpu_forward import (
    CHANNELS,
    F32,
    Layout,
    forward,
)

_BLOCKS = 2 * 132  # of threads, at least, where rows are long enough: two a multiprocessor
_STATES = (16, 32)


def refusal(u: jax.Array, dt: jax.Array, a: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, and what to do, or `None` if it can."""
    if a.shape[1] > max(_STATES):
        return f"a{a.shape}: {a.shape[1]} states a channel, at most 32: use implementation='xla'"
    for name, x in (("u", u), ("dt", dt)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}: cast it to float32 or bfloat16"
    return None


def selective_scan_gpu(
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    reset: jax.Array | None,
    initial_state: jax.Array | None,
    spans: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and result as in `slm_kernels.scan.selective_scan`; N is at most 32.

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
        spans: parts of a row that are scanned side by side, at most.

    Returns:
        `y` `[B, L, D]` in the dtype of `u`, and the last state `[B, D, N]` float32.

    Raises:
        ValueError: on another GPU than Hopper, more states or another dtype.
    """
    if platform() == "gpu" and not on_hopper():
        raise ValueError(
            "implementation='gpu' is for Hopper GPUs (H100, H200) and this is another: use "
            "implementation='xla'"
        )
    if reason := refusal(u, dt, a):
        raise ValueError(reason)
    batch, length, width = u.shape
    states = a.shape[1]
    n = next(n for n in _STATES if n >= states)
    blocks = -(-width // CHANNELS)
    pieces = -(-length // Layout(n, 1, 1).piece)
    wanted = spans or -(-_BLOCKS // (batch * blocks))
    per_span = -(-pieces // min(wanted, pieces))
    lay = Layout(n, -(-pieces // per_span), per_span)

    def pad(x: jax.Array, *to: int, value: float = 0.0) -> jax.Array:
        missing = [(0, new - old) for new, old in zip(to, x.shape, strict=True)]
        return jnp.pad(x, missing, constant_values=value) if any(map(any, missing)) else x

    steps, channels = lay.steps, blocks * CHANNELS
    if initial_state is None:
        # Made from u, so that it is split over devices as u is.
        initial_state = jnp.zeros_like(u[:, 0], F32)[:, :, None] * jnp.zeros_like(a, F32)
    y, last = _scan(
        lay,
        {
            "u": pad(u, batch, steps, channels),
            "dt": pad(dt, batch, steps, channels),
            # -1: endless steps times a rate of 0 are not a number.
            "a": pad(a.astype(F32).T, n, channels, value=-1.0),
            "b": pad(b.astype(F32), batch, steps, n),
            "c": pad(c.astype(F32), batch, steps, n),
            "d": pad(d.astype(F32), channels),
            "initial": pad(initial_state.astype(F32).swapaxes(1, 2), batch, n, channels),
            "reset": None if reset is None else pad(reset.astype(F32) * FOREVER, batch, steps),
        },
    )
    return y[:, :length, :width], last[:, :states, :width].swapaxes(1, 2)


# --- the differentiable function, on arrays of whole spans and blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(lay: Layout, args: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    out = forward(lay, False, _with_rates(args))
    return out["y"], out["last"]


def _scan_fwd(lay: Layout, args: dict[str, Any]) -> Any:
    out = forward(lay, True, _with_rates(args))
    return (out["y"], out["last"]), (args, out["starts"])


def _scan_bwd(lay: Layout, saved: Any, grads: Any) -> Any:
    args, starts = saved
    out = backward(lay, _with_rates(args), starts, *grads)
    none = None if args["reset"] is None else jnp.zeros_like(args["reset"])
    return ({k: none if k == "reset" else out[f"d{k}"] for k in args},)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _with_rates(args: dict[str, Any]) -> dict[str, Any]:
    return args | {"a2": log2_rates(args["a"], resets=args["reset"] is not None)}
