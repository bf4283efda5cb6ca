"""Rows split over devices along their tokens: what the parts of a row have to tell each other.

`on_parts` runs a function on every device's part of a row; `halo`, `whole` and `carry_in` are what
it may ask the other parts for. Gradients flow back the same ways.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_jax.parallel.rules import MeshAxes, lead_spec


def on_parts(
    run: Callable[..., jax.Array],
    arrays: Mapping[str, jax.Array | None],
    like: str,
) -> jax.Array:
    """Runs a function on every device's part of some arrays, split as they are.

    Args:
        run: called with the arrays by name; `None` stays `None`.
        arrays: what it gets.
        like: the one of them that its result is split as.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    missing = {name: None for name in arrays if name not in given}
    specs = {name: P(*lead_spec(x, x.ndim)) for name, x in given.items()}
    # No check of varying axes: what a kernel writes carries no such mark.
    return jax.shard_map(
        lambda given: run(**given, **missing),
        in_specs=(specs,),
        out_specs=specs[like],
        check_vma=False,
    )(given)


def whole(x: jax.Array, axis: MeshAxes) -> jax.Array:
    """All tokens of a row: `[B, S / parts, ...]` to `[B, S, ...]`, on every device of the axis."""
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def halo(x: jax.Array, n: int, axis: MeshAxes) -> jax.Array:
    """The `n` tokens before a part: `[B, n, ...]`, zeros before the first part.

    Args:
        x: the part, `[B, S, ...]` with S >= n.
        n: tokens.
        axis: the mesh axis that the row is split over.
    """
    parts = jax.lax.axis_size(axis)
    if n == 0:
        return x[:, :0]
    return jax.lax.ppermute(x[:, -n:], axis, [(i, i + 1) for i in range(parts - 1)])


def carry_in(decay: jax.Array, state: jax.Array, axis: MeshAxes) -> jax.Array:
    """What a linear recurrence h' = decay h + ... has become before a part begins.

    All parts start at once from zero and tell each other where they ended; what came before a part
    is put together from that. So no device waits for the one before it.

    Args:
        decay: what a part multiplies the state before it with, in all.
        state: the state at the end of a part that was begun with zero, of the same shape.
        axis: the mesh axis that the row is split over.

    Returns:
        The state before the part, zero before the first.
    """
    me = jax.lax.axis_index(axis)
    ends = jax.lax.all_gather((decay, state), axis)

    def join(before: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        part, (decay, state) = xs
        return jnp.where(part < me, decay * before + state, before), None

    parts = jnp.arange(jax.lax.axis_size(axis))
    return jax.lax.scan(join, jnp.zeros_like(state), (parts, ends))[0]
