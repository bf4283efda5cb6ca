"""Matrices with many zeros in a file: a bit for every weight, and what is not zero.

`NAME.mask` is uint8, bit i of it (lowest first) says whether weight i is kept; `NAME.kept` holds
those that are, in order: floats, or codes packed as in the dense form. The scales of codes stay.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.compress.codes import pack, unpack, zero_code
from slm_jax.compress.linear import QuantisedMatrix
from slm_jax.compress.quantise import is_matrix, path_name
from slm_jax.errors import UserError
from slm_jax.nn.linear import Linear

MASK, KEPT = ".mask", ".kept"

# Every matrix has a size of its own, and each operation outside `jit` would be compiled for it.
_pack = jax.jit(pack, static_argnames="spec")
_unpack = jax.jit(unpack, static_argnames=("spec", "n_in"))


def squeezed(values: np.ndarray, matrix: QuantisedMatrix | None) -> tuple[np.ndarray, np.ndarray]:
    """Mask and kept values of an array.

    Args:
        values: floats of any shape, or stored codes.
        matrix: that the codes are of, or `None` for floats.
    """
    zero = 0
    if matrix is not None:
        zero = zero_code(matrix.spec)
        values = np.asarray(_unpack(jnp.asarray(values), spec=matrix.spec, n_in=matrix.n_in))
    stays = values != zero
    kept = values[stays]
    if matrix is not None:
        kept = np.asarray(_pack(jnp.asarray(kept)[None], spec=matrix.spec))[0]
    return np.packbits(stays, bitorder="little"), kept


def expanded(
    mask: np.ndarray, kept: np.ndarray, shape: tuple[int, ...], matrix: QuantisedMatrix | None
) -> np.ndarray:
    """The array that `squeezed` was given.

    Args:
        mask: see the module.
        kept: see the module.
        shape: of floats; of the stored codes with a `matrix`.
        matrix: as in `squeezed`; may be abstract.

    Raises:
        UserError: if mask or kept values have another number.
    """
    zero = 0
    if matrix is not None:
        zero, shape = zero_code(matrix.spec), (*shape[:-1], matrix.n_in)
    size = math.prod(shape)
    stays = np.unpackbits(mask, count=size, bitorder="little").astype(bool)
    n = int(stays.sum())
    bits = 8 if matrix is None else matrix.spec.bits
    expected = n if bits == 8 else -(-n // (8 // math.gcd(bits, 8))) * bits // math.gcd(bits, 8)
    if mask.shape != (-(-size // 8),) or kept.shape != (expected,):
        raise UserError(
            f"{MASK} and {KEPT} have {mask.shape} and {kept.shape} entries, not "
            f"{-(-size // 8)} and {expected}"
        )
    if matrix is not None:
        kept = np.asarray(_unpack(jnp.asarray(kept)[None], spec=matrix.spec, n_in=n))[0]
    values = np.full(size, zero, kept.dtype)
    values[stays] = kept
    values = values.reshape(shape)
    return values if matrix is None else np.asarray(_pack(jnp.asarray(values), spec=matrix.spec))


def coded_matrices(model: Any) -> dict[str, QuantisedMatrix]:
    """By the path of its codes, every quantised matrix."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, QuantisedMatrix)
    )
    return {
        f"{path_name(path)}.codes": leaf for path, leaf in flat if isinstance(leaf, QuantisedMatrix)
    }


def float_matrices(model: Any) -> set[str]:
    """The paths of the float weights of every `Linear` and `Embedding`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_matrix)
    return {
        f"{path_name(path)}.w"
        for path, leaf in flat
        if is_matrix(leaf) and not isinstance(leaf.w, QuantisedMatrix)
    }


def zero_share(model: Any) -> float:
    """The share of zeros among the float weights of the layers' `Linear`s."""
    zeros = total = 0
    for leaf in jax.tree.leaves(model, is_leaf=is_matrix):
        if isinstance(leaf, Linear) and "vocab" not in leaf.out_axes:
            w = leaf.w[...]
            zeros, total = zeros + int(jnp.sum(w == 0)), total + w.size
    return zeros / total
