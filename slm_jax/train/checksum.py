"""Checksums of arrays, computed where the arrays are and the same however they are split.

Integer sums wrap around and do not depend on their order, unlike sums of floats: eight devices and
one give the same number.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Checksum = tuple[int, int]
"""Sum of the words of an array, and sum of its words mixed with their positions, modulo 2^32."""

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, Checksum]:
    """The checksum of every array.

    Any change within one word (a flipped bit) changes it; other changes (words swapped, shifted,
    rows lost) are missed once in 2^32.

    Args:
        arrays: arrays by name, of any shape, dtype of at most 8 bytes, and sharding.
    """
    # One program a shape, not one for all: weights, moments and averages share theirs.
    sums = {name: _checksum(array) for name, array in arrays.items()}
    return {name: (int(a), int(b)) for name, (a, b) in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    # The row-major position, as a sum of one term a dimension: it may be split as the array is.
    position = jnp.zeros((), jnp.uint32)
    for d, size in enumerate(words.shape):
        along = [size if k == d else 1 for k in range(words.ndim)]
        stride = jnp.uint32(math.prod(words.shape[d + 1 :]) % 2**32)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, along, d)
    mixed = _mix(words + _mix(position))
    return jnp.sum(words, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words that spreads every bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
