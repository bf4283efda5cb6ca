"""The whole list of a model's tensors in a file, each with the pieces of our arrays it holds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.models.hf.configs import family_of
from slm_jax.models.hf.layouts import Layout
from slm_jax.models.hf.rules import Rule, linear, norm
from slm_jax.models.lm import LM
from slm_jax.nn.module import is_variable, named_leaves


class Piece(NamedTuple):
    """A part of one of our arrays and where it lies in the file.

    Attributes:
        path: of our array, as in `named_leaves`.
        at: index of the layer, and of the expert, in the stacked array.
        name: of the tensor in the file.
        rows: of the tensor, when it holds several pieces.
        layout: from one to the other.
        n_in: input axes of the piece, if it is a matrix.
    """

    path: str
    at: tuple[int, ...]
    name: str
    rows: slice
    layout: Layout
    n_in: int


class TensorMap(NamedTuple):
    """A model's tensors.

    Attributes:
        shapes: of the tensors in the file, by name, in the model's order.
        pieces: of every array of ours, by path; together they fill both sides exactly once.
    """

    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]


def tensor_map(model: Any, model_type: str) -> TensorMap:
    """Lays out a model, an abstract model, or its gradients as a class of `transformers` does.

    Args:
        model: an `LM` with arrays or `jax.ShapeDtypeStruct`s in its variables.
        model_type: a key of `FAMILIES` that `config_to_hf` accepts for the model.

    Raises:
        UserError: if the class has no place for one of the model's arrays.
    """
    family = family_of(model_type)
    leaves = named_leaves(model)
    out = TensorMap({}, {path: [] for path in leaves})

    def place(rule: Rule, base: str, index: tuple[int, ...], prefix: str) -> None:
        start = 0
        name = prefix + rule.hf
        for path in (base + ours for ours in rule.ours):
            value = leaves[path].get_value()
            n_in = leaves[path].get_metadata().get("matrix", (0, 0))[0]
            piece = jax.ShapeDtypeStruct(value.shape[len(index) :], value.dtype)
            shape = jax.eval_shape(lambda a, n=n_in: rule.layout.to_hf(a, n), piece).shape
            rows = slice(start, start + shape[0])
            out.pieces[path].append(Piece(path, index, name, rows, rule.layout, n_in))
            start = rows.stop
        out.shapes[name] = (start, *shape[1:])

    def apply(rules: tuple[Rule, ...], base: str, index: tuple[int, ...], prefix: str) -> None:
        for rule in rules:
            if any(base + ours not in leaves for ours in rule.ours):
                continue
            if "{expert}" not in rule.hf:
                place(rule, base, index, prefix)
                continue
            for e in range(leaves[base + rule.ours[0]].get_value().shape[len(index)]):
                one = rule._replace(hf=rule.hf.format(expert=e))
                place(one, base, (*index, e), prefix)

    period = len(model.config.pattern)
    repeats = model.config.n_layers // period
    apply((Rule(f"{family.embed}.weight", ("embed.w",)),), "", (), "")
    for i in range(model.config.n_layers):
        r, p = divmod(i, period)
        base, index = (f"blocks.{p}.", (r,)) if r < repeats else (f"tail.{p}.", ())
        layer = model.config.layer(i)
        rules = tuple(rule for rule in family.rules if rule.holds(layer))
        apply(rules, base, index, f"{family.layers}.{i}.")
    apply((*norm(family.final_norm, "final_norm"), *linear("lm_head", "head")), "", (), "")
    if homeless := [path for path, pieces in out.pieces.items() if not pieces]:
        raise UserError(
            f"{homeless[0]} has no place in model_type={model_type}: merge adapters, masks and "
            "quantised weights into plain float ones first"
        )
    return out


def to_hf(
    model: Any, mapping: TensorMap, out: Mapping[str, np.ndarray] | None = None
) -> Mapping[str, np.ndarray]:
    """Tensors of a model, or of its gradients, under their names in the file.

    Args:
        model: an `LM`, or a tree of its shape (gradients).
        mapping: its `tensor_map`.
        out: arrays of `mapping.shapes` to write into; made when `None`.

    Returns:
        Name to float32 array.
    """
    if out is None:
        out = {name: np.empty(shape, np.float32) for name, shape in mapping.shapes.items()}
    for path, leaf in named_leaves(model).items():
        value = np.asarray(leaf.get_value())
        for piece in mapping.pieces[path]:
            out[piece.name][piece.rows] = piece.layout.to_hf(value[piece.at], piece.n_in)
    return out


def from_hf(model: LM, mapping: TensorMap, rows: Callable[[str, slice], np.ndarray]) -> LM:
    """Fills an abstract model, array by array.

    Args:
        model: an `LM` of `jax.ShapeDtypeStruct`s, as `jax.eval_shape` makes it.
        mapping: its `tensor_map`.
        rows: (name, rows) to that part of a tensor, of any float type.

    Returns:
        The model with float32 arrays.
    """

    def fill(path: Any, leaf: nnx.Variable) -> nnx.Variable:
        value = np.empty(leaf.get_value().shape, np.float32)
        for piece in mapping.pieces[jax.tree_util.keystr(path, simple=True, separator=".")]:
            part = rows(piece.name, piece.rows)
            value[piece.at] = piece.layout.from_hf(part, value[piece.at].shape)
        return leaf.replace(jnp.asarray(value))

    return jax.tree_util.tree_map_with_path(fill, model, is_leaf=is_variable)
