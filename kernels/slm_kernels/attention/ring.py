"""Attention over rows whose tokens are split over devices: keys go round the ring of devices.

Every device keeps its queries and looks at the keys of one device after another, which are passed
on meanwhile (ring attention, Liu et al. 2023, arXiv:2310.01889). No device ever holds the keys of
a whole row, in the backward pass neither: there they go round again, with their gradients.

When causal, a device has nothing to see in keys of later tokens and leaves them out. The last
device sees all of them, so a step takes no less time; with a window the keys travel only as far as
they are seen, which does save.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_kernels.attention import parts, tpu
from slm_kernels.attention.parts import Ids, Mask, merge
from slm_kernels.dispatch import pick, platform

# Queries of a device from which on the kernel is the default.
_FEW_QUERIES = 128

_PARTS: dict[str, Any] = {"xla": parts, "tpu": tpu}


class _Ring(NamedTuple):
    """What is known of a call when it is traced.

    Attributes:
        mask: who sees whom.
        axis: mesh axes that rows are split over.
        steps: how often keys are passed on.
        implementation: `"xla"` or `"tpu"`.
    """

    mask: Mask
    axis: Any
    steps: int
    implementation: str


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array | None,
    axis: Any,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`slm_kernels.attention.attention` in a `shard_map`, on one device's part of every row.

    Args:
        q: `[B, S, n_heads, head_dim]`, S tokens of each row: device i has the i-th part.
        k: `[B, S, n_kv_heads, head_dim]`.
        v: `[B, S, n_kv_heads, head_dim]`.
        positions: `[B or 1, S]` int32, within the document; they count up by one.
        segments: `[B, S]` int32 document ids, or `None` for one document a row.
        axis: mesh axis or axes that rows are split over.
        causal: hide later positions.
        window: width of the sliding window, or `None`.
        softcap: as in `attention`.
        scale: as in `attention`.
        implementation: `"xla"`, `"tpu"`, or `None`: on a TPU, from 128 queries on, `"tpu"`.

    Returns:
        `[B, S, n_heads, head_dim]` in the dtype of `q`.
    """
    batch, length, n_heads, head_dim = q.shape
    default = "tpu" if platform() == "tpu" and length >= _FEW_QUERIES else "xla"
    name, _ = pick("ring_attention", implementation, _PARTS, default)
    n = jax.lax.axis_size(axis)
    steps = n - 1
    if causal and window is not None:
        steps = min(steps, -(-(window - 1) // length))
    mask = Mask(causal, causal, window, softcap, head_dim**-0.5 if scale is None else scale)
    ids = tuple(
        None if x is None else jnp.asarray(x, jnp.int32)[:, None] for x in (positions, segments)
    )
    heads = q.reshape(batch, length, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    out = _attend(_Ring(mask, axis, steps, name), heads, k, v, ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, n_heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids) -> jax.Array:
    return _forward(ring, q, k, v, ids)[0]


def _forward(
    ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids
) -> tuple[jax.Array, tuple]:
    run = _PARTS[ring.implementation].part_forward
    out, lse = run(ring.mask, q, k, v, _both(ids, ids))
    far = ring.mask._replace(in_order=False)

    def visit(carry: Any, step: jax.Array) -> tuple[Any, None]:
        found, keys = carry
        keys = _pass_on(keys, ring.axis, 1)

        def look(found: Any) -> Any:
            k, v, theirs = keys
            return merge(*found, *run(far, q, k, v, _both(ids, theirs)))

        return (_if_earlier(ring, step, look, found), keys), None

    start = (out.astype(jnp.float32), lse), (k, v, ids)
    ((out, lse), _), _ = jax.lax.scan(visit, start, jnp.arange(1, ring.steps + 1))
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, out, lse)


def _backward(
    ring: _Ring, saved: tuple, do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, ids, out, lse = saved
    run = _PARTS[ring.implementation].part_backward
    f32 = jnp.float32

    def gradients(mask: Mask, k: jax.Array, v: jax.Array, theirs: Ids) -> Any:
        found = run(mask, q, k, v, _both(ids, theirs), out, lse, do)
        return tuple(g.astype(f32) for g in found)

    far = ring.mask._replace(in_order=False)
    dq, dk, dv = gradients(ring.mask, k, v, ids)

    def visit(carry: Any, step: jax.Array) -> tuple[Any, None]:
        dq, keys, dkv = carry
        keys, dkv = _pass_on((keys, dkv), ring.axis, 1)

        def look(sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, gradients(far, *keys))

        dq, *dkv = _if_earlier(ring, step, look, (dq, *dkv))
        return (dq, keys, tuple(dkv)), None

    start = dq, (k, v, ids), (dk, dv)
    (dq, _, dkv), _ = jax.lax.scan(visit, start, jnp.arange(1, ring.steps + 1))
    dk, dv = _pass_on(dkv, ring.axis, -ring.steps)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _both(mine: Ids, theirs: Ids) -> Ids:
    """Ids in the order of `parts.Ids`."""
    return mine[0], theirs[0], mine[1], theirs[1]


def _pass_on(tree: Any, axis: Any, by: int) -> Any:
    """Sends everything to the device `by` places further on."""
    n = jax.lax.axis_size(axis)
    if by % n == 0:
        return tree
    return jax.lax.ppermute(tree, axis, [(i, (i + by) % n) for i in range(n)])


def _if_earlier(ring: _Ring, step: jax.Array, look: Any, found: Any) -> Any:
    """`look(found)`, or `found` where causal queries would look at later keys."""
    if not ring.mask.causal:
        return look(found)
    return jax.lax.cond(step <= jax.lax.axis_index(ring.axis), look, lambda found: found, found)
