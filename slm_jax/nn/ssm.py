"""Selective state-space mixer, Mamba-1 (arXiv 2312.00752), and its recurrent state."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from slm_kernels.scan import causal_conv1d, selective_scan

from slm_jax.errors import UserError
from slm_jax.nn.linear import Linear
from slm_jax.nn.module import parameter
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.parallel.rules import MeshAxes, lead_spec, split_as
from slm_jax.parallel.sequence import carry_in, halo, on_parts

# Range of the initial step sizes and their floor (section 3.6 and the reference code).
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4

SCAN_FLOPS_PER_STATE = 7
"""Operations of the selective scan on one state value: dt a, exp, decay h, (dt u) b, their sum,
c h, and adding that up. It is the sequential recurrence of `slm_kernels.scan`, whatever kernel
runs; the 9 often quoted (state-spaces/mamba issue 110) are those of a parallel prefix scan."""

SCAN_FLOPS_PER_CHANNEL = 3
"""And on one channel: dt u, d u, and adding the skip."""


@dataclass(frozen=True)
class MambaConfig:
    """Selective scan between a short causal convolution and a gate."""

    d_inner: int
    """Channels of the scan, usually 2 x d_model."""
    d_state: int = 16
    """State values a channel."""
    d_conv: int = 4
    """Taps of the convolution."""
    dt_rank: int | None = None
    """Rank of the step-size projection; `None` is ceil(d_model / 16)."""
    inner_norms: bool = False
    """RMSNorm on dt, B and C (Jamba)."""
    conv_bias: bool = True
    """Bias of the convolution."""
    proj_bias: bool = False
    """Biases on the input and output projections."""

    def __post_init__(self) -> None:
        for name in ("d_inner", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def out_fan_in(self) -> int:
        """Inputs of the output projection."""
        return self.d_inner

    def flops(self, d_model: int, seq_len: int, causal: bool) -> dict[str, float]:
        """Forward operations a token by part of `FlopBreakdown`; the same at any length."""
        rank = self.resolved_dt_rank(d_model)
        selection = self.d_inner * (rank + 2 * self.d_state) + rank * self.d_inner
        per_channel = 2 * self.d_conv + SCAN_FLOPS_PER_STATE * self.d_state + SCAN_FLOPS_PER_CHANNEL
        return {
            "recurrent_projections": 2 * (3 * d_model * self.d_inner + selection),
            "recurrence": per_channel * self.d_inner,
        }

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Convolution inputs and float32 state of one row, whatever its length.

        Beside keys and values of one byte the inputs are float32.
        """
        inputs = 4 if itemsize == 1 else itemsize
        return self.d_inner * ((self.d_conv - 1) * inputs + 4 * self.d_state)

    def resolved_dt_rank(self, d_model: int) -> int:
        """`dt_rank`, or its default for this width."""
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank


class MambaState(NamedTuple):
    """What a row remembers.

    Attributes:
        conv: `[B, d_conv - 1, d_inner]`, the last inputs of the convolution, before it.
        ssm: `[B, d_inner, d_state]` float32.
    """

    conv: jax.Array
    ssm: jax.Array


class Mamba(nnx.Module):
    """`mixer(x, positions, segments, state) -> (y, state)` by a selective scan."""

    def __init__(
        self,
        config: MambaConfig,
        d_model: int,
        norm: NormConfig,
        *,
        key: jax.Array,
        out_std: float,
    ) -> None:
        c = config
        rank = c.resolved_dt_rank(d_model)
        sizes = {
            "embed": d_model,
            "inner": c.d_inner,
            "dt_rank": rank,
            "dt_b_c": rank + 2 * c.d_state,
        }
        k_x, k_z, k_conv, k_sel, k_dt, k_bias, k_out = jax.random.split(key, 7)
        self.config = c
        self.in_x = Linear("embed -> inner", sizes, key=k_x, bias=c.proj_bias)
        self.in_z = Linear("embed -> inner", sizes, key=k_z, bias=c.proj_bias)
        bound = c.d_conv**-0.5
        uniform = jax.random.uniform(k_conv, (c.d_conv, c.d_inner), minval=-bound, maxval=bound)
        self.conv_w = parameter(uniform, ("conv", "inner"), decay=False)
        self.conv_b = (
            parameter(jnp.zeros(c.d_inner), ("inner",), decay=False) if c.conv_bias else None
        )
        self.select = Linear("inner -> dt_b_c", sizes, key=k_sel)
        self.dt = Linear("dt_rank -> inner", sizes, key=k_dt)
        # Uniform, not normal; and steps log-uniform in [1e-3, 1e-1] through softplus's inverse.
        bound = rank**-0.5
        self.dt.w = parameter(
            jax.random.uniform(k_dt, (rank, c.d_inner), minval=-bound, maxval=bound),
            ("dt_rank", "inner"),
            matrix=(1, 1),
        )
        log_step = jax.random.uniform(
            k_bias, (c.d_inner,), minval=math.log(_DT_MIN), maxval=math.log(_DT_MAX)
        )
        step = jnp.maximum(jnp.exp(log_step), _DT_FLOOR)
        self.dt_bias = parameter(step + jnp.log(-jnp.expm1(-step)), ("inner",), decay=False)
        a = jnp.broadcast_to(jnp.arange(1, c.d_state + 1.0), (c.d_inner, c.d_state))
        self.a_log = parameter(jnp.log(a), ("inner", "state"), decay=False)
        self.d = parameter(jnp.ones(c.d_inner), ("inner",), decay=False)
        self.out = Linear("inner -> embed", sizes, key=k_out, bias=c.proj_bias, std=out_std)
        rms = NormConfig(eps=norm.eps)
        widths = (rank, c.d_state, c.d_state)
        self.norms = nnx.List([Norm(rms, n) for n in widths]) if c.inner_norms else None

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> MambaState:
        """The state before the first token; its size does not depend on `max_len`.

        int8 is for keys and values: the convolution's inputs are then float32.
        """
        c = self.config
        dtype = jnp.dtype(jnp.float32 if dtype == jnp.int8 else dtype)
        return MambaState(
            jnp.zeros((batch, c.d_conv - 1, c.d_inner), dtype),
            jnp.zeros((batch, c.d_inner, c.d_state), jnp.float32),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array | None,
        state: MambaState | None = None,
    ) -> tuple[jax.Array, MambaState | None]:
        """Mixes tokens.

        Args:
            x: `[B, S, embed]`.
            positions: not used: the recurrence orders the tokens.
            segments: `[B, S]` int32, 0 = padding; the state restarts where the id changes.
                With a state a row is one document, continued from it.
            state: state to continue from, or `None` in training.

        Returns:
            `[B, S, embed]` and the state after the last token (`None` without one).
        """
        c = self.config
        u, z = self.in_x(x), self.in_z(x)
        if state is not None:
            state = MambaState(
                split_as(state.conv, u, (0, None, 2)), split_as(state.ssm, u, (0, 2, None))
            )
        real = None if segments is None else (segments > 0)[..., None]
        if real is not None:  # before and after the convolution, so that padding leaves no trace
            u = jnp.where(real, u, 0)
        documents = segments if state is None else None
        conv_b = None if self.conv_b is None else self.conv_b[...]
        seq = lead_spec(u, 2)[1]
        if seq is None:
            history = None if state is None else state.conv
            u, conv = causal_conv1d(
                u, self.conv_w[...], conv_b, segments=documents, history=history
            )
        else:
            given = {"x": u, "w": self.conv_w[...], "bias": conv_b, "segments": documents}
            u = on_parts(partial(_conv_part, seq), given, like="x")
        u = jax.nn.silu(u)
        if real is not None:
            u = jnp.where(real, u, 0)
        rank = c.resolved_dt_rank(x.shape[-1])
        dt, b, cc = jnp.split(self.select(u), [rank, rank + c.d_state], axis=-1)
        if self.norms is not None:
            dt, b, cc = (norm(a) for norm, a in zip(self.norms, (dt, b, cc), strict=True))
        dt = jax.nn.softplus(self.dt(dt).astype(jnp.float32) + self.dt_bias[...])
        a = -jnp.exp(self.a_log[...])
        if seq is None:
            y, ssm = selective_scan(
                u,
                dt,
                a,
                b,
                cc,
                self.d[...],
                reset=None if documents is None else _begins(documents, documents[:, :1]),
                initial_state=None if state is None else state.ssm,
            )
        else:
            given = {"u": u, "dt": dt, "a": a, "b": b, "c": cc, "d": self.d[...]}
            y = on_parts(partial(_scan_part, seq), given | {"segments": documents}, like="u")
        y = self.out(y * jax.nn.silu(z))
        return y, None if state is None else MambaState(conv.astype(state.conv.dtype), ssm)


def _begins(segments: jax.Array, before: jax.Array) -> jax.Array:
    """Where a document begins: `[B, S]` bool, from ids and those of the token before, `[B, 1]`."""
    return segments != jnp.concatenate([before, segments[:, :-1]], axis=1)


def _conv_part(
    seq: MeshAxes,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    segments: jax.Array | None,
) -> jax.Array:
    """The convolution over one device's part of a row, which reaches into the part before it."""
    taps = w.shape[0]
    if x.shape[1] < taps - 1:
        raise UserError(
            f"d_conv={taps} reaches over more than the {x.shape[1]} tokens of a row that each "
            "device has: split rows over fewer devices (mesh.sequence)"
        )
    history = halo(x, taps - 1, seq)
    if segments is not None:  # what is of another document than the first token is not seen
        same = halo(segments, taps - 1, seq) == segments[:, :1]
        history = jnp.where(same[..., None], history, 0)
    return causal_conv1d(x, w, bias, segments=segments, history=history)[0]


def _scan_part(
    seq: MeshAxes,
    u: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """The scan over one device's part of a row, which goes on from the part before it.

    Twice: once from zero, which gives what the part adds to the state, and once from the state
    that the parts before it have left. The scan is a small part of the layer; to wait for the
    part before would take as long as there are parts.
    """
    reset = None if segments is None else _begins(segments, halo(segments, 1, seq))
    _, added = selective_scan(u, dt, a, b, c, d, reset=reset)
    decay = jnp.exp(jnp.sum(dt, axis=1)[..., None] * a)
    if reset is not None:
        decay = jnp.where(jnp.any(reset, axis=1)[:, None, None], 0.0, decay)
    before = carry_in(decay, added, seq)
    return selective_scan(u, dt, a, b, c, d, reset=reset, initial_state=before)[0]
