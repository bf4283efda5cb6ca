"""Logical axes to mesh axes: the one table that says how every array is split.

A parameter names its axes where it is made (`nnx.Param(value, axes=("embed", "heads", ...))`);
this table maps the names to mesh axes. Models never mention a mesh axis or a `PartitionSpec`.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # activations
    "batch": ("data", "fsdp"),
    "seq": "sequence",
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


def gather(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """All-gathers a weight over `fsdp` where it is used; its gradient is reduce-scattered.

    Done by hand, inside the scanned and rematerialised block: left to the compiler the gather of
    a stacked weight may be hoisted out of the layer loop and cost the memory FSDP was to save.
    """
    return jax.reshard(weight, spec(axes, gathered=True)) if has_mesh() else weight


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
        value = leaf.get_value()
        axes = leaf.get_metadata().get("axes", ())
        axes = (None,) * (len(value.shape) - len(axes)) + tuple(axes)
        sharding = NamedSharding(mesh, spec(axes))
        for size, name, entry in zip(value.shape, axes, sharding.spec, strict=True):
            split = 1
            for axis in (entry,) if isinstance(entry, str) else (entry or ()):
                split *= mesh.shape[axis]
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


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process's host rows into global arrays split over the batch axes.

    Args:
        batch: host arrays whose first dimension is this process's rows, `[rows, ...]`; arrays
            with a leading accumulation dimension are not expected here.
        mesh: the mesh the arrays live on.
    """
    sharding = NamedSharding(mesh, spec(("batch",)))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
