"""Rounding that can be trained: learned step size quantisation (LSQ, arXiv 1902.08153).

The forward pass sees the numbers that codes stand for, and nothing else. Backwards, rounding is
taken for the identity (straight through), and the step of the grid has a gradient of its own.

A weight is `[..., *in, *out]` here, as in `Linear`; its step sizes are `[..., *out, groups]`, one
for so many inputs of an output, as in `Coded`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_jax.compress.codes import group_size, in_steps, nearest_integer, round_tokens, scale_dtype
from slm_jax.compress.spec import QuantSpec
from slm_jax.parallel.rules import has_mesh, lead_spec


class Groups(NamedTuple):
    """Which weights share a step size.

    Attributes:
        in_shape: sizes of the input axes.
        n_out: number of output axes, the last ones.
        size: inputs that share one; the last group may be smaller.
    """

    in_shape: tuple[int, ...]
    n_out: int
    size: int

    @property
    def n_in(self) -> int:
        """Inputs of an output."""
        return math.prod(self.in_shape)

    @property
    def sizes(self) -> list[int]:
        """Inputs of each group."""
        return [min(self.size, self.n_in - i) for i in range(0, self.n_in, self.size)]


def groups_of(shape: tuple[int, ...], n_in: int, n_out: int, spec: QuantSpec) -> Groups:
    """The groups of a weight of this shape, which may be stacked, in a format.

    Args:
        shape: `[..., *in, *out]`.
        n_in: number of input axes.
        n_out: number of output axes.
        spec: the format.
    """
    first = len(shape) - n_in - n_out
    in_shape = tuple(shape[first : first + n_in])
    return Groups(in_shape, n_out, group_size(math.prod(in_shape), spec))


def first_step(w: jax.Array, groups: Groups, top: int) -> jax.Array:
    """The step size to begin with: 2 mean|w| / sqrt(top) (section 2.1 of the paper), or less.

    Not more than max|w| / top, which cuts nothing off: at 8 bits the paper's is many times that,
    and a model that is trained already would lose what a long training has to bring back. Where
    all weights of a group are zero, that of weights of standard deviation 1/sqrt(inputs).

    Args:
        w: `[..., *in, *out]`.
        groups: what shares a step.
        top: the largest code.

    Returns:
        `[..., *out, groups]` float32, positive.
    """
    size = jnp.abs(w.astype(jnp.float32))
    mean = _sums(size, groups) / jnp.asarray(groups.sizes, jnp.float32)
    usual = math.sqrt(2 / math.pi / groups.n_in)
    paper = 2 * jnp.where(mean > 0, mean, usual) / math.sqrt(top)
    largest = _largest(size, groups) / top
    return jnp.where(largest > 0, jnp.minimum(paper, largest), paper)


def rounded_weight(
    w: jax.Array, step: jax.Array, groups: Groups, spec: QuantSpec, top: jax.typing.ArrayLike
) -> jax.Array:
    """A weight as its codes stand for it, with the gradients of LSQ.

    With the gradient dy of the result, at x = w / step and for the N weights of a step,

        dw    = dy where |x| < top, else 0
        dstep = sum of dy x (round(x) - x where |x| < top, else sign(x) top) / sqrt(N top)

    (equations 3 and 5, and section 2.2). The codes are those of `codes.nearest`, symmetric, where
    the paper's have one more below zero.

    Args:
        w: `[..., *in, *out]` float32.
        step: `[..., *out, groups]` float32, positive.
        groups: what shares a step.
        spec: the format: a step is used as it is stored.
        top: the largest code; it may be a traced number.
    """
    top = jnp.asarray(top, jnp.float32)
    stored = _as_stored(step, jax.lax.rsqrt(jnp.asarray(groups.sizes, jnp.float32) * top), spec)
    first, n_in = w.ndim - len(groups.in_shape) - groups.n_out, len(groups.in_shape)
    if len(groups.sizes) == 1:
        each = jnp.expand_dims(stored[..., 0], tuple(range(first, first + n_in)))
    else:
        each = _repeated(stored, groups, tuple(lead_spec(w, w.ndim)))
    return _lsq(w, each, top)


def rounded_tokens(x: jax.Array) -> jax.Array:
    """Activations `[..., K]` as `round_tokens` rounds them, straight through backwards.

    Nothing is cut off there, so the gradient is the identity.
    """
    codes, scales = round_tokens(x)
    y = (codes.astype(jnp.float32) * scales).astype(x.dtype)
    return jax.lax.stop_gradient(y) + (x - jax.lax.stop_gradient(x))  # y, to the last bit


@jax.custom_vjp
def _lsq(w: jax.Array, s: jax.Array, top: jax.Array) -> jax.Array:
    """`w` rounded to multiples of `s`, which has as many dimensions, some of size one."""
    return nearest_integer(in_steps(w, s), top) * s


def _lsq_forward(w: jax.Array, s: jax.Array, top: jax.Array) -> Any:
    return _lsq(w, s, top), (w, s, top)


def _lsq_backward(kept: Any, dy: jax.Array) -> Any:
    w, s, top = kept
    x = in_steps(w, s)
    inside = jnp.abs(x) < top
    slope = jnp.where(inside, nearest_integer(x, top) - x, jnp.sign(x) * top)
    shared = tuple(i for i, (a, b) in enumerate(zip(w.shape, s.shape, strict=True)) if a != b)
    ds = jnp.sum(dy * slope, axis=shared, keepdims=True)
    return jnp.where(inside, dy, 0.0), ds, jnp.zeros_like(top)


_lsq.defvjp(_lsq_forward, _lsq_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _as_stored(step: jax.Array, gain: jax.Array, spec: QuantSpec) -> jax.Array:
    """A step size rounded as it is stored, its gradient that of the result x `gain`."""
    kind = jnp.finfo(scale_dtype(spec))  # a cast there and back is what compilers leave out
    return jax.lax.reduce_precision(step, kind.nexp, kind.nmant)


_as_stored.defvjp(
    lambda step, gain, spec: (_as_stored(step, gain, spec), gain),
    lambda spec, gain, d: (d * gain, jnp.zeros_like(gain)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _repeated(step: jax.Array, groups: Groups, places: tuple[Any, ...]) -> jax.Array:
    """`[..., *out, groups]` once for every weight: `[..., *in, *out]`, split as `places` say.

    By hand both ways, so that groups may be torn apart by the split of the inputs, and only sums
    over groups are sent.
    """
    lead = tuple(lead_spec(step, step.ndim - 1))
    n = step.shape[-1] * groups.size
    each = jnp.broadcast_to(step[..., None], (*step.shape, groups.size))
    each = _reshaped(each, (*step.shape[:-1], n), (*lead, None))[..., : groups.n_in]
    whole = (None,) * len(groups.in_shape)
    each = _reshaped(each, (*step.shape[:-1], *groups.in_shape), (*lead, *whole))
    n_in, n_out = len(whole), groups.n_out
    last = tuple(range(each.ndim - n_in, each.ndim))
    each = jnp.moveaxis(each, last, tuple(a - n_out for a in last))
    return jax.reshard(each, P(*places)) if has_mesh() else each


def _sums(a: jax.Array, groups: Groups) -> jax.Array:
    """Sums over the inputs of each group: `[..., *in, *out]` to `[..., *out, groups]`."""
    if len(groups.sizes) == 1:
        return jnp.sum(a, axis=_inputs(a, groups))[..., None]
    a = _outputs_first(a, groups)
    member = jnp.arange(groups.n_in)[:, None] // groups.size == jnp.arange(len(groups.sizes))
    return jnp.einsum(
        "...k,kg->...g",
        a,
        member.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=P(*lead_spec(a, a.ndim - 1), None) if has_mesh() else None,
    )


def _largest(a: jax.Array, groups: Groups) -> jax.Array:
    """As `_sums`, the largest. Not for every step: groups that a mesh tears apart are gathered."""
    if len(groups.sizes) == 1:
        return jnp.max(a, axis=_inputs(a, groups))[..., None]
    a = _outputs_first(a, groups)
    places = (*lead_spec(a, a.ndim - 1), None)
    if has_mesh():
        a = jax.reshard(a, P(*places))
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % groups.size)])
    return jnp.max(_reshaped(a, (*a.shape[:-1], -1, groups.size), (*places, None)), axis=-1)


def _inputs(a: jax.Array, groups: Groups) -> tuple[int, ...]:
    """Which axes of `[..., *in, *out]` are the inputs."""
    first = a.ndim - len(groups.in_shape) - groups.n_out
    return tuple(range(first, first + len(groups.in_shape)))


def _outputs_first(a: jax.Array, groups: Groups) -> jax.Array:
    """`[..., *in, *out]` as `[..., *out, K]`."""
    inputs = _inputs(a, groups)
    a = jnp.moveaxis(a, inputs, tuple(range(a.ndim - len(inputs), a.ndim)))
    n = a.ndim - len(inputs)
    return _reshaped(a, (*a.shape[:n], groups.n_in), lead_spec(a, n + 1))


_repeated.defvjp(
    lambda step, groups, places: (_repeated(step, groups, places), None),
    lambda groups, places, _, d: (_sums(d, groups),),
)


def _reshaped(a: jax.Array, shape: tuple[int, ...], places: tuple[Any, ...]) -> jax.Array:
    return jnp.reshape(a, shape, out_sharding=P(*places) if has_mesh() else None)
