"""Leaves of a model and how to walk them.

Models are `flax.nnx` modules used as plain pytrees: built once, never mutated, touched by `jax.*`
transforms only. Every array sits in an `nnx.Variable` that carries the logical names of its axes.
"""

from typing import Any

import jax
from flax import nnx


class Buffer(nnx.Variable):
    """An array that belongs to the model but is not trained by gradient (router bias, y/z init)."""


class SparseTable(nnx.Variable):
    """A table of which a step reads few rows (puzzle embeddings): `[rows, embed]`.

    Trained, but by a rule of its own (`slm_jax.train.optimizer`) on the rows that were read; not
    averaged, and not counted among the parameters.
    """


class StepSize(nnx.Param):
    """The step of the grid that weights are rounded to (`slm_jax.compress.qat`): positive.

    Trained, and an update multiplies it: where another parameter goes by u, it goes by exp(u).
    """


def is_variable(node: Any) -> bool:
    """Whether `node` is a leaf of a model; for `is_leaf=` of `jax.tree.map`."""
    return isinstance(node, nnx.Variable)


def parameter(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    decay: bool = True,
    matrix: tuple[int, int] = (0, 0),
) -> nnx.Param:
    """A trained array with one logical axis name a dimension.

    Args:
        value: the initial value.
        axes: logical names (`slm_jax.parallel.RULES`), `None` for a dimension never split.
        decay: whether weight decay applies: false for norms, biases, A_log, D and dt bias.
        matrix: how many of the last axes are inputs and outputs of a linear map (Muon).
    """
    return nnx.Param(value, axes=axes, decay=decay, matrix=matrix)


def changed(module: Any, **changes: Any) -> Any:
    """A copy of `module` with some attributes replaced: modules are never mutated."""
    leaves, tree = jax.tree.flatten(module)
    copy = jax.tree.unflatten(tree, leaves)
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


def named_leaves(tree: Any) -> dict[str, nnx.Variable]:
    """Every variable of `tree` by its path, as in `blocks.0.mixer.q.w`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in flat
        if is_variable(leaf)
    }


def count_parameters(tree: Any) -> int:
    """Number of trained values in `tree` (abstract trees too), buffers not counted."""
    return sum(
        int(v.get_value().size) for v in named_leaves(tree).values() if isinstance(v, nnx.Param)
    )
