"""Logical axes to mesh axes: the one table that says how every array is split.

A parameter names its axes where it is made (`nnx.Param(value, axes=("embed", "heads", ...))`);
this table maps the names to mesh axes. Models never mention a mesh axis or a `PartitionSpec`.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": "sequence",
    # Keys of attention over a split row: gathered (None), or split and passed round ("sequence").
    "kv_seq": None,
    # weights
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "inner": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    # never split
    "kv_head": None,
    "head_dim": None,
    "experts": None,
    "dt_b_c": None,
    "state": None,
    "conv": None,
    "dt_rank": None,
    "layer": None,
    "latent": None,
    "slots": None,
    "halt": None,
}

_overrides: contextvars.ContextVar[Mapping[str, MeshAxes]] = contextvars.ContextVar(
    "slm_jax_rules", default=RULES
)


@contextlib.contextmanager
def use_rules(**changes: MeshAxes) -> Iterator[None]:
    """Changes rows of the table inside a `with` block (trace-time only).

    Raises:
        UserError: for a logical axis that the table does not have.
    """
    for name in changes:
        if name not in RULES:
            raise UserError(f"logical axis {name!r} is unknown: choose from {', '.join(RULES)}")
    token = _overrides.set({**_overrides.get(), **changes})
    try:
        yield
    finally:
        _overrides.reset(token)


def current_rules() -> tuple[tuple[str, MeshAxes], ...]:
    """The table in force, hashable: part of what a compiled program depends on."""
    return tuple(sorted(_overrides.get().items()))


def spec(axes: tuple[str | None, ...], *, gathered: bool = False) -> P:
    """The `PartitionSpec` of an array with these logical axes under the current rules.

    Args:
        axes: one logical name a dimension, `None` for a dimension that is never split.
        gathered: drop the `fsdp` axis, as a weight has after `gather`.
    """
    rules = _overrides.get()
    entries = [rules[a] if a is not None else None for a in axes]
    if gathered:
        entries = [None if e == "fsdp" else e for e in entries]
    return P(*entries)


def has_mesh() -> bool:
    """Whether an Explicit mesh is in force.

    Without a mesh (plain scripts, exporters) and inside `shard_map` nothing is constrained.
    """
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def gather(
    weight: jax.Array, axes: tuple[str | None, ...], lead: tuple[MeshAxes, ...] = ()
) -> jax.Array:
    """All-gathers a weight over `fsdp` where it is used.

    Done by hand, inside the scanned and rematerialised block: left to the compiler the gather of
    a stacked weight may be hoisted out of the layer loop and cost the memory FSDP was to save.

    The gradient goes the same way back: reduce-scattered over `fsdp`, and of what is left of it an
    all-reduce over the other axes that tokens are split over. Left to the compiler it is
    all-reduced over all of them, and then cut: up to twice the bytes.

    Args:
        weight: split as `axes` say.
        axes: its logical axes.
        lead: how the tokens are split that it is used on (`lead_spec`): each part of them gives
            the gradient a summand.
    """
    if not has_mesh():
        return weight
    split, whole = spec(axes), spec(axes, gathered=True)
    shape = jax.sharding.get_abstract_mesh().shape
    tokens = {axis for entry in lead for axis in names(entry)}
    if "fsdp" not in split or "fsdp" not in tokens or shape["fsdp"] == 1:
        return jax.reshard(weight, whole)
    others = tuple(axis for axis in shape if axis in tokens - {"fsdp"})

    def run(part: jax.Array) -> jax.Array:
        part = jax.lax.pcast(part, others, to="reduced") if others else part
        return gather_dim(part, split.index("fsdp"), to="reduced")

    out = P(*whole, reduced=tokens)
    return jax.shard_map(run, in_specs=split, out_specs=out)(jax.reshard(weight, split))


def gather_dim(part: jax.Array, dim: int, *, to: str) -> jax.Array:
    """In `shard_map`: all-gathers a dimension over `fsdp`.

    A last dimension moves to the front for it: the reduce-scatter of the gradient along the last
    dimension becomes an all-reduce on TPUs.

    Args:
        part: of this device.
        dim: the dimension that is split.
        to: the type of the result, as of `jax.lax.all_gather`.
    """
    if dim < part.ndim - 1:
        return jax.lax.all_gather(part, "fsdp", axis=dim, tiled=True, to=to)
    moved = jax.lax.all_gather(jnp.moveaxis(part, dim, 0), "fsdp", tiled=True, to=to)
    return jnp.moveaxis(moved, 0, dim)


def split_rows[Tree](arrays: Tree) -> Tree:
    """Splits each `[B, S]` of a tree along its tokens too, as the rule for `seq` says.

    Rows come whole to every device of a `sequence` group, so nothing is sent. Where the axis has
    size one nothing is said about the tokens: kernels then see whole rows.

    Raises:
        UserError: if S is not a multiple of the axis.
    """
    (seq,) = spec(("seq",))
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[a] for a in names(seq)) if has_mesh() else 1

    def one(x: jax.Array) -> jax.Array:
        if parts == 1:
            return x
        if x.shape[1] % parts:
            raise UserError(
                f"seq_len={x.shape[1]} is not a multiple of mesh axis {seq}={parts}: choose "
                f"{max(1, round(x.shape[1] / parts)) * parts}, or split rows over fewer devices"
            )
        return jax.reshard(x, P(*lead_spec(x, 1), seq))

    return jax.tree.map(one, arrays)


def refuse_split_rows(model: str) -> None:
    """Says so where a model does not split rows: every device of an axis would do the same work.

    Raises:
        UserError: if the mesh has a `sequence` axis.
    """
    (seq,) = spec(("seq",))
    shape = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(shape.get(axis, 1) for axis in names(seq))
    if parts > 1:
        raise UserError(
            f"mesh.{seq}={parts}: {model} works on whole rows: split the batch (data, fsdp) or "
            "heads and widths (tensor) instead"
        )


def token_parts(x: jax.Array) -> int:
    """How many devices the tokens of a row of `x` `[B, S, ...]` are split over."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in names(lead_spec(x, 2)[1]))


def batch_parts(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in names(spec(("batch",))[0]))


def names(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def lead_spec(x: jax.Array, n: int) -> tuple[Any, ...]:
    """How the first `n` dimensions of `x` are split, read off its type."""
    entries = tuple(jax.typeof(x).sharding.spec)
    return (entries + (None,) * (x.ndim - len(entries)))[:n]


def split_as(x: jax.Array, like: jax.Array, dims: tuple[int | None, ...]) -> jax.Array:
    """Splits `x` as an activation is: a state made before anyone knew how the batch is split.

    Args:
        x: the array.
        like: the activation.
        dims: for each dimension of `x` the dimension of `like` it goes with, `None` = not split.
    """
    if not has_mesh():
        return x
    split = lead_spec(like, like.ndim)
    return jax.reshard(x, P(*(None if d is None else split[d] for d in dims)))


def leaf_axes(leaf: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axis of every dimension of a leaf; leading ones, of stacked layers, have none."""
    axes = leaf.get_metadata().get("axes", ())
    return (None,) * (len(leaf.get_value().shape) - len(axes)) + tuple(axes)


def leaf_spec(leaf: nnx.Variable) -> P:
    """How a leaf is split."""
    return spec(leaf_axes(leaf))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Replaces every `nnx.Variable` in `tree` by its `NamedSharding` on `mesh`.

    Leading dimensions beyond the named ones (stacked layers) are not split. Leaves that are not
    variables (optimiser counts, scalars) are replicated.

    Raises:
        UserError: if a dimension is not a multiple of the mesh axes it is split over.
    """

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        if not jax.tree.leaves(leaf):  # a variable that an optimiser left out (optax MaskedNode)
            return leaf
        value, axes = leaf.get_value(), leaf_axes(leaf)
        sharding = NamedSharding(mesh, leaf_spec(leaf))
        for size, name, entry in zip(value.shape, axes, sharding.spec, strict=True):
            split = math.prod(mesh.shape[axis] for axis in names(entry))
            if size % split:
                raise UserError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: axis {name!r} of "
                    f"size {size} is not a multiple of mesh axes {entry}={split}: change the size "
                    "or the mesh"
                )
        return leaf.replace(sharding)

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
