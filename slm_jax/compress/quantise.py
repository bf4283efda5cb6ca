"""Quantising a whole model: one pytree in, another out, whatever the architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.compress.codes import Coded
from slm_jax.compress.linear import (
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedMatrix,
    quantised_embedding,
    quantised_linear,
)
from slm_jax.compress.spec import QuantSpec
from slm_jax.errors import UserError
from slm_jax.nn.linear import Embedding, Linear
from slm_jax.nn.module import is_variable

KEEP = ("router",)
"""Modules left in float: a router's few weights decide where everything goes."""


def quantise[M](
    model: M,
    spec: QuantSpec,
    *,
    vocab: QuantSpec | None = None,
    keep: tuple[str, ...] = KEEP,
    coded: Mapping[str, Coded] | None = None,
) -> M:
    """The same model with its matrices in a few bits.

    A pure function that can be traced: `jax.eval_shape` of it gives the abstract model. The shapes
    of the result depend on the shapes of the model and on the formats alone, not on how the codes
    were found.

    Args:
        model: any module made of `Linear` and `Embedding`, layers stacked or not.
        spec: format of every `Linear`.
        vocab: format of the embedding and of a head of its own; default `vocab_spec(spec)`.
        keep: names of modules that stay as they are.
        coded: by path of a `Linear` (`blocks.0.mixer.q`), its codes where not those nearest.

    Raises:
        UserError: if the model is quantised already, or `coded` has a path that is not there.
    """
    vocab = vocab_spec(spec) if vocab is None else vocab
    left = dict(coded or {})

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if isinstance(leaf, QuantisedLinear | QuantisedEmbedding):
            raise UserError(f"{name} is quantised already: give a model of float weights")
        if not is_matrix(leaf) or not is_wanted(name, keep):
            return leaf
        if isinstance(leaf, Embedding):
            return quantised_embedding(leaf, vocab, left.pop(name, None))
        return quantised_linear(leaf, format_of(leaf, spec, vocab), left.pop(name, None))

    out: M = jax.tree_util.tree_map_with_path(one, model, is_leaf=is_matrix)
    if left:
        raise UserError(f"coded={next(iter(left))!r} is no matrix that is to be quantised")
    return out


def vocab_spec(spec: QuantSpec) -> QuantSpec:
    """The usual format of embedding and head beside `spec`: 8 bits at least."""
    return spec if spec.bits == 8 else QuantSpec("int8")


def format_of(matrix: Linear | Embedding, spec: QuantSpec, vocab: QuantSpec) -> QuantSpec:
    """Which of the two formats of `quantise` is that of a matrix."""
    return vocab if isinstance(matrix, Embedding) or has_vocab(matrix) else spec


def is_matrix(node: Any) -> bool:
    """Whether `node` is what `quantise` replaces, quantised or not; for `is_leaf=`."""
    return isinstance(node, Linear | Embedding)


def is_wanted(name: str, keep: tuple[str, ...] = KEEP) -> bool:
    """Whether the module of this path is to be quantised."""
    return not set(name.split(".")) & set(keep)


def has_vocab(linear: Linear) -> bool:
    """Whether a `Linear` is a head."""
    return "vocab" in linear.out_axes


def path_name(path: Any) -> str:
    """`blocks.0.mixer.q` of a path of jax's."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@dataclass(frozen=True)
class Size:
    """What a model weighs.

    Attributes:
        parameters: trained values, each weight behind a code counted once.
        nbytes: of all its arrays.
        coded: weights that are stored as codes.
        coded_nbytes: bytes of their codes and scales.
    """

    parameters: int
    nbytes: int
    coded: int
    coded_nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, the whole model on average."""
        return 8 * self.nbytes / self.parameters

    @property
    def bits_per_coded(self) -> float:
        """Bits of a weight that is stored as a code, its share of the scales included."""
        return 8 * self.coded_nbytes / self.coded if self.coded else float("nan")


def size(model: Any) -> Size:
    """The size of a model, quantised or not, abstract or not."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, QuantisedMatrix) or is_variable(node)

    parameters = nbytes = coded = coded_nbytes = 0
    for leaf in jax.tree.leaves(model, is_leaf=is_leaf):
        if isinstance(leaf, QuantisedMatrix):
            coded += leaf.n_weights
            coded_nbytes += leaf.nbytes
        else:
            value = leaf.get_value()
            parameters += value.size * isinstance(leaf, nnx.Param)
            nbytes += value.size * jnp.dtype(value.dtype).itemsize
    return Size(parameters + coded, nbytes + coded_nbytes, coded, coded_nbytes)
