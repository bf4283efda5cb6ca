"""Experts split over devices: rows travel to where their expert is, and back.

Nothing is dropped: a device has room for every row that could come. On TPU and GPU only rows that
are wanted travel (`jax.lax.ragged_all_to_all`). On CPU, which has no such operation, every device
sends all of its rows to all others, which pick theirs: the same result for more bytes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from slm_jax.parallel.rules import MeshAxes, gather_dim, leaf_spec, names, spec


@dataclass(frozen=True)
class Axes:
    """Mesh axes that a mixture-of-experts layer is split over; without a mesh there are none.

    Attributes:
        batch: of the rows.
        tokens: of the tokens of a row.
        experts: of the experts.
        width: of the hidden width of each expert.
    """

    batch: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    def specs(self, networks: Any) -> Any:
        """How the matrices of some `Linear`s come into `shard_map`: over `fsdp` still split."""
        kept = {*self.experts, *self.width, *({"fsdp"} & set(self.batch))}

        def one(leaf: nnx.Variable) -> nnx.Variable:
            entries = [tuple(a for a in names(e) if a in kept) or None for e in leaf_spec(leaf)]
            return leaf.replace(P(*entries))

        return jax.tree.map(one, networks, is_leaf=lambda v: isinstance(v, nnx.Variable))

    def gather(self, networks: Any, specs: Any) -> Any:
        """In `shard_map`: all-gathers over `fsdp`; gradients go back as in `rules.gather`."""

        def one(part: jax.Array, split: P) -> jax.Array:
            here = {axis for entry in split for axis in names(entry)}
            others = tuple(a for a in (*self.batch, *self.tokens) if a not in here)
            if others:
                part = jax.lax.pcast(part, others, to="varying")
            if "fsdp" in here:
                part = gather_dim(part, split.index(("fsdp",)), to="varying")
            return part

        return jax.tree.map(one, networks, specs)

    def sum_widths(self, y: jax.Array) -> jax.Array:
        """In `shard_map`: the sum of what the parts of the hidden width gave."""
        return jax.lax.psum(y, self.width) if self.width else y

    def sum_before(self, counts: jax.Array) -> jax.Array:
        """In `shard_map`: the sum over the parts of a row before this one, zero for the first."""
        if not self.tokens:
            return jnp.zeros_like(counts)
        parts = jax.lax.all_gather(counts, self.tokens)
        earlier = jnp.arange(len(parts)) < jax.lax.axis_index(self.tokens)
        return jnp.tensordot(earlier.astype(counts.dtype), parts, 1)


def expert_axes(lead: tuple[MeshAxes, ...], *, split_width: bool) -> Axes:
    """The axes of a layer, from the rules of its matrices and the split of its tokens.

    Where the rows are not split over the axis of the experts (one row in decoding), every device
    would do the same work: the experts are then gathered.

    Args:
        lead: how the tokens `[B, S]` are split.
        split_width: whether the experts' hidden width may be split.
    """
    shape = jax.sharding.get_abstract_mesh().shape

    def used(axis: str) -> tuple[str, ...]:
        return tuple(a for a in names(spec((axis,))[0]) if shape[a] > 1)

    batch, tokens, experts = names(lead[0]), names(lead[1]), used("expert")
    return Axes(
        batch,
        tokens,
        experts if set(experts) <= set(batch) else (),
        used("mlp") if split_width else (),
    )


class _Slices(NamedTuple):
    """What a device sends: as many slices to every device, those of device 0 first.

    Attributes:
        source: `[slices]` int32, where they begin here.
        sizes: `[slices]` int32, rows.
        target: `[slices]` int32, where they begin on the device that they go to.
        arriving: `[slices]` int32, rows of the slices that come here, by where they come from.
    """

    source: jax.Array
    sizes: jax.Array
    target: jax.Array
    arriving: jax.Array


class _Static(NamedTuple):
    """What is known of an exchange when it is traced.

    Attributes:
        axis: the mesh axis that the experts are split over.
        sent: rows of the array that slices are taken from.
        room: rows of the array that they are put into.
        ragged: whether the platform has a ragged all-to-all.
    """

    axis: tuple[str, ...]
    sent: int
    room: int
    ragged: bool


def to_experts(
    rows: jax.Array, group_sizes: jax.Array, axis: tuple[str, ...], *, most: int, ragged: bool
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Sends rows to the devices of their experts; for use in `shard_map`.

    Args:
        rows: `[n, D]` of this device, sorted by expert: those of expert 0 first.
        group_sizes: `[experts]` int32, rows of each expert; rows beyond their sum stay.
        axis: mesh axes that the experts are split over: device i has the i-th block of them.
        most: rows of this device that can go to one device.
        ragged: whether the platform has a ragged all-to-all.

    Returns:
        `[parts x most, D]`, what came here, sorted by expert; `[experts / parts]` int32, rows of
        each expert that is here, to which the rows beyond their sum do not belong; and what brings
        such rows back: `[parts x most, E]` to `[n, E]`, zeros where nothing was sent.
    """
    parts, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    counts = jax.lax.all_gather(group_sizes, axis)  # [source, expert]
    by_part = counts.reshape(parts, parts, -1)  # [source, target, expert of the target]

    def starts(a: jax.Array, dim: int) -> jax.Array:
        return jnp.cumsum(a, dim) - a

    def of(a: jax.Array, i: jax.Array, dim: int) -> jax.Array:
        return jnp.ravel(jax.lax.dynamic_index_in_dim(a, i, dim, keepdims=False))

    here = starts(counts, 1).reshape(by_part.shape)  # where rows begin at their source
    # On the target by expert first, then by source: what comes is sorted.
    first = starts(jnp.sum(by_part, 0), 1)  # [target, expert]
    there = first + starts(by_part, 0)

    sizes, arriving = of(by_part, me, 0), of(by_part, me, 1)
    out = _Slices(of(here, me, 0), sizes, of(there, me, 0), arriving)
    back = _Slices(of(there, me, 1), arriving, of(here, me, 1), sizes)
    static = _Static(axis, len(rows), parts * most, ragged)
    reverse = static._replace(sent=static.room, room=static.sent)
    groups = of(jnp.sum(by_part, 0), me, 0)
    return (
        _exchange(static, rows, out, back),
        groups,
        lambda y: _exchange(reverse, y, back, out),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static: _Static, rows: jax.Array, out: _Slices, back: _Slices) -> jax.Array:
    """Sends slices of `rows` as `out` says; the gradient goes as `back` says."""
    if static.ragged:
        room = jnp.zeros((static.room, *rows.shape[1:]), rows.dtype)
        over = tuple(jax.typeof(rows).manual_axis_type.varying)
        room = jax.lax.pcast(room, over, to="varying")
        return jax.lax.ragged_all_to_all(
            rows, room, out.source, out.sizes, out.target, out.arriving, axis_name=static.axis
        )
    parts = jax.lax.axis_size(static.axis)
    everything = jax.lax.all_gather(rows, static.axis)
    source, sizes, target = (
        jax.lax.all_to_all(a.reshape(parts, -1), static.axis, 0, 0)[..., None] for a in out[:3]
    )
    row = jnp.arange(static.sent)
    wanted = (row >= source) & (row < source + sizes)  # [part, slice, row]
    place = jnp.sum(jnp.where(wanted, target + row - source, 0), axis=1)
    place = jnp.where(jnp.any(wanted, axis=1), place, static.room)
    room = jnp.zeros((static.room, *rows.shape[1:]), rows.dtype)
    return room.at[place.reshape(-1)].set(everything.reshape(-1, *rows.shape[1:]), mode="drop")


def _exchange_forward(
    static: _Static, rows: jax.Array, out: _Slices, back: _Slices
) -> tuple[jax.Array, tuple[_Slices, _Slices]]:
    return _exchange(static, rows, out, back), (out, back)


def _exchange_backward(
    static: _Static, saved: tuple[_Slices, _Slices], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    out, back = saved
    reverse = static._replace(sent=static.room, room=static.sent)
    return _exchange(reverse, gradient, back, out), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def to_buckets(buckets: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Sends slots to their experts: `[experts, n, D]` to `[experts / parts, parts n, D]`."""
    return jax.lax.all_to_all(buckets, axis, 0, 1, tiled=True)


def from_buckets(buckets: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Brings the slots of `to_buckets` back."""
    return jax.lax.all_to_all(buckets, axis, 1, 0, tiled=True)
