"""From numbers to codes and back: scales, rounding, packing. All functions are pure and traceable.

A matrix is `[..., K]` here: a row for each output, K inputs. Its columns are cut into groups, each
with one scale; the last group may be smaller.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from slm_jax.compress.spec import QuantSpec

_NF4_OFFSET = 0.9677083  # of bitsandbytes: the mean of 1 - 1/(2 x 15) and 1 - 1/(2 x 16)


class Coded(NamedTuple):
    """A matrix as it is stored.

    Attributes:
        codes: `[..., columns]`, int8; uint8 for codes of fewer bits, packed as `pack` says.
        scales: `[..., groups]`, float32 with one group, else bfloat16.
    """

    codes: jax.Array
    scales: jax.Array


def group_size(n_in: int, spec: QuantSpec) -> int:
    """How many of `n_in` columns share a scale; the last group may be smaller."""
    return n_in if spec.group is None else min(spec.group, n_in)


@functools.cache
def nf4_levels() -> np.ndarray:
    """The 16 levels of NormalFloat-4 in [-1, 1], ascending, float32 (arXiv 2305.14314, eq. 4).

    Quantiles of a normal distribution, 8 above zero, 7 below and zero itself, divided by the
    largest.
    """
    above = ndtri(np.linspace(_NF4_OFFSET, 0.5, 9)[:-1])
    below = -ndtri(np.linspace(_NF4_OFFSET, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    return (levels / levels.max()).astype(np.float32)


def largest_code(spec: QuantSpec) -> int:
    """What the largest weight of a group becomes: 127, 7 or 3; the level 1 for NF4."""
    return 1 if spec.code == "nf4" else 2 ** (spec.bits - 1) - 1


def find_scales(w: jax.Array, spec: QuantSpec) -> jax.Array:
    """Scales by the largest magnitude of each group: `[..., K]` to `[..., groups]`.

    In the dtype they are stored in, so that codes are chosen for the scale that will be used.
    A group of zeros has scale zero.
    """
    top = jnp.max(jnp.abs(_grouped(w.astype(jnp.float32), spec)), axis=-1)
    return (top / largest_code(spec)).astype(scale_dtype(spec))


def scale_dtype(spec: QuantSpec) -> jnp.dtype:
    """What scales are stored in."""
    return jnp.dtype(jnp.float32 if spec.group is None else jnp.bfloat16)


def in_steps(w: jax.Array, scales: jax.Array) -> jax.Array:
    """`w / scales` in float32, which broadcast; zero where a scale is zero."""
    s = scales.astype(jnp.float32)
    return jnp.where(s > 0, w.astype(jnp.float32) / jnp.where(s > 0, s, 1), 0)


def nearest_integer(x: jax.Array, top: jax.Array | float) -> jax.Array:
    """The integer in -top..top that is nearest, float32; ties go to the even one."""
    return jnp.clip(jnp.round(x), -top, top)


def nearest(w: jax.Array, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    """The codes nearest to `w` at given scales.

    Args:
        w: any shape, float.
        scales: of every entry, broadcastable against `w`.
        spec: the format.

    Returns:
        int8 codes in the shape of `w`: -127..127, -7..7, -3..3, or NF4's 0..15. Ties go to the
        even code.
    """
    x = in_steps(w, scales)
    if spec.code == "nf4":
        levels = nf4_levels()
        return jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), x).astype(jnp.int8)
    return nearest_integer(x, largest_code(spec)).astype(jnp.int8)


def values_of(codes: jax.Array, spec: QuantSpec) -> jax.Array:
    """What int8 codes stand for at scale 1, float32."""
    if spec.code == "nf4":
        return jnp.asarray(nf4_levels())[codes]
    return codes.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="spec")
def encode(w: jax.Array, spec: QuantSpec, scales: jax.Array | None = None) -> Coded:
    """Rounds a matrix to nearest: `[..., K]` float, by default at the scales of `find_scales`."""
    scales = find_scales(w, spec) if scales is None else scales.astype(scale_dtype(spec))
    codes = nearest(_grouped(w, spec), scales[..., None], spec)
    flat = codes.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]
    return Coded(pack(flat, spec), scales)


def decode(coded: Coded, spec: QuantSpec, n_in: int) -> jax.Array:
    """The matrix that a code stands for: `[..., n_in]` float32."""
    values = _grouped(values_of(unpack(coded.codes, spec, n_in), spec), spec)
    values = values * coded.scales.astype(jnp.float32)[..., None]
    return values.reshape(*values.shape[:-2], -1)[..., :n_in]


def zero_code(spec: QuantSpec) -> int:
    """The code that stands for zero."""
    return int(nf4_levels().searchsorted(0.0)) if spec.code == "nf4" else 0


def pack(codes: jax.Array, spec: QuantSpec) -> jax.Array:
    """int8 codes `[..., columns]` as they are stored.

    Codes of 4 bits are two to a byte, codes of 3 bits eight to three bytes: together they are a
    little-endian number with the first code in its lowest bits. What fills up the last is zeros.
    """
    if spec.bits == 8:
        return codes
    each, n_bytes, word = _words(spec)
    codes = _padded(codes, each, zero_code(spec)).astype(jnp.int32) + _offset(spec)
    codes = codes.astype(word).reshape(*codes.shape[:-1], -1, each)
    words = jnp.sum(codes << _shifts(spec.bits, each, word), axis=-1, dtype=word)
    stored = (words[..., None] >> _shifts(8, n_bytes, word)).astype(jnp.uint8)
    return stored.reshape(*stored.shape[:-2], -1)


def unpack(codes: jax.Array, spec: QuantSpec, n_in: int) -> jax.Array:
    """Stored codes as int8 codes, `[..., n_in]`."""
    if spec.bits == 8:
        return codes[..., :n_in]
    each, n_bytes, word = _words(spec)
    stored = codes.reshape(*codes.shape[:-1], -1, n_bytes).astype(word)
    words = jnp.sum(stored << _shifts(8, n_bytes, word), axis=-1, dtype=word)
    parts = (words[..., None] >> _shifts(spec.bits, each, word)) & word(2**spec.bits - 1)
    flat = parts.astype(jnp.int8).reshape(*codes.shape[:-1], -1)[..., :n_in]
    return flat - jnp.int8(_offset(spec))


def round_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to int8, each token by its own largest magnitude.

    Args:
        x: `[..., K]` float.

    Returns:
        int8 `[..., K]` in -127..127, and float32 scales `[..., 1]`, zero for a token of zeros.
    """
    spec = QuantSpec()
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest_code(spec)
    return nearest(x, scales, spec), scales


def _grouped(w: jax.Array, spec: QuantSpec) -> jax.Array:
    """`[..., K]` to `[..., groups, size]`, filled up with zeros."""
    size = group_size(w.shape[-1], spec)
    w = _padded(w, size, 0)
    return w.reshape(*w.shape[:-1], -1, size)


def _words(spec: QuantSpec) -> tuple[int, int, Any]:
    """Codes and bytes of the smallest number of whole bytes, and a type that holds them."""
    each = 8 // math.gcd(spec.bits, 8)
    n_bytes = each * spec.bits // 8
    return each, n_bytes, jnp.uint8 if n_bytes == 1 else jnp.uint32


def _shifts(bits: int, n: int, word: Any) -> jax.Array:
    return jnp.arange(n, dtype=word) * word(bits)


def _offset(spec: QuantSpec) -> int:
    """What makes a code positive."""
    return 0 if spec.code == "nf4" else 2 ** (spec.bits - 1)


def _padded(a: jax.Array, multiple: int, value: int) -> jax.Array:
    missing = -a.shape[-1] % multiple
    if not missing:
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)], constant_values=value)
